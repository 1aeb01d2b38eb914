//! Finds the network namespaces of this host and enters each one once with the calling thread.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    fs, io,
    os::{
        fd::AsFd as _,
        unix::{
            ffi::OsStringExt as _,
            fs::{MetadataExt as _, OpenOptionsExt as _},
        },
    },
    panic,
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{FsWord, OFlags, fstatfs},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use selfconn_ebpf::Endpoint;

use crate::system::netns_cookie;

const CURRENT_NETNS: &str = "/proc/thread-self/ns/net";

/// The hint for processes that this process may not inspect.
pub(super) const NEEDS_PTRACE: &str = "looking into them needs CAP_SYS_PTRACE, which root has";

const NEEDS_ADMIN: &str = ": entering it needs CAP_SYS_ADMIN, which root has";

/// The magic number of nsfs, the file system of namespace files: include/uapi/linux/magic.h at v5.10.
const NSFS_MAGIC: FsWord = 0x6e73_6673;

/// The result of a visit.
#[derive(Debug, Default)]
pub(super) struct VisitResult {
    /// The namespaces in which `each` succeeded: inodes and cookies.
    pub(super) namespaces: HashMap<u32, u64>,
    /// What could not be visited, and the reason: one line of text for people each.
    pub(super) unseen: Vec<String>,
}

/// The identity of a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    /// The kernel gives it to another namespace when this one has ended.
    pub inode: u32,
    /// Unique until the next boot. 0: unknown.
    pub cookie: u64,
}

impl From<&Endpoint> for NetnsId {
    fn from(endpoint: &Endpoint) -> Self {
        Self { inode: endpoint.netns, cookie: endpoint.table_key().netns_cookie }
    }
}

/// A network namespace that was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub id: NetnsId,
    /// The file through which it was entered: a mount point, or a file in the `/proc` directory of a process.
    pub path: PathBuf,
    /// True if this process is in this namespace.
    pub is_current: bool,
}

/// Calls `each` in the network namespace of the calling thread, which needs no privilege.
pub(super) fn visit_current(mut each: impl FnMut(&Namespace) -> io::Result<()>) -> VisitResult {
    let mut visit = NamespaceVisit::default();
    visit.visit_path(Path::new(CURRENT_NETNS), NamespaceSource::Current, &mut each);
    visit.finish()
}

