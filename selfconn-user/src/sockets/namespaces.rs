//! Every network namespace of this host, each entered once by the calling thread.

use std::{
    collections::{BTreeMap, HashSet},
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

use super::NEEDS_PTRACE;

const OWN: &str = "/proc/thread-self/ns/net";

const NEEDS_ADMIN: &str = ": entering it needs CAP_SYS_ADMIN, which root has";

/// The file system that namespaces are files of: include/uapi/linux/magic.h at v5.10.
const NSFS_MAGIC: FsWord = 0x6e73_6673;

/// How the visit went.
#[derive(Debug, Default)]
pub(super) struct Visited {
    /// Where `each` succeeded.
    pub(super) namespaces: HashSet<u32>,
    /// What could not be visited, and why.
    pub(super) unseen: Vec<String>,
}

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode.
    pub inode: u32,
    /// By which file it was entered: one that is mounted, or a process's.
    pub path: PathBuf,
    /// Whether it is the one this process is in.
    pub is_own: bool,
}

/// Calls `each` in the calling thread's own network namespace, which takes no privilege.
pub(super) fn visit_own(mut each: impl FnMut(&Namespace) -> io::Result<()>) -> Visited {
    let mut visit = Visit::default();
    visit.one(Path::new(OWN), Source::Own, &mut each);
    visit.done()
}

/// Calls `each` in the network namespace that this file is of. The thread stays there.
pub(super) fn visit_at(
    path: &Path,
    mut each: impl FnMut(&Namespace) -> io::Result<()>,
) -> io::Result<Visited> {
    let mut visit = Visit::default();
    match visit.try_one(path, Source::Named, &mut each)? {
        true => Ok(visit.done()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a network namespace")),
    }
}

/// Calls `each` in every network namespace: first in the calling thread's own, which takes no privilege, then in those
/// that are mounted somewhere (`/run/netns` and the like), then in those of the processes, and of the threads `near`.
/// The thread stays in the last one. What vanishes meanwhile is no error.
pub(super) fn visit(near: &[u32], mut each: impl FnMut(&Namespace) -> io::Result<()>) -> Visited {
    let mut visit = Visit::default();
    visit.one(Path::new(OWN), Source::Own, &mut each);
    for path in mounted(&fs::read("/proc/self/mountinfo").unwrap_or_default()) {
        visit.one(&path, Source::Mount, &mut each);
    }
    match fs::read_dir("/proc") {
        Ok(entries) => {
            for entry in entries.flatten() {
                if entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                    visit.one(&entry.path().join("ns/net"), Source::Process, &mut each);
                }
            }
        }
        Err(error) => visit.refused(format!("the network namespaces of processes: /proc: {error}"), None),
    }
    // A thread's directory is there by its number, too; it is only never listed.
    for thread in near {
        visit.one(&PathBuf::from(format!("/proc/{thread}/ns/net")), Source::Process, &mut each);
    }
    visit.done()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Own,
    Mount,
    Process,
    /// By the user.
    Named,
}

#[derive(Default)]
struct Visit {
    /// Device and inode of those that were visited, or refused for good.
    known: HashSet<(u64, u64)>,
    namespaces: HashSet<u32>,
    /// Processes whose namespace this process may not even know.
    closed_processes: usize,
    /// Why, how many, and the first of them.
    refused: BTreeMap<String, (usize, Option<String>)>,
}

impl Visit {
    fn one(&mut self, path: &Path, source: Source, each: &mut impl FnMut(&Namespace) -> io::Result<()>) {
        match self.try_one(path, source, each) {
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) if source == Source::Process && error.kind() == io::ErrorKind::PermissionDenied => {
                // A process that has ended is told in the same way (`proc_ns_get_link`, fs/proc/namespaces.c at v5.10).
                self.closed_processes += usize::from(path.ancestors().nth(2).is_some_and(Path::exists));
            }
            Err(error) => self.refused(error.to_string(), Some(path.display().to_string())),
        }
    }

    /// Whether it is a namespace at all.
    fn try_one(
        &mut self,
        path: &Path,
        source: Source,
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
        let is_own = source == Source::Own
            || fs::metadata(OWN).is_ok_and(|own| (own.dev(), own.ino()) == (opened.dev(), opened.ino()));
        let inode = opened.ino();
        let told = |error: io::Error, cure| {
            (error.to_string() + cure, Some(format!("{inode} ({})", path.display())))
        };
        if !is_own
            && let Err(error) = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        {
            let (why, which) = told(error.into(), NEEDS_ADMIN);
            if source == Source::Named {
                return Err(io::Error::other(why));
            }
            self.refused(why, which);
            return Ok(true);
        }
        let netns = u32::try_from(inode).unwrap_or(0);
        match each(&Namespace { inode: netns, path: path.to_owned(), is_own }) {
            Ok(()) => {
                self.namespaces.insert(netns);
            }
            Err(error) if source == Source::Named => return Err(error),
            Err(error) => {
                let (why, which) = told(error, "");
                self.refused(why, which);
            }
        }
        Ok(true)
    }

    fn refused(&mut self, why: String, which: Option<String>) {
        self.refused.entry(why).or_insert((0, which)).0 += 1;
    }

    fn done(self) -> Visited {
        let mut unseen: Vec<_> = self
            .refused
            .into_iter()
            .map(|(why, refused)| match refused {
                (_, None) => why,
                (1, Some(which)) => format!("network namespace {which}: {why}"),
                (count, Some(first)) => format!("{count} network namespaces, the first {first}: {why}"),
            })
            .collect();
        match self.closed_processes {
            0 => {}
            count => unseen.push(format!("network namespaces of processes ({count}): {NEEDS_PTRACE}")),
        }
        Visited { namespaces: self.namespaces, unseen }
    }
}

