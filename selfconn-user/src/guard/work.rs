//! What the guard's thread does: which network namespace it takes next, and when, and what it reports.
//!
//! Attaching takes some 9 ms with the kernel's lock for network configuration held (`tcx_entry_sync`,
//! include/net/tcx.h at v6.6), so the thread rests after each, and holds the lock for at most a twentieth of the time. A
//! link does not keep a namespace alive.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use selfconn_ebpf::{Endpoint, guard::FirstConnect};
use tokio::sync::mpsc as mpsc_async;

use super::{
    netns::{GuardedNetns, REST_FACTOR, attach_to_new_devices, in_thread, look, visit_all},
    queue::{NamespaceQueue, Waiting},
    rules::GuardRules,
    start::{Guard, set_cgroups},
    unguarded::{UnguardedNamespaces, UnguardedNetns, UnguardedReason},
};
use crate::{
    bpf::guard::{Attachment, Disarmed, GuardMethod, GuardProgram},
    sockets::{CURRENT_NETNS, Namespace, NetnsId, netns_owner, netns_owner_at, visit_namespace},
    system::{process::is_gone, rtnetlink},
};

/// Time between two walks over all network namespaces.
const WALK_INTERVAL: Duration = Duration::from_secs(20);

/// Time between two looks at the control groups, if there are rules about them.
const CGROUP_INTERVAL: Duration = Duration::from_secs(1);

/// What has changed.
#[derive(Debug, Default)]
pub struct GuardReport {
    /// Network namespaces that are not guarded.
    pub unguarded: Vec<UnguardedNetns>,
    pub counts: GuardCounts,
    /// All that are guarded.
    pub guarded: HashSet<NetnsId>,
}

/// How many network namespaces there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardCounts {
    pub guarded: usize,
    pub unguarded: usize,
    /// Attempts to attach that failed.
    pub failures: u64,
}

/// The state of the thread.
pub(super) struct GuardWork {
    program: GuardProgram,
    method: GuardMethod,
    rules: GuardRules,
    guarded: HashMap<NetnsId, GuardedNetns>,
    queue: NamespaceQueue<PathBuf>,
    unguarded: UnguardedNamespaces,
    /// Namespaces that the last walk found and that are neither guarded nor in `unguarded`, which has no room for them.
    beyond: usize,
    failures: u64,
    is_own_only: bool,
    reports: mpsc_async::Sender<GuardReport>,
    reported: GuardCounts,
    reported_guarded: HashSet<NetnsId>,
    /// Until then nothing is attached.
    rests_until: Instant,
}

impl GuardWork {
    pub(super) fn new(guard: Guard, reports: mpsc_async::Sender<GuardReport>) -> Self {
        let Guard { program, method, rules, own, is_own_only, .. } = guard;
        let mut work = Self {
            program,
            method,
            rules,
            guarded: HashMap::new(),
            queue: NamespaceQueue::default(),
            unguarded: UnguardedNamespaces::default(),
            beyond: 0,
            failures: 0,
            is_own_only,
            reports,
            reported: GuardCounts::default(),
            reported_guarded: HashSet::new(),
            rests_until: Instant::now(),
        };
        let mut id = None;
        let visited = in_thread(|| {
            visit_namespace(Path::new(CURRENT_NETNS), |namespace| {
                id = Some(namespace.id);
                Ok(())
            })
        });
        match (id, visited.flatten()) {
            (Some(id), Ok(_)) => {
                work.queue.push(Waiting { id, owner: 0, path: PathBuf::new() }, false);
                work.queue.pop();
                work.guarded.insert(id, GuardedNetns { owner: 0, attachments: own.keep() });
            }
            // `own` detaches the program; the walk attaches it again.
            (_, visited) => {
                let error = visited.err().map(|error| error.to_string()).unwrap_or_default();
                log::warn!("the guard can't enter the daemon's network namespace: {error}");
            }
        }
        work
    }

