//! Ways to network namespaces that no process leader and no mount of ours leads to: through other threads, through open
//! descriptors, and through mounts in other mount namespaces. Only paths are found here; `netns.rs` enters them.
//!
//! No look at another process's file may wait for that process: a descriptor that changes meanwhile may be one of a
//! FUSE file. So it is opened as a path only, and what it is is read from its name, which the kernel makes. The kernel
//! may close the file of a descriptor that its process has closed meanwhile, so each look is interrupted if it takes
//! long.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags, open};

use super::netns;
use crate::system::interrupt;

/// How far a search goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SearchLimits {
    /// The maximum number of descriptors that are looked at. A look takes about 3 µs.
    pub(super) descriptors: usize,
    /// How long the threads and descriptors of all processes are looked at. An empty table can have a million slots, of
    /// which each takes a nanosecond or two, and thousands of processes can share it or have one each.
    pub(super) time: Duration,
    /// True if the mounts of other mount namespaces are looked at, too: their paths lead through directories that may
    /// be anybody's file system.
    pub(super) mounts: bool,
}

impl SearchLimits {
    /// For a command, which may take its time where it must.
    pub(super) const COMMAND: Self =
        Self { descriptors: 1_000_000, time: Duration::from_secs(30), mounts: true };
    /// For the daemon's snapshots, which search again only for a namespace that is new.
    pub(super) const DAEMON: Self =
        Self { descriptors: 100_000, time: Duration::from_secs(2), mounts: false };
    /// For one namespace, while other look-ups wait for the same thread.
    pub(super) const ONE: Self = Self { time: Duration::from_millis(300), ..Self::DAEMON };
}

/// Where the next search begins: a search that its limits ended goes on there, so that nobody's processes keep others'
/// from being looked at.
static NEXT_PROCESS: AtomicUsize = AtomicUsize::new(0);

/// By inode: the thread and the number of a descriptor that is a namespace of this inode.
pub(super) type NamespaceDescriptors = HashMap<u32, (u32, u32)>;

/// A file that is a network namespace.
pub(super) struct Lead {
    /// The inode of the namespace.
    pub(super) inode: u64,
    /// The path by which it is opened: it can't be another file than it was.
    pub(super) path: PathBuf,
    /// The path to show.
    pub(super) shown: PathBuf,
}

/// Calls `each` for the leads to namespaces whose inode is wanted, until it returns true, or until there are no more.
/// If `list` yields the descriptors of the host, no other is looked at; it is called if no thread leads to all. Returns
/// false if the limits ended it.
pub(super) fn search(
    limits: SearchLimits,
    list: impl FnOnce() -> Option<NamespaceDescriptors>,
    is_wanted: impl Fn(u64) -> bool,
    mut each: impl FnMut(&Lead) -> bool,
) -> bool {
    let wanted_at = |path: &Path| {
        let inode = fs::metadata(path).ok().map(|namespace| namespace.ino());
        inode.filter(|inode| is_wanted(*inode))
    };
    let mut processes: Vec<PathBuf> = numbered(Path::new("/proc")).collect();
    let first = NEXT_PROCESS.load(Ordering::Relaxed) % processes.len().max(1);
    processes.rotate_left(first);
    let (mut until, mut looked_at) = (Instant::now() + limits.time / 2, processes.len());
    for (number, process) in processes.iter().enumerate() {
        // At least one, so that each search comes further than the last.
        if number > 0 && Instant::now() >= until {
            looked_at = number;
            break;
        }
        for thread in numbered(&process.join("task")) {
            let path = thread.join("ns/net");
            let is_other = thread.file_name() != process.file_name();
            if is_other
                && let Some(inode) = wanted_at(&path)
                && each(&Lead { inode, shown: path.clone(), path })
            {
                return true;
            }
        }
    }
    until += limits.time / 2;
    if let Some(known) = list() {
        for (inode, (thread, descriptor)) in &known {
            let path = PathBuf::from(format!("/proc/{thread}/fd/{descriptor}"));
            if is_wanted(u64::from(*inode)) && follow(path, &is_wanted, &mut each) {
                return true;
            }
        }
    } else {
        match search_descriptors(&processes, limits.descriptors, until, &is_wanted, &mut each) {
            Descriptors::Found => return true,
            Descriptors::LookedAt(processes) => looked_at = looked_at.min(processes),
        }
    }
    if looked_at < processes.len() {
        NEXT_PROCESS.store(first + looked_at.max(1), Ordering::Relaxed);
        return false;
    }
    if limits.mounts {
        let mut known = HashSet::new();
        known.extend(fs::metadata("/proc/self/ns/mnt").map(|own| own.ino()));
        let own_users = fs::metadata("/proc/self/ns/user").map(|users| users.ino()).ok();
        for process in &processes {
            // In a mount namespace of another user namespace, its user may mount what answers no request.
            let users = fs::metadata(process.join("ns/user")).map(|users| users.ino()).ok();
            let is_new = fs::metadata(process.join("ns/mnt")).is_ok_and(|mounts| known.insert(mounts.ino()));
            if !is_new || users != own_users {
                continue;
            }
            for mount in mount_points(&fs::read(process.join("mountinfo")).unwrap_or_default()) {
                let path = process.join("root").join(mount.strip_prefix("/").unwrap_or(&mount));
                if let Some(inode) = wanted_at(&path)
                    && each(&Lead { inode, shown: path.clone(), path })
                {
                    return true;
                }
            }
        }
    }
    true
}

