//! Finds the holders of a socket: the processes that have an open descriptor of it.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CStr, OsString},
    fs,
    io::Read as _,
    mem::MaybeUninit,
    os::fd::OwnedFd,
};

use rustix::{
    fs::{Mode, OFlags, RawDir, open, openat, readlinkat_raw},
    io::Errno,
};

use super::{
    by_socket::{BySocket, SocketRef},
    netns::NEEDS_PTRACE,
};
use crate::{
    budget::memory::MAX_MORE_HOLDERS,
    system::{
        interrupt,
        process::{self, Holder},
    },
};

/// The size of the buffer for a link target. It is large enough for `socket:[18446744073709551615]`; a longer
/// target is not a socket.
const LINK_BUFFER_LEN: usize = 32;

/// The minimum number of descriptors that a quick search checks. This takes about 30 ms and covers all
/// descriptors of most hosts.
const MIN_DESCRIPTORS_CHECKED: u64 = 10_000;

/// The extent of a search for holders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HolderSearch {
    /// Check every process.
    Complete,
    /// Stop when each socket has at least one holder and [`MIN_DESCRIPTORS_CHECKED`] descriptors have been
    /// checked. Processes with few descriptors are checked first. Reading a link of `/proc/PID/fd` costs 3
    /// µs, more than all other work for a socket, and a server may have 100,000 links.
    Quick,
}

/// The result of a search for holders.
#[derive(Debug, Default)]
pub struct Holders {
    /// The holders of each socket; a socket without holders has no entry. Processes with fewer descriptors come first.
    /// A search in `/proc` finds only the inode.
    pub by_socket: BySocket<Vec<Holder>>,
    /// True if every process was checked, except those in `unseen`. Otherwise there may be more holders.
    pub complete: bool,
    /// What could not be checked, and the reason, as text for people.
    pub unseen: Option<String>,
}

impl Holders {
    /// The processes that have this socket open. `None`: there is none, none was found, or it is not certain which
    /// socket it is.
    #[must_use]
    pub fn of(&self, socket: &SocketRef) -> Option<&[Holder]> {
        self.by_socket.get(socket).map(Vec::as_slice)
    }

    /// True if no process has this socket open, but for what is in `unseen`.
    #[must_use]
    pub fn has_none(&self, socket: &SocketRef) -> bool {
        self.complete && !self.by_socket.may_have(socket)
    }
}

/// Searches the descriptors of all processes for the sockets with these inodes. It does not find descriptors
/// of a thread with its own descriptor table, unless it is the main thread, and descriptors in flight through
/// a unix socket.
#[must_use]
pub fn find_holders(inodes: &HashSet<u64>, search: HolderSearch, max_holders: usize) -> Holders {
    let min_checked = match search {
        HolderSearch::Complete => u64::MAX,
        HolderSearch::Quick => MIN_DESCRIPTORS_CHECKED,
    };
    search_processes(inodes, min_checked, max_holders)
}

/// After `min_checked` descriptors, the search continues only while a socket has no holder.
fn search_processes(inodes: &HashSet<u64>, min_checked: u64, max_holders: usize) -> Holders {
    let mut holders = Holders { complete: true, ..Holders::default() };
    // In the common case there is nothing to search for.
    if inodes.is_empty() {
        return holders;
    }
    let (mut checked, mut denied) = (0, 0);
    let mut by_inode: HashMap<u64, Vec<Holder>> = HashMap::new();
    let mut held = Vec::new();
    // A command keeps all.
    let mut more_holders = if max_holders == usize::MAX { usize::MAX } else { MAX_MORE_HOLDERS };
    for (expected, pid) in list_processes() {
        if checked + expected > min_checked && by_inode.len() == inodes.len() {
            holders.complete = false;
            break;
        }
        held.clear();
        let outcome = interrupt::bounded(|| {
            for_each_descriptor(pid, |inode| {
                checked += 1;
                held.extend(inode.filter(|inode| inodes.contains(inode)));
            })
        });
        // Any other error means that the process has ended.
        denied += usize::from(matches!(outcome, Err(Errno::ACCESS | Errno::PERM)));
        held.sort_unstable();
        held.dedup();
        let (Ok(folder), false) = (outcome, held.is_empty()) else { continue };
        let (comm, start_ticks) = (read_comm(&folder), read_start_ticks(&folder));
        for inode in &held {
            let holder = Holder { pid, comm: comm.clone(), start_ticks };
            let of_socket = by_inode.entry(*inode).or_default();
            let is_more = usize::from(!of_socket.is_empty());
            if of_socket.len() < max_holders && is_more <= more_holders {
                more_holders -= is_more;
                of_socket.reserve_exact(1);
                of_socket.push(holder);
            }
        }
    }
    holders.by_socket =
        by_inode.into_iter().map(|(inode, holders)| (SocketRef::of_inode(inode), holders)).collect();
    holders.unseen = (denied != 0).then(|| format!("open files of processes ({denied}): {NEEDS_PTRACE}"));
    holders
}

