//! Who holds a socket open: the processes that have a descriptor of it.

use std::{
    collections::{HashMap, HashSet},
    ffi::CStr,
    fs,
    mem::MaybeUninit,
    os::fd::OwnedFd,
};

use rustix::{
    fs::{Mode, OFlags, RawDir, open, readlinkat_raw},
    io::Errno,
};

use crate::process::Holder;

/// Long enough for `socket:[18446744073709551615]`; a longer target isn't a socket.
const TARGET_LEN: usize = 32;

/// Who holds what.
#[derive(Debug, Default)]
pub struct Holders {
    /// All holders of each socket that has any, by its inode, in the order of `/proc`.
    pub of: HashMap<u64, Vec<Holder>>,
    /// How many processes would not let us look.
    pub unseen: usize,
}

/// Walks once over the descriptors of all processes, for the sockets of these inodes. A thread that has a table of
/// descriptors of its own isn't seen, for only a process's first thread's is looked at, nor is a descriptor on its way
/// through a unix socket.
#[must_use]
pub fn holders(inodes: &HashSet<u64>) -> Holders {
    let mut holders = Holders::default();
    let Ok(processes) = fs::read_dir("/proc") else { return holders };
    // Nothing to look for is the usual case.
    if inodes.is_empty() {
        return holders;
    }
    let mut held = Vec::new();
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        held.clear();
        match sockets_of(pid, |inode| {
            if inodes.contains(&inode) {
                held.push(inode);
            }
        }) {
            Ok(()) => {}
            Err(Errno::ACCESS | Errno::PERM) => holders.unseen += 1,
            // It has ended.
            Err(_) => continue,
        }
        held.sort_unstable();
        held.dedup();
        let comm = if held.is_empty() { None } else { comm(pid) };
        for inode in &held {
            holders.of.entry(*inode).or_default().push(Holder { pid, comm: comm.clone() });
        }
    }
    holders
}

fn sockets_of(pid: u32, mut each: impl FnMut(u64)) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder: OwnedFd = open(format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    let mut names = [MaybeUninit::uninit(); 8_192];
    let mut entries = RawDir::new(&folder, &mut names);
    while let Some(entry) = entries.next() {
        if let Some(inode) = socket_inode(&folder, entry?.file_name()) {
            each(inode);
        }
    }
    Ok(())
}

fn socket_inode(folder: &OwnedFd, name: &CStr) -> Option<u64> {
    let mut target = [MaybeUninit::uninit(); TARGET_LEN];
    let (target, _) = readlinkat_raw(folder, name, &mut target).ok()?;
    parse(target)
}

/// The inode in `socket:[4711]`.
fn parse(target: &[u8]) -> Option<u64> {
    let digits = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    str::from_utf8(digits).ok()?.parse().ok()
}

fn comm(pid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned())
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsRawFd as _};

    use super::*;

    #[test]
    fn only_sockets_have_a_sockets_inode() {
        for (target, inode) in [
            ("socket:[4711]", Some(4_711)),
            ("socket:[]", None),
            ("socket:[47", None),
            ("socket:[-1]", None),
            ("pipe:[4711]", None),
            ("/tmp/socket:[4711]", None),
            ("", None),
        ] {
            assert_eq!(parse(target.as_bytes()), inode, "{target}");
        }
    }

    #[test]
    fn a_holder_is_named_once_however_many_descriptors_it_has() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let _again = socket.try_clone().unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let inode = parse(link.as_os_str().as_encoded_bytes()).unwrap();
        let holders = holders(&HashSet::from([inode, u64::MAX]));
        let pids: Vec<_> = holders.of[&inode].iter().map(|holder| holder.pid).collect();
        assert_eq!(pids, [std::process::id()]);
        assert!(holders.of[&inode][0].comm.is_some());
        assert_eq!(holders.of.len(), 1);
    }
}
