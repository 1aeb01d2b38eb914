//! Finds the network namespaces of this host and enters each one once with the calling thread.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs, io,
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FsWord, OFlags, fstatfs},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use selfconn_ebpf::Endpoint;

use super::{
    netns_owner,
    netns_search::{Lead, NamespaceDescriptors, SearchLimits, mount_points, open_again, search},
    netns_selection::{CURRENT_NETNS, NamespaceSelection},
    netns_turns::{QueuedNamespace, VisitTurns},
};
use crate::system::{netns_cookie, process::is_gone};

/// The hint for processes that this process may not inspect.
pub(super) const NEEDS_PTRACE: &str = "looking into them needs CAP_SYS_PTRACE, which root has";

pub(super) const NEEDS_ADMIN: &str = ": entering it needs CAP_SYS_ADMIN, which root has";

/// The magic number of nsfs, the file system of namespace files: include/uapi/linux/magic.h at v5.10.
const NSFS_MAGIC: FsWord = 0x6e73_6673;

/// The result of a visit.
#[derive(Debug, Default)]
pub struct VisitResult {
    /// The inodes of namespaces that exist, and that nothing leads to.
    pub unfound: BTreeSet<u32>,
    /// The namespaces in which `each` succeeded: inodes and cookies.
    pub namespaces: HashMap<u32, u64>,
    /// The inodes of namespaces that could not be entered, and the reason.
    pub unentered: BTreeMap<u32, String>,
    /// The inodes of namespaces for which there was no time.
    pub unvisited: BTreeSet<u32>,
    /// What could not be visited, and the reason: one line of text for people each.
    pub unseen: Vec<String>,
}

/// The identity of a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    /// The kernel gives it to another namespace when this one has ended.
    pub inode: u32,
    /// Unique until the next boot. 0: unknown.
    pub cookie: u64,
}