/// All processes as (number of descriptors, pid), those with few descriptors first. Kernels before v6.2 do
/// not report the number of descriptors.
fn list_processes() -> Vec<(u64, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
    let parse_pid = |name: OsString| name.to_str()?.parse().ok();
    let pids = entries.flatten().filter_map(|entry| parse_pid(entry.file_name()));
    let count = |pid| fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |folder| folder.len());
    let mut processes: Vec<_> = pids.map(|pid| (count(pid), pid)).collect();
    processes.sort_unstable();
    processes
}

/// Calls `each` for each descriptor of a process; the argument is the inode if the descriptor is a socket. Returns
/// the folder of the descriptors.
fn for_each_descriptor(pid: u32, mut each: impl FnMut(Option<u64>)) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder: OwnedFd = open(format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    let mut names = [MaybeUninit::uninit(); 8_192];
    let mut entries = RawDir::new(&folder, &mut names);
    while let Some(entry) = entries.next() {
        each(socket_inode(&folder, entry?.file_name()));
    }
    Ok(folder)
}

fn socket_inode(folder: &OwnedFd, name: &CStr) -> Option<u64> {
    let mut target = [MaybeUninit::uninit(); LINK_BUFFER_LEN];
    let (target, _) = readlinkat_raw(folder, name, &mut target).ok()?;
    parse_socket_link(target)
}

/// Parses the inode in `socket:[4711]`.
fn parse_socket_link(target: &[u8]) -> Option<u64> {
    let digits = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    str::from_utf8(digits).ok()?.parse().ok()
}

/// Reads a file beside `/proc/PID/fd`. An open folder belongs to its process: after the end of the process it leads
/// nowhere, also if another process has the pid (`proc_pident_lookup`, fs/proc/base.c at v5.10).
fn read_beside(folder: &OwnedFd, path: &str) -> Option<Vec<u8>> {
    let file = openat(folder, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut bytes = Vec::new();
    interrupt::bounded(|| fs::File::from(file).read_to_end(&mut bytes)).ok()?;
    Some(bytes)
}

fn read_comm(folder: &OwnedFd) -> Option<String> {
    let name = read_beside(folder, "../comm")?;
    Some(String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned())
}

/// When the process started, in clock ticks since boot.
fn read_start_ticks(folder: &OwnedFd) -> Option<u64> {
    process::start_ticks_in_stat(&read_beside(folder, "../stat")?)
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsRawFd as _};

    use super::*;

    #[test]
    fn only_the_link_of_a_socket_has_a_socket_inode() {
        for (target, inode) in [
            ("socket:[4711]", Some(4_711)),
            ("socket:[]", None),
            ("socket:[47", None),
            ("socket:[-1]", None),
            ("pipe:[4711]", None),
            ("/tmp/socket:[4711]", None),
            ("", None),
        ] {
            assert_eq!(parse_socket_link(target.as_bytes()), inode, "{target}");
        }
    }

    fn inode(socket: &TcpListener) -> u64 {
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        parse_socket_link(link.as_os_str().as_encoded_bytes()).unwrap()
    }

    #[test]
    fn a_holder_with_several_descriptors_is_listed_once() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let _again = socket.try_clone().unwrap();
        let inode = inode(&socket);
        for min_checked in [0, MIN_DESCRIPTORS_CHECKED, u64::MAX] {
            let holders = search_processes(&HashSet::from([inode, u64::MAX]), min_checked, usize::MAX);
            let of_socket = holders.of(&SocketRef::of_inode(inode)).unwrap();
            let pids: Vec<_> = of_socket.iter().map(|holder| holder.pid).collect();
            assert_eq!(pids, [std::process::id()]);
            let holder = &of_socket[0];
            let start_ns = process::start_time_ns(holder.pid).unwrap();
            assert_eq!(holder.start_ticks, Some(process::start_ticks_of(start_ns)));
            let comm = fs::read_to_string("/proc/self/comm").unwrap();
            assert_eq!(holder.comm.as_deref(), comm.strip_suffix('\n'));
            assert!(holders.of(&SocketRef::of_inode(u64::MAX)).is_none());
            assert!(holders.complete, "no process holds the other socket, so all processes were checked");
        }
    }

    #[test]
    fn the_folder_of_a_process_that_has_ended_leads_to_no_other_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let folder = for_each_descriptor(child.id(), |_| ()).unwrap();
        assert_eq!(read_comm(&folder).as_deref(), Some("sleep"));
        assert!(read_start_ticks(&folder).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((read_comm(&folder), read_start_ticks(&folder)), (None, None));
    }

    #[test]
    fn a_quick_search_stops_at_a_holder_and_a_complete_search_checks_all_processes() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = inode(&socket);
        let (inodes, socket) = (HashSet::from([inode]), SocketRef::of_inode(inode));
        assert!(search_processes(&inodes, 0, usize::MAX).of(&socket).is_some());
        let complete = find_holders(&inodes, HolderSearch::Complete, usize::MAX);
        assert!(complete.of(&socket).is_some() && complete.complete);
    }
}