    /// Ends with the senders of first connects.
    pub(super) fn run(mut self, first_connects: &Receiver<FirstConnect>) {
        let (mut walk_at, mut cgroups_at) = (Instant::now(), Instant::now() + CGROUP_INTERVAL);
        let mut cgroup_error = None;
        loop {
            if walk_at <= Instant::now() {
                self.walk();
                walk_at = Instant::now() + WALK_INTERVAL;
            }
            if self.rules.has_names() && cgroups_at <= Instant::now() {
                let error =
                    set_cgroups(&mut self.program, &self.rules).err().map(|error| format!("{error:#}"));
                if let Some(error) = &error
                    && Some(error) != cgroup_error.as_ref()
                {
                    log::warn!("the control groups of --guard-except and --guard-only can't be set: {error}");
                }
                cgroup_error = error;
                cgroups_at = Instant::now() + CGROUP_INTERVAL;
            }
            if self.rests_until <= Instant::now()
                && let Some(next) = self.queue.pop()
            {
                self.guard(next);
            }
            self.report();
            let mut wake_at = walk_at;
            if self.rules.has_names() {
                wake_at = wake_at.min(cgroups_at);
            }
            if !self.queue.is_empty() {
                wake_at = wake_at.min(self.rests_until);
            }
            match first_connects.recv_timeout(wake_at.saturating_duration_since(Instant::now())) {
                Ok(first) => self.on_first_connect(&first),
                Err(RecvTimeoutError::Disconnected) => return self.detach_all(),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// A thread has connected to its own address, and nothing like it was seen in its namespace before.
    fn on_first_connect(&mut self, first: &FirstConnect) {
        let FirstConnect { netns, netns_cookie, tid, .. } = *first;
        let id = NetnsId::from(&Endpoint { netns, netns_cookie, ..Endpoint::UNKNOWN });
        if self.is_own_only || self.guarded.contains_key(&id) {
            return;
        }
        let path = PathBuf::from(format!("/proc/{tid}/ns/net"));
        match netns_owner_at(&path) {
            Ok((inode, owner)) if inode == u64::from(netns) => {
                let waiting = Waiting { id, owner, path };
                if !self.queue.push(waiting, true) {
                    self.unguarded.insert(id, owner, UnguardedReason::NoRoom);
                }
            }
            // The thread has ended, or is in another namespace by now. The next walk may find this one.
            _ => {}
        }
    }

    /// Attaches the program in a namespace.
    fn guard(&mut self, next: Waiting<PathBuf>) {
        let Waiting { id, owner, path } = next;
        let (program, method) = (&self.program, self.method);
        let mut took = Duration::ZERO;
        let outcome = in_thread(|| {
            let mut attachments = Vec::new();
            let visited = visit_namespace(&path, |namespace| {
                if namespace.id != id {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let devices = rtnetlink::loop_devices()?;
                let began = Instant::now();
                let attached = program.attach_all(method, &devices);
                took = began.elapsed();
                // No error of these is one of a namespace that has ended: the thread is in it.
                attachments = attached.map_err(io::Error::other)?.keep();
                Ok(())
            });
            visited.map(|_| attachments)
        })
        .flatten();
        self.rests_until = Instant::now() + took * REST_FACTOR;
        match outcome {
            Ok(attachments) => {
                self.unguarded.remove(id);
                self.guarded.insert(id, GuardedNetns { owner, attachments });
            }
            // It has ended, or its process has. The next walk finds it again if it still exists.
            Err(error) if is_gone(&error) => self.queue.release(owner),
            Err(error) => {
                self.queue.release(owner);
                self.failures += 1;
                self.unguarded.insert(id, owner, UnguardedReason::NotAttached(error.to_string()));
            }
        }
    }

    /// Enters every namespace: looks whether the program is still attached and first in the ones that are guarded, and
    /// enqueues the others.
    fn walk(&mut self) {
        let (mut new, mut looked) = (Vec::new(), Vec::new());
        let (guarded, program, method) = (&mut self.guarded, &self.program, self.method);
        let (rests_until, is_own_only) = (&mut self.rests_until, self.is_own_only);
        let visit = in_thread(|| {
            visit_all(is_own_only, |namespace: &Namespace| {
                match guarded.get_mut(&namespace.id) {
                    Some(known) => {
                        let seen = look(program, known).and_then(|why| {
                            // Without cookies this may be another namespace that has the same inode.
                            let is_other = namespace.id.cookie == 0
                                && !namespace.is_current
                                && why == Some(Disarmed::TakenOff);
                            if !is_other {
                                attach_to_new_devices(program, method, known, rests_until)?;
                            }
                            Ok((why, is_other))
                        });
                        match seen {
                            Ok((_, true)) => new.push((namespace.clone(), Ok(known.owner))),
                            Ok((why, false)) => {
                                looked.push((namespace.id, known.owner, why.map(UnguardedReason::Disarmed)));
                            }
                            Err(error) => {
                                let why = UnguardedReason::Unknown(error.to_string());
                                looked.push((namespace.id, known.owner, Some(why)));
                            }
                        }
                    }
                    None => new.push((namespace.clone(), netns_owner())),
                }
                Ok(())
            })
        })
        .flatten();
        let visit = match visit {
            Ok(visit) => visit,
            Err(error) => {
                return log::warn!("the guard can't look for network namespaces: {error}");
            }
        };
        // A namespace that was not found has ended if its links are detached. A filter ends with it.
        let is_found = |id: NetnsId| {
            visit.namespaces.get(&id.inode) == Some(&id.cookie) || visit.unentered.contains_key(&id.inode)
        };
        let (queue, method) = (&mut self.queue, self.method);
        self.guarded.retain(|id, known| {
            let is_detached = known.attachments.iter().all(Attachment::is_link_detached);
            let has_ended = !is_found(*id) && (is_detached || method == GuardMethod::Clsact);
            if has_ended {
                queue.release(known.owner);
            }
            !has_ended
        });
        self.unguarded.retain(is_found);
        self.beyond = 0;
        for (id, owner, why) in looked {
            match why {
                Some(why) => self.on_unguarded(id, owner, why),
                None => self.unguarded.remove(id),
            }
        }
        for (inode, error) in visit.unentered {
            let known = self.guarded.iter().find(|(id, _)| id.inode == inode);
            let (id, owner) =
                known.map_or((NetnsId { inode, cookie: 0 }, 0), |(id, known)| (*id, known.owner));
            self.on_unguarded(id, owner, UnguardedReason::NotEntered(error));
        }
        for (namespace, owner) in new {
            if let Some(old) = self.guarded.remove(&namespace.id) {
                self.queue.release(old.owner);
            }
            match owner {
                Ok(owner) => {
                    let waiting = Waiting { id: namespace.id, owner, path: namespace.path };
                    if !self.queue.push(waiting, false) {
                        self.on_unguarded(namespace.id, owner, UnguardedReason::NoRoom);
                    }
                }
                Err(error) => {
                    self.on_unguarded(namespace.id, 0, UnguardedReason::Unknown(error.to_string()));
                }
            }
        }
    }

    /// The walk has found a namespace that is not guarded.
    fn on_unguarded(&mut self, id: NetnsId, owner: u32, why: UnguardedReason) {
        self.beyond += usize::from(!self.unguarded.insert(id, owner, why));
    }

    /// Reports what has changed. If the daemon has not taken the reports before, it is reported later.
    fn report(&mut self) {
        let Ok(permit) = self.reports.try_reserve() else { return };
        let (unguarded, counts) = (self.unguarded.take_due(Instant::now()), self.counts());
        let guarded: HashSet<NetnsId> = self.guarded_namespaces().collect();
        // One namespace may have taken the place of another, with the same counts.
        if !unguarded.is_empty() || (counts, &guarded) != (self.reported, &self.reported_guarded) {
            permit.send(GuardReport { unguarded, counts, guarded: guarded.clone() });
            (self.reported, self.reported_guarded) = (counts, guarded);
        }
    }

    /// The namespaces in which the program is attached and runs first.
    fn guarded_namespaces(&self) -> impl Iterator<Item = NetnsId> {
        self.guarded.keys().filter(|id| !self.unguarded.contains(**id)).copied()
    }

    fn counts(&self) -> GuardCounts {
        let guarded = self.guarded_namespaces().count();
        // A namespace may be unguarded and wait for another attempt.
        let waiting = self.queue.ids().filter(|id| !self.unguarded.contains(*id)).count();
        let unguarded = self.unguarded.count() + waiting + self.beyond;
        GuardCounts { guarded, unguarded, failures: self.failures }
    }

    /// Removes what would stay when this process ends: filters. Links end with their descriptors.
    fn detach_all(mut self) {
        if self.method == GuardMethod::Tcx {
            return;
        }
        let (guarded, program, is_own_only) = (&mut self.guarded, &self.program, self.is_own_only);
        let visit = in_thread(|| {
            visit_all(is_own_only, |namespace| {
                let known = guarded.remove(&namespace.id);
                for attachment in known.into_iter().flat_map(|known| known.attachments) {
                    if let Err(error) = program.detach(&attachment) {
                        let (device, inode) = (&attachment.device().name, namespace.id.inode);
                        log::warn!("the guard is left on {device} of network namespace {inode}: {error}");
                    }
                }
                Ok(())
            })
        })
        .flatten();
        match visit {
            Ok(visit) => {
                for why in &visit.unseen {
                    log::warn!("the guard may be left in a network namespace: {why}");
                }
            }
            Err(error) => log::warn!("the guard can't be detached: {error}"),
        }
        for id in self.guarded.keys() {
            log::warn!("network namespace {} was not found any more; its filter may be left", id.inode);
        }
    }
}