/// What has come of a search of descriptors.
enum Descriptors {
    /// `each` returned true.
    Found,
    /// The number of processes whose descriptors were looked at: all of them, unless the limits ended the search.
    LookedAt(usize),
}

/// Looks at the descriptors of these processes, `max` at most, and at those of one process at least.
fn search_descriptors(
    processes: &[PathBuf],
    max: usize,
    until: Instant,
    is_wanted: &impl Fn(u64) -> bool,
    each: &mut impl FnMut(&Lead) -> bool,
) -> Descriptors {
    let mut left = max;
    for (number, process) in processes.iter().enumerate() {
        // A table without a descriptor takes its time, too.
        if number > 0 && Instant::now() >= until {
            return Descriptors::LookedAt(number);
        }
        let mut descriptors: Box<dyn Iterator<Item = PathBuf>> = Box::new(numbered(&process.join("fd")));
        // The first thread has ended, or has no descriptor. The others may have.
        let mut first = descriptors.next();
        if first.is_none() {
            let tables = numbered(&process.join("task")).take(2).collect::<Vec<_>>();
            descriptors = Box::new(tables.into_iter().flat_map(|thread| numbered(&thread.join("fd"))));
            first = descriptors.next();
        }
        for descriptor in first.into_iter().chain(descriptors) {
            if left == 0 || number > 0 && Instant::now() >= until {
                return Descriptors::LookedAt(number);
            }
            left -= 1;
            if follow(descriptor, is_wanted, each) {
                return Descriptors::Found;
            }
        }
    }
    Descriptors::LookedAt(processes.len())
}

/// Calls `each` if this descriptor is a namespace whose inode is wanted.
fn follow(
    descriptor: PathBuf,
    is_wanted: &impl Fn(u64) -> bool,
    each: &mut impl FnMut(&Lead) -> bool,
) -> bool {
    let Some(inode) = inode_of(&descriptor).filter(|inode| is_wanted(*inode)) else { return false };
    let Some((_held, path)) = hold(&descriptor, inode) else { return false };
    each(&Lead { inode, path, shown: descriptor })
}

/// Opens what [`Lead::shown`] shows, if it is still this namespace.
pub(super) fn open_again(shown: &Path, inode: u64) -> io::Result<Option<(fs::File, fs::Metadata)>> {
    match hold(shown, inode) {
        Some((_held, path)) => netns::open(&path),
        None => Ok(None),
    }
}

/// A handle of this namespace that is no open file, and the path by which it can be opened.
fn hold(file: &Path, inode: u64) -> Option<(OwnedFd, PathBuf)> {
    let held = interrupt::bounded(|| open(file, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())).ok()?;
    let path = PathBuf::from(format!("/proc/thread-self/fd/{}", held.as_raw_fd()));
    (inode_of(&path) == Some(inode)).then_some((held, path))
}

/// The inode of the namespace that this link of `/proc` leads to.
fn inode_of(link: &Path) -> Option<u64> {
    interrupt::bounded(|| fs::read_link(link)).ok().and_then(|target| namespace_inode(&target))
}

/// The entries of a directory whose names are numbers.
fn numbered(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut entries = fs::read_dir(directory).into_iter().flatten().flatten();
    std::iter::from_fn(move || interrupt::bounded(|| entries.next()))
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path())
}

/// The inode in `net:[4026531833]`.
fn namespace_inode(target: &Path) -> Option<u64> {
    target.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
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
    fn a_namespace_is_known_by_the_name_that_the_kernel_gives_it() {
        for (target, inode) in [
            ("net:[4026531833]", Some(4_026_531_833)),
            ("mnt:[4026531833]", None),
            ("/net:[1]", None),
            ("net:[1] (deleted)", None),
            ("socket:[1]", None),
        ] {
            assert_eq!(namespace_inode(Path::new(target)), inode, "{target}");
        }
    }

    #[test]
    fn a_search_ends_when_its_time_is_over_and_the_next_goes_on_there() {
        let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
        // Another thread of this process leads there.
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || ended.recv());
        let once = |time| {
            let mut is_found = false;
            let limits = SearchLimits { time, ..SearchLimits::COMMAND };
            let is_complete = search(
                limits,
                || None,
                |inode| inode == own,
                |_| {
                    is_found = true;
                    true
                },
            );
            (is_complete, is_found)
        };
        assert_eq!(once(Duration::from_secs(30)), (true, true));
        // One process at a time.
        let processes = numbered(Path::new("/proc")).count();
        let searches = (0..).take_while(|_| once(Duration::ZERO) == (false, false)).count();
        println!("found after {searches} searches of one of {processes} processes");
        assert!(searches < 10 * processes, "{searches}");
        if processes > 2 {
            NEXT_PROCESS.store(0, Ordering::Relaxed);
            assert!(once(Duration::ZERO) == (false, false) || once(Duration::ZERO) == (false, false));
        }
        drop(end);
        let _ = other.join();
    }

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
}