impl NetnsId {
    /// False if it is certainly another namespace.
    pub(super) fn may_be(self, other: Self) -> bool {
        self.inode == other.inode && (self.cookie == other.cookie || self.cookie == 0 || other.cookie == 0)
    }
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

/// Calls `each` in the selected namespaces. The thread stays in the last one.
///
/// # Errors
/// If the only requested namespace does not exist, or cannot be entered or read.
pub(super) fn visit_selected(
    selection: Option<&NamespaceSelection>,
    options: VisitOptions<'_>,
    each: impl FnMut(&Namespace) -> io::Result<()>,
) -> io::Result<VisitResult> {
    match selection {
        Some(NamespaceSelection::Current) => Ok(visit_current(each)),
        Some(NamespaceSelection::At(path)) => visit_at(path, each),
        Some(NamespaceSelection::Inode(inode)) => {
            let visited = visit(VisitOptions { only: Some(*inode), ..options }, each);
            if visited.namespaces.is_empty() && visited.unseen.is_empty() {
                let why = format!("no network namespace with the inode {inode} was found");
                return Err(io::Error::new(io::ErrorKind::NotFound, why));
            }
            Ok(visited)
        }
        Some(NamespaceSelection::All) | None => Ok(visit(options, each)),
    }
}

/// Calls `each` in the network namespace of the calling thread, which needs no privilege.
pub(super) fn visit_current(mut each: impl FnMut(&Namespace) -> io::Result<()>) -> VisitResult {
    let mut visit = NamespaceVisit::default();
    visit.visit_path(Path::new(CURRENT_NETNS), NamespaceSource::Current, &mut each);
    visit.finish()
}

/// Calls `each` in the network namespace that this file refers to. The thread stays in it.
///
/// # Errors
/// If the file can't be opened or entered, or is no network namespace, and the errors of `each`.
pub(super) fn visit_at(
    path: &Path,
    mut each: impl FnMut(&Namespace) -> io::Result<()>,
) -> io::Result<VisitResult> {
    let mut visit = NamespaceVisit::default();
    match visit.try_visit(path, path, NamespaceSource::Requested, &mut each)? {
        true => Ok(visit.finish()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a network namespace")),
    }
}

/// Which namespaces [`visit`] visits, and how far it searches for them.
#[derive(Clone, Copy, Default)]
pub(super) struct VisitOptions<'a> {
    /// Threads that may be the only ones in their namespace.
    pub(super) netns_hints: &'a [u32],
    /// Visit only the namespace with this inode.
    pub(super) only: Option<u32>,
    /// The inodes of all namespaces, or of the needed ones. The search ends when all are visited; without, it finds
    /// what it can.
    pub(super) existing: Option<&'a BTreeSet<u32>>,
    /// The order and the time of the visits. `None`: all are visited, as they are found.
    pub(super) turns: Option<VisitTurns<'a>>,
    /// `None`: no search beyond mounts and the leaders of processes.
    pub(super) search: Option<SearchLimits>,
    /// Lists the descriptors that are namespaces. Called if there is anything that no thread leads to.
    pub(super) descriptors: Option<&'a dyn Fn() -> Option<NamespaceDescriptors>>,
}

/// Calls `each` in every network namespace: first in the namespace of the calling thread, which needs no
/// privilege, then in the mounted namespaces (`/run/netns` and others), then in the namespaces of all
/// processes and of the threads in `netns_hints`, then where a search leads to. With `turns`, all but the
/// namespaces of the calling thread and of the first process wait until all are found. The thread stays in the last
/// one. A namespace that disappears meanwhile is not an error.
pub(super) fn visit(
    options: VisitOptions<'_>,
    mut each: impl FnMut(&Namespace) -> io::Result<()>,
) -> VisitResult {
    let netns_hints = options.netns_hints;
    let mut visit = NamespaceVisit { only: options.only, ..NamespaceVisit::default() };
    visit.visit_path(Path::new(CURRENT_NETNS), NamespaceSource::Current, &mut each);
    if options.turns.is_some() {
        visit.visit_path(Path::new("/proc/1/ns/net"), NamespaceSource::Process, &mut each);
        visit.queue = Some(Vec::new());
    }
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
    visit.search(options, &mut each);
    if let (Some(turns), Some(queue)) = (options.turns, visit.queue.take()) {
        visit.unvisited = turns.visit(&queue, |queued| visit.visit_queued(queued, &mut each));
    }
    visit.finish()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NamespaceSource {
    Current,
    Mount,
    Process,
    /// The user named the file.
    Requested,
    /// A search found it.
    Search,
}

#[derive(Default)]
struct NamespaceVisit {
    /// The namespaces that were visited, queued or permanently refused: device by inode. All are on one device, nsfs.
    known: HashMap<u64, u64>,
    /// Visit only the namespace with this inode.
    only: Option<u32>,
    /// `None`: a namespace is visited when it is found.
    queue: Option<Vec<QueuedNamespace>>,
    /// The inodes of namespaces that exist, and that nothing leads to.
    unfound: BTreeSet<u32>,
    /// The inodes of namespaces for which there was no time.
    unvisited: BTreeSet<u32>,
    /// True if the limits of the search ended it.
    is_incomplete: bool,
    namespaces: HashMap<u32, u64>,
    /// The inodes of namespaces that could not be entered, and the reason.
    unentered: BTreeMap<u32, String>,
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
        match self.try_visit(path, path, source, each) {
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

    /// Searches for the namespaces that are not visited yet, and notes those that it did not find.
    fn search(&mut self, options: VisitOptions<'_>, each: &mut impl FnMut(&Namespace) -> io::Result<()>) {
        let visited: HashSet<u64> = self.known.keys().copied().collect();
        let is_selected = |inode: &u32| options.only.is_none_or(|only| only == *inode);
        let is_missing = |inode: &u32| is_selected(inode) && !visited.contains(&u64::from(*inode));
        let missing: Option<BTreeSet<u32>> =
            options.existing.map(|existing| existing.iter().copied().filter(is_missing).collect());
        let is_new =
            |inode: &u32| !options.turns.is_some_and(|turns| turns.history.unfound().contains(inode));
        let to_find: Option<HashSet<u64>> = match &missing {
            Some(missing) => Some(missing.iter().copied().filter(is_new).map(u64::from).collect()),
            None => options.only.map(|only| [only].into_iter().filter(is_missing).map(u64::from).collect()),
        };
        if let Some(limits) = options.search
            && to_find.as_ref().is_none_or(|to_find| !to_find.is_empty())
        {
            // Anybody can have many descriptors of many namespaces, so each of them costs one look into a set.
            let to_find = RefCell::new(to_find);
            let is_wanted = |inode: u64| match &*to_find.borrow() {
                Some(to_find) => to_find.contains(&inode),
                None => !visited.contains(&inode),
            };
            let descriptors = || options.descriptors.and_then(|list| list());
            let is_complete = search(limits, descriptors, is_wanted, |Lead { inode, path, shown }| {
                // A namespace that has ended, or that may not be entered, is noted or needs no note.
                if let Err(error) = self.try_visit(path, shown, NamespaceSource::Search, each)
                    && !is_gone(&error)
                {
                    self.add_refusal(error.to_string(), Some(shown.display().to_string()));
                }
                let mut to_find = to_find.borrow_mut();
                let Some(to_find) = &mut *to_find else { return false };
                if self.known.contains_key(inode) {
                    to_find.remove(inode);
                }
                to_find.is_empty()
            });
            self.is_incomplete = !is_complete;
        }
        let is_unknown = |inode: &u32| !self.known.contains_key(&u64::from(*inode));
        self.unfound = missing.unwrap_or_default().into_iter().filter(is_unknown).collect();
    }

    /// Visits the namespace or queues it. Returns false if the file is not a network namespace.
    fn try_visit(
        &mut self,
        path: &Path,
        shown: &Path,
        source: NamespaceSource,
        each: &mut impl FnMut(&Namespace) -> io::Result<()>,
    ) -> io::Result<bool> {
        let named = fs::metadata(path)?;
        let is_other = self.only.is_some_and(|only| u64::from(only) != named.ino());
        if is_other || self.known.get(&named.ino()) == Some(&named.dev()) {
            return Ok(true);
        }
        let opened = open(path).inspect_err(|error| {
            if !is_gone(error) {
                self.unentered.insert(u32::try_from(named.ino()).unwrap_or(0), error.to_string());
            }
        })?;
        let Some((file, opened)) = opened else { return Ok(false) };
        if self.known.insert(opened.ino(), opened.dev()).is_some() {
            return Ok(true);
        }
        if let Some(queue) = &mut self.queue {
            // The file would keep the namespace.
            let (owner, path) = (netns_owner::payer(&file), shown.to_owned());
            queue.push(QueuedNamespace { inode: opened.ino(), owner, path, source });
            return Ok(true);
        }
        self.enter(&file, &opened, shown, source, each)?;
        Ok(true)
    }

    /// Visits a namespace whose turn it is. If its file leads to another one by now, it is none that is known.
    fn visit_queued(
        &mut self,
        queued: &QueuedNamespace,
        each: &mut impl FnMut(&Namespace) -> io::Result<()>,
    ) {
        let QueuedNamespace { inode, path, source, .. } = queued;
        let opened = match source {
            NamespaceSource::Search => open_again(path, *inode),
            _ => open(path),
        };
        let entered = match opened {
            Ok(Some((file, opened))) if opened.ino() == *inode => {
                self.enter(&file, &opened, path, *source, each)
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = entered
            && !is_gone(&error)
        {
            self.add_refusal(error.to_string(), Some(path.display().to_string()));
        }
    }

    /// Calls `each` in this namespace.
    ///
    /// # Errors
    /// If the user named the file, and it can't be entered, or `each` fails.
    fn enter(
        &mut self,
        file: &fs::File,
        opened: &fs::Metadata,
        shown: &Path,
        source: NamespaceSource,
        each: &mut impl FnMut(&Namespace) -> io::Result<()>,
    ) -> io::Result<()> {
        let is_current = source == NamespaceSource::Current
            || fs::metadata(CURRENT_NETNS)
                .is_ok_and(|current| (current.dev(), current.ino()) == (opened.dev(), opened.ino()));
        let inode = opened.ino();
        let describe = |error: io::Error, hint| {
            (error.to_string() + hint, Some(format!("{inode} ({})", shown.display())))
        };
        if !is_current
            && let Err(error) = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        {
            let (why, which) = describe(error.into(), NEEDS_ADMIN);
            if source == NamespaceSource::Requested {
                return Err(io::Error::other(why));
            }
            self.unentered.insert(u32::try_from(inode).unwrap_or(0), why.clone());
            self.add_refusal(why, which);
            return Ok(());
        }
        let id = NetnsId {
            inode: u32::try_from(inode).unwrap_or(0),
            cookie: netns_cookie::current().unwrap_or(0),
        };
        match each(&Namespace { id, path: shown.to_owned(), is_current }) {
            Ok(()) => {
                self.namespaces.insert(id.inode, id.cookie);
                self.unentered.remove(&id.inode);
            }
            Err(error) if source == NamespaceSource::Requested => return Err(error),
            Err(error) => {
                let (why, which) = describe(error, "");
                self.add_refusal(why, which);
            }
        }
        Ok(())
    }

    fn add_refusal(&mut self, why: String, which: Option<String>) {
        self.refused.entry(why).or_insert((0, which)).0 += 1;
    }

    fn finish(mut self) -> VisitResult {
        let mut unseen: Vec<_> = std::mem::take(&mut self.refused)
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
        if !self.unfound.is_empty() {
            unseen.push(unfound_text(&self.unfound, self.is_incomplete));
        } else if self.is_incomplete {
            unseen.push(
                "network namespaces that only an open descriptor leads to: there are too many descriptors, or \
                 tables of them"
                    .into(),
            );
        }
        if !self.unvisited.is_empty() {
            unseen.push(unvisited_text(&self.unvisited));
        }
        let Self { namespaces, unentered, unfound, unvisited, .. } = self;
        VisitResult { unfound, namespaces, unentered, unvisited, unseen }
    }
}

/// One line of text about namespaces that exist, and that nothing leads to.
fn unfound_text(inodes: &BTreeSet<u32>, is_incomplete: bool) -> String {
    let why = match is_incomplete {
        true => "there are too many descriptors, or tables of them, to look for a way to",
        false => "no process, descriptor or mount leads to",
    };
    format!("network namespaces ({}): {why} {}", inodes.len(), named(inodes))
}

/// One line of text about namespaces for which there was no time.
fn unvisited_text(inodes: &BTreeSet<u32>) -> String {
    let (count, named) = (inodes.len(), named(inodes));
    format!("network namespaces ({count}): there was no time for {named}; they are among the next to be read")
}

/// The first of these inodes, and the number of the others.
fn named(inodes: &BTreeSet<u32>) -> String {
    const MAX_NAMED: usize = 8;
    let named: Vec<_> = inodes.iter().take(MAX_NAMED).map(ToString::to_string).collect();
    let more = match inodes.len() - named.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    named.join(", ") + &more
}

/// Opens a network namespace. `None`: the file is not a namespace, because the process or the mount has
/// changed.
pub(super) fn open(path: &Path) -> io::Result<Option<(fs::File, fs::Metadata)>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    if fstatfs(&file)?.f_type != NSFS_MAGIC {
        return Ok(None);
    }
    let opened = file.metadata()?;
    Ok(Some((file, opened)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_that_nothing_leads_to_are_named_as_far_as_there_is_room() {
        let inodes = |count| (1..=count).collect::<BTreeSet<u32>>();
        assert_eq!(
            unfound_text(&inodes(2), false),
            "network namespaces (2): no process, descriptor or mount leads to 1, 2"
        );
        let many = unfound_text(&inodes(12), true);
        assert!(
            many.contains("(12)") && many.ends_with(" 8 and 4 more") && many.contains("too many"),
            "{many}"
        );
        assert!(unvisited_text(&inodes(12)).contains("(12): there was no time for 1, 2, "));
    }

    #[test]
    fn refusals_with_the_same_reason_are_one_line() {
        let mut visit =
            NamespaceVisit { denied_processes: 7, namespaces: [(1, 5)].into(), ..NamespaceVisit::default() };
        visit.add_refusal("no".to_owned(), Some("1 (/a)".to_owned()));
        visit.add_refusal("no".to_owned(), Some("2 (/b)".to_owned()));
        visit.add_refusal("never".to_owned(), Some("3 (/c)".to_owned()));
        let VisitResult { namespaces, unseen, .. } = visit.finish();
        assert_eq!(namespaces, HashMap::from([(1, 5)]));
        assert_eq!(
            unseen[..2],
            ["network namespace 3 (/c): never", "2 network namespaces, the first 1 (/a): no"]
        );
        assert!(unseen[2].contains("(7)") && unseen[2].contains("CAP_SYS_PTRACE"), "{unseen:?}");
        assert!(unseen.len() == 3);
    }
}
