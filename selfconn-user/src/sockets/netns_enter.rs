//! Enters one network namespace, on a thread of its own.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    panic,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::{
    netns::{NEEDS_ADMIN, NetnsId, open},
    netns_search::{Lead, SearchLimits, mount_points, search},
    netns_selection::CURRENT_NETNS,
};
use crate::system::netns_cookie;

/// How long a thread does not search all descriptors again for a namespace to which none led, and how many namespaces
/// it remembers. Such a search visits every process of the host, and anybody can make hundreds of namespaces that only
/// a socket keeps.
const UNFOUND_TIME: Duration = Duration::from_secs(60);
const MAX_UNFOUND: usize = 4_096;

thread_local! {
    /// When the calling thread has searched in vain.
    static UNFOUND: RefCell<HashMap<NetnsId, Instant>> = RefCell::default();
}

/// Calls `work` on a separate thread that is in this network namespace; the namespace of the caller does not change.
/// The search for the namespace begins with the namespace of the caller, continues with those of the processes or
/// threads in `netns_hints`, and then with all others as in [`super::netns::visit`]. The inode 0 is the namespace of
/// the caller, because a kernel without namespaces reports no inode.
///
/// # Errors
/// If the namespace cannot be found or entered, or has ended, and the errors of `work`.
pub fn run_in_namespace<T: Send>(
    netns: NetnsId,
    netns_hints: &[u32],
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let is_recent = |at: &Instant| at.elapsed() < UNFOUND_TIME;
    let is_unfound = UNFOUND.with_borrow(|unfound| unfound.get(&netns).is_some_and(is_recent));
    let was_in_vain = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespace".to_owned());
        let thread = thread.spawn_scoped(scope, || {
            enter(netns.inode, netns_hints, !is_unfound, &was_in_vain)?;
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
    });
    if was_in_vain.into_inner() {
        UNFOUND.with_borrow_mut(|unfound| {
            if unfound.len() >= MAX_UNFOUND {
                unfound.retain(|_, at| is_recent(at));
            }
            if unfound.len() < MAX_UNFOUND {
                unfound.insert(netns, Instant::now());
            }
        });
    }
    outcome
}

/// Checks that the calling thread may enter namespaces: it enters the namespace that it is already in.
pub(super) fn may_enter() -> io::Result<()> {
    let (file, _) = open(Path::new(CURRENT_NETNS))?.ok_or(io::ErrorKind::NotFound)?;
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// `searches_all`: also looks at all threads and descriptors. `was_in_vain` is set if none of them leads there.
fn enter(netns: u32, netns_hints: &[u32], searches_all: bool, was_in_vain: &AtomicBool) -> io::Result<()> {
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
    let mut refusal = None;
    for path in all.filter(|path| leads_there(path)) {
        let opened = match open(&path) {
            // The process has ended. Another one may lead there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // It may not be looked at, or ends just now.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refusal = Some(error);
                None
            }
            opened => opened?,
        };
        if let Some((file, opened)) = opened
            && opened.ino() == u64::from(netns)
        {
            let entered = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
            return entered.map_err(|error| refused(netns, error));
        }
    }
    let is_wanted = |inode: u64| inode == u64::from(netns);
    let (mut outcome, mut is_complete) = (None, true);
    if searches_all {
        is_complete = search(
            SearchLimits::ONE,
            || None,
            is_wanted,
            |Lead { path, .. }| {
                let Ok(Some((file, opened))) = open(path) else { return false };
                if !is_wanted(opened.ino()) {
                    return false;
                }
                outcome = Some(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)));
                true
            },
        );
    }
    if let Some(entered) = outcome {
        return entered.map_err(|error| refused(netns, error));
    }
    was_in_vain.store(searches_all, Ordering::Relaxed);
    if let Some(error) = refusal {
        return Err(error);
    }
    let mut why = format!("no process, descriptor or mount leads to network namespace {netns}");
    if !is_complete {
        why += ", as far as a search came in its time";
    }
    Err(io::Error::new(io::ErrorKind::NotFound, why))
}

fn refused(netns: u32, error: Errno) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("network namespace {netns}: {error}{NEEDS_ADMIN}"))
}
