//! What the guard's thread does: which network namespace it takes next, and when, and what it reports.
//!
//! Attaching takes some 9 ms with the kernel's lock for network configuration held (`tcx_entry_sync`, include/net/tcx.h
//! at v6.6), so the thread rests after each device: nineteen times as long as that took, and half a second at most. A
//! namespace with several devices takes as many turns. A link does not keep a namespace alive.

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
    netns::{Attempt, GuardedNetns, Seen, Turn, attach_to_next, in_thread, visit_all},
    queue::{NamespaceQueue, Waiting},
    rules::GuardRules,
    start::{Guard, set_cgroups},
    unguarded::{UnguardedNamespaces, UnguardedNetns, UnguardedReason},
};
use crate::{
    bpf::guard::{Attachment, Disarmed, GuardMethod, GuardProgram},
    sockets::{CURRENT_NETNS, Namespace, NetnsId, netns_owner, netns_owner_at, visit_namespace},
    system::{busy::BusyClock, process::is_gone},
};

/// Time between two walks over all network namespaces.
const WALK_INTERVAL: Duration = Duration::from_secs(20);

/// Time between two looks at the control groups, if there are rules about them.
const CGROUP_INTERVAL: Duration = Duration::from_secs(1);

/// The rest after an attachment, as a multiple of the time that it took.
const REST_FACTOR: u32 = 19;

/// Maximum number of first connects that are taken together, before the next attachment. To find out whose a namespace is
/// takes some 20 µs.
const MAX_TOGETHER: usize = 1_024;