/// Calls `work` on a thread that is in one network namespace, known by its inode; the caller's stays what it is. It is
/// looked for by the caller's own, by the processes or threads `near` it, and then as [`visit`] does. 0 is the caller's own: a kernel
/// without namespaces tells no inode.
///
/// # Errors
/// When nothing leads to that namespace or it can't be entered, and those of `work`.
pub fn within<T: Send>(
    netns: u32,
    near: &[u32],
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespace".to_owned());
        let thread = thread.spawn_scoped(scope, || {
            enter(netns, near)?;
            work()
        })?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// Whether the calling thread may enter namespaces at all: it enters the one it is in.
pub(super) fn may_enter() -> io::Result<()> {
    let (file, _) = open(Path::new(OWN))?.ok_or(io::ErrorKind::NotFound)?;
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn enter(netns: u32, near: &[u32]) -> io::Result<()> {
    let leads_there = |path: &Path| fs::metadata(path).is_ok_and(|named| named.ino() == u64::from(netns));
    // Without a step there is no privilege needed.
    if netns == 0 || leads_there(Path::new(OWN)) {
        return Ok(());
    }
    let of_process = |pid: &u32| PathBuf::from(format!("/proc/{pid}/ns/net"));
    let near = near.iter().map(of_process);
    let mounts = std::iter::once_with(|| mounted(&fs::read("/proc/self/mountinfo").unwrap_or_default()));
    let processes = std::iter::once_with(|| fs::read_dir("/proc").into_iter().flatten().flatten());
    let all =
        near.chain(mounts.flatten()).chain(processes.flatten().map(|entry| entry.path().join("ns/net")));
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

/// Opens a network namespace. `None`: by now the process is another one, or something else is mounted there.
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

/// Where network namespaces are mounted, from the text of `/proc/self/mountinfo`.
pub(super) fn mounted(mountinfo: &[u8]) -> Vec<PathBuf> {
    let mounted = |line: &[u8]| {
        // id, parent, device, what of the file system is mounted, where.
        let mut fields = line.split(|byte| *byte == b' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        root.starts_with(b"net:[").then(|| PathBuf::from(OsString::from_vec(unescape(at))))
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(mounted).collect()
}

/// A path as the kernel writes it, blanks, line ends and backslashes as three octal digits.
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
    fn mounted_namespaces_are_found_wherever_they_are() {
        let mountinfo = b"24 1 0:21 / /proc rw,nosuid - proc proc rw\n\
            31 25 0:4 net:[4026532281] /run/netns/blue rw shared:12 - nsfs nsfs rw\n\
            32 25 0:4 net:[4026532282] /run/docker/netns/a\\040b\\134c rw - nsfs nsfs rw\n\
            33 25 0:4 mnt:[4026532283] /run/ns/mnt rw - nsfs nsfs rw\n\
            34 25 0:22 /net:[1] /odd rw - tmpfs tmpfs rw\n\
            \n\
            broken";
        assert_eq!(mounted(mountinfo), [Path::new("/run/netns/blue"), Path::new("/run/docker/netns/a b\\c")]);
    }

    #[test]
    fn escapes_are_undone_once() {
        for (raw, path) in
            [("/a\\040b", "/a b"), ("/a\\134040", "/a\\040"), ("/a\\9", "/a\\9"), ("/a\\", "/a\\"), ("", "")]
        {
            assert_eq!(unescape(raw.as_bytes()), path.as_bytes(), "{raw}");
        }
    }

    #[test]
    fn what_is_refused_alike_is_one_line() {
        let mut visit = Visit { closed_processes: 7, namespaces: [1].into(), ..Visit::default() };
        visit.refused("no".to_owned(), Some("1 (/a)".to_owned()));
        visit.refused("no".to_owned(), Some("2 (/b)".to_owned()));
        visit.refused("never".to_owned(), Some("3 (/c)".to_owned()));
        let Visited { namespaces, unseen } = visit.done();
        assert_eq!(namespaces, HashSet::from([1]));
        assert_eq!(
            unseen[..2],
            ["network namespace 3 (/c): never", "2 network namespaces, the first 1 (/a): no"]
        );
        assert!(unseen[2].contains("(7)") && unseen[2].contains("CAP_SYS_PTRACE"), "{unseen:?}");
        assert!(unseen.len() == 3);
    }
}
