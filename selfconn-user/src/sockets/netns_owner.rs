//! The user that owns a network namespace or a user namespace, and visits for the guard.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
};

use selfconn_ebpf::Owner;

use super::{
    netns::{Namespace, VisitOptions, VisitResult, open, visit, visit_at},
    netns_selection::CURRENT_NETNS,
};
use crate::budget::owner_of_user;

/// Calls `each` in every network namespace that mounts or processes lead to. The thread stays in the last one.
pub fn visit_namespaces(each: impl FnMut(&Namespace) -> io::Result<()>) -> VisitResult {
    visit(VisitOptions::default(), each)
}

/// Calls `each` in the network namespace that this file refers to. The thread stays in it.
///
/// # Errors
/// If the file can't be opened or entered, or is no network namespace, and the errors of `each`.
pub fn visit_namespace(
    path: &Path,
    each: impl FnMut(&Namespace) -> io::Result<()>,
) -> io::Result<VisitResult> {
    visit_at(path, each)
}

/// The user that owns the network namespace of the calling thread: see [`owner_at`].
///
/// # Errors
/// As [`owner_at`].
pub fn owner() -> io::Result<u32> {
    owner_at(Path::new(CURRENT_NETNS)).map(|(_, owner)| owner)
}

/// The inode of a network namespace, and the user that owns it: the one that owns the outermost user namespace below
/// the initial one that it belongs to, or root.
///
/// # Errors
/// If the file can't be opened or is no network namespace.
pub fn owner_at(path: &Path) -> io::Result<(u64, u32)> {
    let (file, opened) = open(path)?.ok_or(io::ErrorKind::NotFound)?;
    let userns = outermost(related(&file, NS_GET_USERNS)?)?;
    Ok((opened.ino(), userns.map_or(0, |userns| userns.owner)))
}

/// The outermost user namespace below the initial one that a process is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OutermostUserns {
    pub(super) inode: u64,
    /// The user that made it.
    pub(super) owner: u32,
}

impl OutermostUserns {
    /// Who is charged if root made it: root there makes control groups and users as it likes.
    pub(super) fn container(self) -> Option<Owner> {
        let group = || Owner::of_container(u32::try_from(self.inode).unwrap_or(u32::MAX));
        (self.owner == 0).then(|| Owner::new(0, group()))
    }
}

/// Who is charged for what a network namespace costs: the user that made the outermost user namespace that it belongs
/// to, a container, or root.
pub(super) fn payer(netns: &fs::File) -> Owner {
    match related(netns, NS_GET_USERNS).and_then(outermost) {
        Ok(Some(userns)) => userns.container().unwrap_or_else(|| owner_of_user(Some(userns.owner))),
        Ok(None) => owner_of_user(Some(0)),
        // Our user namespace is not the initial one.
        Err(_) => owner_of_user(None),
    }
}

/// The inode of a user namespace, and the outermost one that it belongs to. `None`: it is the initial one.
///
/// # Errors
/// As [`owner_at`].
pub(super) fn outermost_userns_at(path: &Path) -> io::Result<(u64, Option<OutermostUserns>)> {
    let (file, opened) = open(path)?.ok_or(io::ErrorKind::NotFound)?;
    Ok((opened.ino(), outermost(file)?))
}

/// include/uapi/linux/nsfs.h at v5.10.
const NS_GET_USERNS: libc::Ioctl = 0xb701;
const NS_GET_PARENT: libc::Ioctl = 0xb702;
const NS_GET_OWNER_UID: libc::Ioctl = 0xb704;

/// The outermost user namespace below the initial one that this one belongs to.
fn outermost(mut userns: fs::File) -> io::Result<Option<OutermostUserns>> {
    /// The kernel's inode number of the initial user namespace: include/linux/proc_ns.h at v5.10.
    const INITIAL: u64 = 0xefff_fffd;
    let mut inode = userns.metadata()?.ino();
    if inode == INITIAL {
        return Ok(None);
    }
    loop {
        let parent = related(&userns, NS_GET_PARENT)?;
        let parent_inode = parent.metadata()?.ino();
        if parent_inode == INITIAL {
            break;
        }
        (userns, inode) = (parent, parent_inode);
    }
    let mut owner: libc::uid_t = 0;
    // SAFETY: the request writes a user id to this address.
    match unsafe { libc::ioctl(userns.as_raw_fd(), NS_GET_OWNER_UID, &raw mut owner) } {
        0 => Ok(Some(OutermostUserns { inode, owner })),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The namespace that this request returns.
fn related(of: &fs::File, request: libc::Ioctl) -> io::Result<fs::File> {
    // SAFETY: these requests take no argument, and return a descriptor that nothing else owns.
    match unsafe { libc::ioctl(of.as_raw_fd(), request) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above.
        fd => Ok(fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) })),
    }
}