/// Calls `each` in the network namespace that this file refers to. The thread stays in it.
pub(super) fn visit_at(
    path: &Path,
    mut each: impl FnMut(&Namespace) -> io::Result<()>,
) -> io::Result<VisitResult> {
    let mut visit = NamespaceVisit::default();
    match visit.try_visit_path(path, NamespaceSource::Requested, &mut each)? {
        true => Ok(visit.finish()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a network namespace")),
    }
}

/// Calls `each` in every network namespace: first in the namespace of the calling thread, which needs no
/// privilege, then in the mounted namespaces (`/run/netns` and others), then in the namespaces of all
/// processes and of the threads in `netns_hints`. The thread stays in the last one. A namespace that
/// disappears meanwhile is not an error.
pub(super) fn visit(netns_hints: &[u32], mut each: impl FnMut(&Namespace) -> io::Result<()>) -> VisitResult {
    let mut visit = NamespaceVisit::default();
    visit.visit_path(Path::new(CURRENT_NETNS), NamespaceSource::Current, &mut each);
    for path in mount_points(&fs::read("/proc/self/mountinfo").unwrap_or_default()) {
        visit.visit_path(&path, NamespaceSource::Mount, &mut each);
    }
    match fs::read_dir("/proc") {
        Ok(entries) => {
            for entry in entries.flatten() {
                if entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                    visit.visit_path(&entry.path().join("ns/net"), NamespaceSource::Process, &mut each);
                }
            }
        }
        Err(error) => visit.add_refusal(format!("the network namespaces of processes: /proc: {error}"), None),
    }
    // `/proc` has a directory for each thread id, too, but does not list it.
    for thread in netns_hints {
        visit.visit_path(
            &PathBuf::from(format!("/proc/{thread}/ns/net")),
            NamespaceSource::Process,
            &mut each,
        );
    }
    visit.finish()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamespaceSource {
    Current,
    Mount,
    Process,
    /// The user named the file.
    Requested,
}

#[derive(Default)]
struct NamespaceVisit {
    /// Device and inode of the namespaces that were visited or permanently refused.
    known: HashSet<(u64, u64)>,
    namespaces: HashMap<u32, u64>,
    /// The number of processes whose namespace this process is not permitted to identify.
    denied_processes: usize,
    /// By reason: the number of refusals, and the name of the first refused namespace.
    refused: BTreeMap<String, (usize, Option<String>)>,
}

impl NamespaceVisit {
    fn visit_path(
        &mut self,
        path: &Path,
        source: NamespaceSource,
        each: &mut impl FnMut(&Namespace) -> io::Result<()>,
    ) {
        match self.try_visit_path(path, source, each) {
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error)
                if source == NamespaceSource::Process && error.kind() == io::ErrorKind::PermissionDenied =>
            {
                // The kernel reports the same error for a process that has ended (`proc_ns_get_link`,
                // fs/proc/namespaces.c at v5.10).
                self.denied_processes += usize::from(path.ancestors().nth(2).is_some_and(Path::exists));
            }
            Err(error) => self.add_refusal(error.to_string(), Some(path.display().to_string())),
        }
    }

    /// Returns false if the file is not a network namespace.
    fn try_visit_path(
        &mut self,
        path: &Path,
        source: NamespaceSource,
        each: &mut impl FnMut(&Namespace) -> io::Result<()>,
    ) -> io::Result<bool> {
        let named = fs::metadata(path)?;
        if self.known.contains(&(named.dev(), named.ino())) {
            return Ok(true);
        }
        let Some((file, opened)) = open(path)? else { return Ok(false) };
        if !self.known.insert((opened.dev(), opened.ino())) {
            return Ok(true);
        }
        let is_current = source == NamespaceSource::Current
            || fs::metadata(CURRENT_NETNS)
                .is_ok_and(|current| (current.dev(), current.ino()) == (opened.dev(), opened.ino()));
        let inode = opened.ino();
        let describe = |error: io::Error, hint| {
            (error.to_string() + hint, Some(format!("{inode} ({})", path.display())))
        };
        if !is_current
            && let Err(error) = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        {
            let (why, which) = describe(error.into(), NEEDS_ADMIN);
            if source == NamespaceSource::Requested {
                return Err(io::Error::other(why));
            }
            self.add_refusal(why, which);
            return Ok(true);
        }
        let id = NetnsId {
            inode: u32::try_from(inode).unwrap_or(0),
            cookie: netns_cookie::current().unwrap_or(0),
        };
        match each(&Namespace { id, path: path.to_owned(), is_current }) {
            Ok(()) => {
                self.namespaces.insert(id.inode, id.cookie);
            }
            Err(error) if source == NamespaceSource::Requested => return Err(error),
            Err(error) => {
                let (why, which) = describe(error, "");
                self.add_refusal(why, which);
            }
        }
        Ok(true)
    }

    fn add_refusal(&mut self, why: String, which: Option<String>) {
        self.refused.entry(why).or_insert((0, which)).0 += 1;
    }

    fn finish(self) -> VisitResult {
        let mut unseen: Vec<_> = self
            .refused
            .into_iter()
            .map(|(why, refused)| match refused {
                (_, None) => why,
                (1, Some(which)) => format!("network namespace {which}: {why}"),
                (count, Some(first)) => format!("{count} network namespaces, the first {first}: {why}"),
            })
            .collect();
        match self.denied_processes {
            0 => {}
            count => unseen.push(format!("network namespaces of processes ({count}): {NEEDS_PTRACE}")),
        }
        VisitResult { namespaces: self.namespaces, unseen }
    }
}