/// The longest rest, so that a slow attachment, or a user with very many devices, which take long to list, delays the
/// next turn by no more. A namespace with a first connect is to be guarded within a second.
const MAX_REST: Duration = Duration::from_millis(500);

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
    /// The daemon's own network namespace. `None`: it could not be entered.
    own: Option<NetnsId>,
    queue: NamespaceQueue<PathBuf>,
    unguarded: UnguardedNamespaces,
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
            own: None,
            queue: NamespaceQueue::default(),
            unguarded: UnguardedNamespaces::default(),
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
                let attachments = own.keep();
                attachments.iter().for_each(|_| _ = work.queue.take_room(0));
                // The first walk looks for more.
                let own = GuardedNetns { attachments, is_complete: true, ..GuardedNetns::new(0) };
                work.guarded.insert(id, own);
                work.own = Some(id);
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
    pub(super) fn run(mut self, first_connects: &Receiver<FirstConnect>, busy: &BusyClock) {
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
            // All at once, so that the next turn is among the namespaces of all owners that wait.
            for first in first_connects.try_iter().take(MAX_TOGETHER) {
                self.on_first_connect(&first);
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
            busy.rest();
            let received = first_connects.recv_timeout(wake_at.saturating_duration_since(Instant::now()));
            busy.begin();
            match received {
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
        // One that waits for another device is moved ahead. Without a cookie it may be another namespace with the inode
        // of one that was guarded: its turn finds out.
        let is_guarded = id.cookie != 0 && self.guarded.get(&id).is_some_and(|known| known.is_complete);
        if self.is_own_only || is_guarded {
            return;
        }
        let path = PathBuf::from(format!("/proc/{tid}/ns/net"));
        // If the thread has ended, or is in another namespace by now, the next walk may find this one.
        let Some((_, owner)) = netns_owner_at(&path).ok().filter(|(inode, _)| *inode == u64::from(netns))
        else {
            return;
        };
        if !self.queue.push(Waiting { id, owner, path: path.clone(), connects: true })
            && !self.is_guarded_without_cookie(id, &path)
        {
            self.unguarded.insert(id, owner, UnguardedReason::NoRoom);
        }
    }

    /// True if this namespace, which has no cookie, is guarded. False also for another one with the same inode.
    fn is_guarded_without_cookie(&self, id: NetnsId, path: &Path) -> bool {
        let Some(known) = self.guarded.get(&id).filter(|known| id.cookie == 0 && known.is_complete) else {
            return false;
        };
        let program = &self.program;
        let looked = in_thread(|| {
            let mut is_guarded = false;
            visit_namespace(path, |namespace| {
                is_guarded = namespace.id == id && known.is_there(program)?;
                Ok(())
            })?;
            Ok(is_guarded)
        });
        looked.flatten().unwrap_or(false)
    }

    /// Attaches the program to one more device of a namespace.
    fn guard(&mut self, next: Waiting<PathBuf>) {
        let (program, method, known) = (&self.program, self.method, self.guarded.get(&next.id));
        let mut took = Duration::ZERO;
        let turn = in_thread(|| {
            let mut turn = Err(io::ErrorKind::NotFound.into());
            visit_namespace(&next.path, |namespace| {
                if namespace.id == next.id {
                    let began = Instant::now();
                    turn = attach_to_next(program, method, known, next.id.cookie != 0);
                    took = began.elapsed();
                }
                Ok(())
            })?;
            turn
        })
        .flatten();
        self.rests_until = Instant::now() + (took * REST_FACTOR).min(MAX_REST);
        let (id, owner) = (next.id, next.owner);
        match turn {
            Ok(Turn { outcome, has_more, is_another }) => {
                if is_another && let Some(old) = self.guarded.remove(&id) {
                    self.queue.give_back(old.owner, old.attachments.len());
                    self.unguarded.remove(id);
                }
                let known = self.guarded.entry(id).or_insert_with(|| GuardedNetns::new(owner));
                let mut has_failed = !known.failed.is_empty();
                match outcome {
                    Attempt::Attached(attachment) => known.attachments.push(attachment),
                    Attempt::Failed(device, error) => {
                        let why = UnguardedReason::NotAttached(format!("{}: {error}", device.name));
                        known.failed.push(device);
                        has_failed = true;
                        self.failures += 1;
                        self.queue.give_back(owner, 1);
                        self.unguarded.insert(id, owner, why);
                    }
                    Attempt::Nothing => self.queue.give_back(owner, 1),
                }
                known.is_complete = !has_more && !has_failed && !known.attachments.is_empty();
                if known.is_complete {
                    self.unguarded.on_attached(id);
                } else if known.attachments.is_empty() {
                    // Not even on the loopback device.
                    self.guarded.remove(&id);
                } else if has_more
                    // What connects there does so on the device that is guarded first.
                    && (known.is_full() || !self.queue.push(Waiting { connects: false, ..next }))
                {
                    self.unguarded.insert(id, owner, UnguardedReason::NoRoom);
                }
            }
            // It has ended, or its process has. The next walk finds it again if it still exists.
            Err(error) if has_no_way(&error) => {
                self.queue.give_back(owner, 1);
                if self.guarded.get(&id).is_some_and(|known| !known.is_complete) {
                    let why = UnguardedReason::NotEntered("nothing leads to it any more".to_owned());
                    self.unguarded.insert(id, owner, why);
                }
            }
            Err(error) => {
                self.queue.give_back(owner, 1);
                self.failures += 1;
                self.unguarded.insert(id, owner, UnguardedReason::NotAttached(error.to_string()));
            }
        }
    }

    /// Enters every namespace: looks whether the program is still attached and first in the ones that are guarded, and
    /// enqueues the others, and those with a new device.
    fn walk(&mut self) {
        let (mut new, mut looked, mut released) = (Vec::new(), Vec::new(), Vec::new());
        let (guarded, program, is_own_only) = (&mut self.guarded, &self.program, self.is_own_only);
        let visit = in_thread(|| {
            visit_all(is_own_only, |namespace: &Namespace| {
                let Some(known) = guarded.get_mut(&namespace.id) else {
                    new.push((namespace.clone(), netns_owner()));
                    return Ok(());
                };
                let before = known.attachments.len();
                let seen = known.look(program);
                // Without cookies this may be another namespace that has the same inode.
                let is_taken_off = matches!(seen, Ok(Seen { disarmed: Some(Disarmed::TakenOff), .. }));
                if namespace.id.cookie == 0 && !namespace.is_current && is_taken_off {
                    released.push((known.owner, before - known.attachments.len()));
                    new.push((namespace.clone(), netns_owner()));
                    return Ok(());
                }
                looked.push((namespace.clone(), known.owner, seen));
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
                queue.give_back(known.owner, known.attachments.len());
            }
            !has_ended
        });
        self.unguarded.on_walk(is_found);
        for (owner, ended) in released {
            self.queue.give_back(owner, ended);
        }
        for (namespace, owner, seen) in looked {
            self.on_looked(namespace, owner, seen);
        }
        for (inode, error) in visit.unentered {
            let known = self.guarded.iter().find(|(id, _)| id.inode == inode);
            let (id, owner) =
                known.map_or((NetnsId { inode, cookie: 0 }, 0), |(id, known)| (*id, known.owner));
            self.unguarded.insert(id, owner, UnguardedReason::NotEntered(error));
        }
        for (namespace, owner) in new {
            if let Some(old) = self.guarded.remove(&namespace.id) {
                self.queue.give_back(old.owner, old.attachments.len());
            }
            match owner {
                Ok(owner) => {
                    let Namespace { id, path, .. } = namespace;
                    if !self.queue.push(Waiting { id, owner, path, connects: false }) {
                        self.unguarded.insert(id, owner, UnguardedReason::NoRoom);
                    }
                }
                Err(error) => {
                    self.unguarded.insert(namespace.id, 0, UnguardedReason::Unknown(error.to_string()));
                }
            }
        }
    }

    /// The walk has looked at a namespace in which the program was attached.
    fn on_looked(&mut self, namespace: Namespace, owner: u32, seen: io::Result<Seen>) {
        let Namespace { id, path, .. } = namespace;
        let Seen { disarmed, ended, others } = match seen {
            Ok(seen) => seen,
            Err(error) => {
                return self.unguarded.insert(id, owner, UnguardedReason::Unknown(error.to_string()));
            }
        };
        self.queue.give_back(owner, ended);
        let Some(known) = self.guarded.get_mut(&id) else { return };
        known.is_complete = others == 0;
        let has_room =
            others == 0 || !known.is_full() && self.queue.push(Waiting { id, owner, path, connects: false });
        match disarmed {
            Some(why) => self.unguarded.insert(id, owner, UnguardedReason::Disarmed(why)),
            None if !has_room => self.unguarded.insert(id, owner, UnguardedReason::NoRoom),
            None if others == 0 => self.unguarded.remove(id),
            // Its turn comes.
            None => {}
        }
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

    /// The namespaces in which the program is attached to every device and runs first.
    fn guarded_namespaces(&self) -> impl Iterator<Item = NetnsId> {
        let is_guarded =
            |(id, known): &(&NetnsId, &GuardedNetns)| known.is_complete && !self.unguarded.contains(**id);
        self.guarded.iter().filter(is_guarded).map(|(id, _)| *id)
    }

    fn counts(&self) -> GuardCounts {
        let guarded = self.guarded_namespaces().count();
        // A namespace may be unguarded and wait for another attempt.
        let incomplete = self.guarded.iter().filter(|(_, known)| !known.is_complete).map(|(id, _)| *id);
        let waiting: HashSet<NetnsId> = self.queue.ids().chain(incomplete).collect();
        let waiting = waiting.into_iter().filter(|id| !self.unguarded.contains(*id)).count();
        let unguarded = self.unguarded.count() + waiting;
        GuardCounts { guarded, unguarded, failures: self.failures }
    }

    fn detach_all(self) {
        match self.method {
            GuardMethod::Tcx => self.close_links(),
            GuardMethod::Clsact => self.remove_filters(),
        }
    }

    /// Closes the links: that of the daemon's own network namespace first, then root's. For these the end of the daemon
    /// waits a moment, and not for those of users, of which there may be hundreds. The kernel closes what is left when
    /// the process exits.
    fn close_links(self) {
        let Self { guarded, own, reports, .. } = self;
        let mut guarded: Vec<(NetnsId, GuardedNetns)> = guarded.into_iter().collect();
        guarded.sort_by_key(|(id, known)| (known.owner != 0, Some(*id) != own));
        let of_users = guarded.split_off(guarded.partition_point(|(_, known)| known.owner == 0));
        drop(guarded);
        drop(reports);
        drop(of_users);
    }

    /// Removes the filters, which would stay when this process ends.
    fn remove_filters(mut self) {
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

/// True if there is no way into a network namespace any more: it has ended, or its process has, or will be a zombie.
fn has_no_way(error: &io::Error) -> bool {
    is_gone(error) || error.kind() == io::ErrorKind::PermissionDenied
}
