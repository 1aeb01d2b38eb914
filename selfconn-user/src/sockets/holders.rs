//! Who holds a socket open: the processes that have a descriptor of it.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CStr, OsString},
    fs,
    mem::MaybeUninit,
    os::fd::OwnedFd,
};

use rustix::{
    fs::{Mode, OFlags, RawDir, open, readlinkat_raw},
    io::Errno,
};

use super::NEEDS_PTRACE;
use crate::process::Holder;

/// Long enough for `socket:[18446744073709551615]`; a longer target isn't a socket.
const TARGET_LEN: usize = 32;

/// As many descriptors are looked at in any case: some 30 ms, which covers most hosts.
const ALWAYS: u64 = 10_000;

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// At every process.
    Complete,
    /// Until each socket has a holder, beginning with the processes that have the fewest descriptors; but at as many
    /// as are quickly looked at in any case. A link of `/proc/PID/fd` costs 3 µs, more than all else that is done for
    /// a socket, and a server may have 100,000 of them.
    Quick,
}

/// Who holds what.
#[derive(Debug, Default)]
pub struct Holders {
    /// The holders of each socket that has any, by its inode; those with fewer descriptors first.
    pub of: HashMap<u64, Vec<Holder>>,
    /// Whether every process was looked at, but for the unseen. Else there may be more holders.
    pub complete: bool,
    /// What could not be looked at, and why; for people.
    pub unseen: Option<String>,
}

/// Looks for the sockets of these inodes among the descriptors of all processes. Not seen: a thread that has a table of
/// descriptors of its own, unless it is its process's first; a descriptor on its way through a unix socket.
#[must_use]
pub fn holders(inodes: &HashSet<u64>, search: Search) -> Holders {
    let enough = match search {
        Search::Complete => u64::MAX,
        Search::Quick => ALWAYS,
    };
    look(inodes, enough)
}

/// Past `enough` descriptors it goes on only while a socket has no holder.
fn look(inodes: &HashSet<u64>, enough: u64) -> Holders {
    let mut holders = Holders { complete: true, ..Holders::default() };
    // Nothing to look for is the usual case.
    if inodes.is_empty() {
        return holders;
    }
    let (mut looked_at, mut closed) = (0, 0);
    let mut held = Vec::new();
    for (expected, pid) in processes() {
        if looked_at + expected > enough && holders.of.len() == inodes.len() {
            holders.complete = false;
            break;
        }
        held.clear();
        let outcome = sockets_of(pid, |inode| {
            looked_at += 1;
            held.extend(inode.filter(|inode| inodes.contains(inode)));
        });
        // Any other error is its end.
        closed += usize::from(matches!(outcome, Err(Errno::ACCESS | Errno::PERM)));
        held.sort_unstable();
        held.dedup();
        let comm = if held.is_empty() { None } else { comm(pid) };
        for inode in &held {
            holders.of.entry(*inode).or_default().push(Holder { pid, comm: comm.clone() });
        }
    }
    holders.unseen = (closed != 0).then(|| format!("open files of processes ({closed}): {NEEDS_PTRACE}"));
    holders
}

/// All processes, those with few descriptors first. Kernels before v6.2 don't tell how many; there the order is that
/// of `/proc`.
fn processes() -> Vec<(u64, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
    let pid = |name: OsString| name.to_str()?.parse().ok();
    let pids = entries.flatten().filter_map(|entry| pid(entry.file_name()));
    let count = |pid| fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |folder| folder.len());
    let mut processes: Vec<_> = pids.map(|pid| (count(pid), pid)).collect();
    processes.sort_unstable();
    processes
}

/// Calls `each` for each descriptor, with the inode if it is a socket.
fn sockets_of(pid: u32, mut each: impl FnMut(Option<u64>)) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder: OwnedFd = open(format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    let mut names = [MaybeUninit::uninit(); 8_192];
    let mut entries = RawDir::new(&folder, &mut names);
    while let Some(entry) = entries.next() {
        each(socket_inode(&folder, entry?.file_name()));
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

    fn inode(socket: &TcpListener) -> u64 {
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        parse(link.as_os_str().as_encoded_bytes()).unwrap()
    }

    #[test]
    fn a_holder_is_named_once_however_many_descriptors_it_has() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let _again = socket.try_clone().unwrap();
        let inode = inode(&socket);
        for enough in [0, ALWAYS, u64::MAX] {
            let holders = look(&HashSet::from([inode, u64::MAX]), enough);
            let pids: Vec<_> = holders.of[&inode].iter().map(|holder| holder.pid).collect();
            assert_eq!(pids, [std::process::id()]);
            assert!(holders.of[&inode][0].comm.is_some());
            assert_eq!(holders.of.len(), 1);
            assert!(holders.complete, "nobody holds the other one, so all were looked at");
        }
    }

    #[test]
    fn a_quick_search_ends_with_a_holder_and_a_complete_one_with_all_processes() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let inodes = HashSet::from([inode(&socket)]);
        assert_eq!(look(&inodes, 0).of.len(), 1);
        let complete = holders(&inodes, Search::Complete);
        assert_eq!((complete.of.len(), complete.complete), (1, true));
    }
}