/// Calls `work` on a separate thread that is in this network namespace; the namespace of the caller does not
/// change. The search for the namespace begins with the namespace of the caller, continues with those of the
/// processes or threads in `netns_hints`, and then with all others as in [`visit`]. The inode 0 is the namespace of
/// the caller, because a kernel without namespaces reports no inode.
///
/// # Errors
/// If the namespace cannot be found or entered, or has ended, and the errors of `work`.
pub fn run_in_namespace<T: Send>(
    netns: NetnsId,
    netns_hints: &[u32],
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespace".to_owned());
        let thread = thread.spawn_scoped(scope, || {
            enter(netns.inode, netns_hints)?;
            match netns_cookie::current() {
                Some(cookie) if ![0, cookie].contains(&netns.cookie) => {
                    let why =
                        format!("network namespace {} has ended; its inode is that of another", netns.inode);
                    Err(io::Error::new(io::ErrorKind::NotFound, why))
                }
                _ => work(),
            }
        })?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// Checks that the calling thread may enter namespaces: it enters the namespace that it is already in.
pub(super) fn may_enter() -> io::Result<()> {
    let (file, _) = open(Path::new(CURRENT_NETNS))?.ok_or(io::ErrorKind::NotFound)?;
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn enter(netns: u32, netns_hints: &[u32]) -> io::Result<()> {
    let leads_there = |path: &Path| fs::metadata(path).is_ok_and(|named| named.ino() == u64::from(netns));
    // If the thread is already in the namespace, it needs no privilege.
    if netns == 0 || leads_there(Path::new(CURRENT_NETNS)) {
        return Ok(());
    }
    let of_process = |pid: &u32| PathBuf::from(format!("/proc/{pid}/ns/net"));
    let hinted = netns_hints.iter().map(of_process);
    let mounts = std::iter::once_with(|| mount_points(&fs::read("/proc/self/mountinfo").unwrap_or_default()));
    let processes = std::iter::once_with(|| fs::read_dir("/proc").into_iter().flatten().flatten());
    let all =
        hinted.chain(mounts.flatten()).chain(processes.flatten().map(|entry| entry.path().join("ns/net")));
    for path in all.filter(|path| leads_there(path)) {
        if let Some((file, opened)) = open(&path)?
            && opened.ino() == u64::from(netns)
        {
            let entered = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
            return entered.map_err(|error| {
                let error = io::Error::from(error);
                io::Error::new(error.kind(), format!("network namespace {netns}: {error}{NEEDS_ADMIN}"))
            });
        }
    }
    let why = format!("no process and no mount leads to network namespace {netns}");
    Err(io::Error::new(io::ErrorKind::NotFound, why))
}

/// Opens a network namespace. `None`: the file is not a namespace, because the process or the mount has
/// changed.
fn open(path: &Path) -> io::Result<Option<(fs::File, fs::Metadata)>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    if fstatfs(&file)?.f_type != NSFS_MAGIC {
        return Ok(None);
    }
    let opened = file.metadata()?;
    Ok(Some((file, opened)))
}

fn is_gone(error: &io::Error) -> bool {
    const ESRCH: i32 = 3;
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
}

/// Parses the mount points of network namespaces from the text of `/proc/self/mountinfo`.
pub(super) fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let mount_point = |line: &[u8]| {
        // The fields are: id, parent, device, root within the file system, mount point.
        let mut fields = line.split(|byte| *byte == b' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        root.starts_with(b"net:[").then(|| PathBuf::from(OsString::from_vec(unescape(at))))
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(mount_point).collect()
}

/// Decodes a path of `mountinfo`, in which the kernel writes spaces, newlines and backslashes as three octal
/// digits.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        let octal = tail.first_chunk::<3>().filter(|_| *first == b'\\');
        let byte = octal.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[3..] } else { tail };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_namespaces_are_found_at_any_mount_point() {
        let mountinfo = b"24 1 0:21 / /proc rw,nosuid - proc proc rw\n\
            31 25 0:4 net:[4026532281] /run/netns/blue rw shared:12 - nsfs nsfs rw\n\
            32 25 0:4 net:[4026532282] /run/docker/netns/a\\040b\\134c rw - nsfs nsfs rw\n\
            33 25 0:4 mnt:[4026532283] /run/ns/mnt rw - nsfs nsfs rw\n\
            34 25 0:22 /net:[1] /odd rw - tmpfs tmpfs rw\n\
            \n\
            broken";
        assert_eq!(
            mount_points(mountinfo),
            [Path::new("/run/netns/blue"), Path::new("/run/docker/netns/a b\\c")]
        );
    }

    #[test]
    fn escapes_are_decoded_once() {
        for (raw, path) in
            [("/a\\040b", "/a b"), ("/a\\134040", "/a\\040"), ("/a\\9", "/a\\9"), ("/a\\", "/a\\"), ("", "")]
        {
            assert_eq!(unescape(raw.as_bytes()), path.as_bytes(), "{raw}");
        }
    }

    #[test]
    fn refusals_with_the_same_reason_are_one_line() {
        let mut visit =
            NamespaceVisit { denied_processes: 7, namespaces: [(1, 5)].into(), ..NamespaceVisit::default() };
        visit.add_refusal("no".to_owned(), Some("1 (/a)".to_owned()));
        visit.add_refusal("no".to_owned(), Some("2 (/b)".to_owned()));
        visit.add_refusal("never".to_owned(), Some("3 (/c)".to_owned()));
        let VisitResult { namespaces, unseen } = visit.finish();
        assert_eq!(namespaces, HashMap::from([(1, 5)]));
        assert_eq!(
            unseen[..2],
            ["network namespace 3 (/c): never", "2 network namespaces, the first 1 (/a): no"]
        );
        assert!(unseen[2].contains("(7)") && unseen[2].contains("CAP_SYS_PTRACE"), "{unseen:?}");
        assert!(unseen.len() == 3);
    }
}
