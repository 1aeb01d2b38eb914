//! The thread that attaches the guard to every network namespace, and looks whether it still is there.
//!
//! Attaching takes some 9 ms with the kernel's lock for network configuration held (`tcx_entry_sync`,
//! include/net/tcx.h at v6.6), so the thread rests after each, and holds the lock for at most a twentieth of the time. A
//! namespace is entered by a thread of its own that ends with the visit, and a link does not keep a namespace alive.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::{Duration, Instant},
};

use selfconn_ebpf::{Endpoint, guard::FirstConnect};
use tokio::sync::mpsc as mpsc_async;

use super::{
    queue::{NamespaceQueue, Waiting},
    rules::{GroupRules, GuardRules},
    unguarded::{UnguardedNamespaces, UnguardedNetns, UnguardedReason},
};
use crate::{
    bpf::guard::{Attachment, Disarmed, GuardMethod, GuardProgram, NewAttachments},
    sockets::{
        Namespace, NetnsId, VisitResult, netns_owner, netns_owner_at, visit_namespace, visit_namespaces,
    },
    system::{capabilities, cgroup, rtnetlink},
};

/// The network namespace of the calling thread.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// Time between two walks over all network namespaces.
const WALK_INTERVAL: Duration = Duration::from_secs(20);

/// Time between two looks at the control groups, if there are rules about them.
const CGROUP_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of first connects that wait for the thread.
const MAX_FIRST_CONNECTS: usize = 1_024;

/// Maximum number of reports that wait for the daemon.
const MAX_REPORTS: usize = 64;

/// How long the end of the daemon waits for the end of the thread.
const DETACH_TIMEOUT: Duration = Duration::from_secs(5);

/// The rest after an attachment, as a multiple of the time that it took.
const REST_FACTOR: u32 = 19;

/// What the guard needs at its start.
pub struct Guard {
    program: GuardProgram,
    method: GuardMethod,
    rules: GuardRules,
    /// The program on the devices of this process's network namespace.
    own: NewAttachments,
    /// True if another guard is there.
    is_second: bool,
    /// True to guard no other network namespace.
    is_own_only: bool,
}

/// What has changed.
#[derive(Debug, Default)]
pub struct GuardReport {
    /// Network namespaces that are not guarded.
    pub unguarded: Vec<UnguardedNetns>,
    pub counts: GuardCounts,
}

/// How many network namespaces there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardCounts {
    pub guarded: usize,
    pub unguarded: usize,
    /// Attempts to attach that failed.
    pub failures: u64,
}

/// The daemon's end.
#[derive(Debug)]
pub struct GuardThread {
    /// `None`: the thread is to detach the program and to end.
    first_connects: Option<SyncSender<FirstConnect>>,
    reports: mpsc_async::Receiver<GuardReport>,
    next: Option<GuardReport>,
    has_ended: bool,
    /// Disconnected once the thread has ended.
    end: Receiver<()>,
}

impl Guard {
    /// Sets the rules, and attaches the program in this process's network namespace. `method`: the only one to use.
    ///
    /// # Errors
    /// The reason why this host can't be guarded.
    pub fn start(
        mut program: GuardProgram,
        method: Option<GuardMethod>,
        rules: GuardRules,
        is_own_only: bool,
    ) -> anyhow::Result<Self> {
        for (port, bits) in rules.ports() {
            program.set_port(port, bits)?;
        }
        for (uid, bits) in rules.uids() {
            program.set_uid(uid, bits)?;
        }
        set_cgroups(&mut program, &rules)?;
        let devices = rtnetlink::loop_devices()?;
        let mut refused = Vec::new();
        for candidate in GuardMethod::ALL.into_iter().filter(|one| method.is_none_or(|only| only == *one)) {
            match program.attach_all(candidate, &devices) {
                Ok(own) => {
                    let is_second = own.iter().any(|attachment| program.is_second(attachment));
                    return Ok(Self { program, method: candidate, rules, own, is_second, is_own_only });
                }
                Err(error) => {
                    refused.push(format!("{}: {error}{}", candidate.name(), hint(candidate, &error)));
                }
            }
        }
        anyhow::bail!("the program can't be attached to lo ({})", refused.join("; "))
    }

    #[must_use]
    pub fn method(&self) -> GuardMethod {
        self.method
    }

    /// True if another guard was there first. It refuses; this one goes on when that one ends.
    #[must_use]
    pub fn is_second(&self) -> bool {
        self.is_second
    }
}

/// What helps against this error.
fn hint(method: GuardMethod, error: &io::Error) -> &'static str {
    const ENOENT: i32 = 2;
    const EPERM: i32 = 1;
    match (method, error.raw_os_error()) {
        (GuardMethod::Tcx, _) => "",
        (_, Some(ENOENT)) => ": needs the kernel modules sch_ingress and cls_bpf",
        (_, Some(EPERM)) => ": needs CAP_NET_ADMIN",
        _ => "",
    }
}

fn set_cgroups(program: &mut GuardProgram, rules: &GuardRules) -> anyhow::Result<()> {
    if !rules.by_cgroup() {
        return Ok(());
    }
    let mut groups = GroupRules::default();
    cgroup::visit_named(|group| groups.add(&group, rules.of_group(&group)))?;
    program.set_cgroups(&groups.by_id)
}

impl GuardThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(guard: Guard) -> io::Result<Self> {
        let (first_connects, receiver) = mpsc::sync_channel(MAX_FIRST_CONNECTS);
        let (report_sender, reports) = mpsc_async::channel(MAX_REPORTS);
        let (ended, end) = mpsc::channel();
        capabilities::spawn_restricted("guard", capabilities::GUARD_THREAD, move || {
            let _ended: mpsc::Sender<()> = ended;
            GuardWork::new(guard, report_sender).run(&receiver);
        })?;
        Ok(Self { first_connects: Some(first_connects), reports, next: None, has_ended: false, end })
    }

    /// A namespace has its first connect to its own address.
    pub fn on_first_connect(&self, first: FirstConnect) {
        // Fails if the thread has ended, which `ready` notices, or if too many wait, of which the walk finds the namespaces.
        let _ = self.first_connects.as_ref().map(|requests| requests.try_send(first));
    }

    /// Waits until a report is there, for ever once the thread has ended. Cancel safe.
    pub async fn ready(&mut self) {
        if self.next.is_none() && !self.has_ended {
            self.next = self.reports.recv().await;
            self.has_ended = self.next.is_none();
        }
        if self.next.is_none() {
            std::future::pending::<()>().await;
        }
    }

    pub fn try_report(&mut self) -> Option<GuardReport> {
        self.next.take().or_else(|| self.reports.try_recv().ok())
    }

    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Detaches the program everywhere. Returns when that is done.
    pub async fn stop(&mut self) {
        drop(self.first_connects.take());
        while self.reports.recv().await.is_some() {}
        self.has_ended = true;
    }
}

impl Drop for GuardThread {
    /// Waits until the program is detached, also if the daemon ends by an error.
    fn drop(&mut self) {
        drop(self.first_connects.take());
        if self.end.recv_timeout(DETACH_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("the guard could not be detached in time");
        }
    }
}

/// A guarded namespace.
struct GuardedNetns {
    owner: u32,
    attachments: Vec<Attachment>,
}

/// The state of the thread.
struct GuardWork {
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
    /// Until then nothing is attached.
    rests_until: Instant,
}

impl GuardWork {
    fn new(guard: Guard, reports: mpsc_async::Sender<GuardReport>) -> Self {
        let Guard { program, method, rules, own, is_second: _, is_own_only } = guard;
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
            rests_until: Instant::now(),
        };
        let mut id = None;
        let visited = in_thread(|| {
            visit_namespace(Path::new(OWN_NETNS), |namespace| {
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

    fn run(mut self, first_connects: &Receiver<FirstConnect>) {
        let (mut walk_at, mut cgroups_at) = (Instant::now(), Instant::now() + CGROUP_INTERVAL);
        let mut cgroup_error = None;
        loop {
            if walk_at <= Instant::now() {
                self.walk();
                walk_at = Instant::now() + WALK_INTERVAL;
            }
            if self.rules.by_cgroup() && cgroups_at <= Instant::now() {
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
            if self.rules.by_cgroup() {
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
                            let is_other = namespace.id.cookie == 0 && why == Some(Disarmed::TakenOff);
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
        if !unguarded.is_empty() || counts != self.reported {
            permit.send(GuardReport { unguarded, counts });
            self.reported = counts;
        }
    }

    fn counts(&self) -> GuardCounts {
        // A namespace may be unguarded and attached to, or wait for another attempt.
        let guarded = self.guarded.keys().filter(|id| !self.unguarded.contains(**id)).count();
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

/// Why the program does not run in the namespace of the calling thread.
fn look(program: &GuardProgram, known: &GuardedNetns) -> io::Result<Option<Disarmed>> {
    for attachment in &known.attachments {
        // A device that has ended takes its link along.
        let still_exists =
            || rtnetlink::loop_devices().is_ok_and(|devices| devices.contains(attachment.device()));
        if let Some(why) = program
            .disarmed(attachment)
            .or_else(|error| if still_exists() { Err(error) } else { Ok(None) })?
            && still_exists()
        {
            return Ok(Some(why));
        }
    }
    Ok(None)
}

/// Attaches the program to VRF devices that were made since the last visit.
fn attach_to_new_devices(
    program: &GuardProgram,
    method: GuardMethod,
    known: &mut GuardedNetns,
    rests_until: &mut Instant,
) -> io::Result<()> {
    let devices = rtnetlink::loop_devices()?;
    known.attachments.retain(|attachment| devices.contains(attachment.device()));
    for device in devices {
        let is_attached = known.attachments.iter().any(|attachment| *attachment.device() == device);
        if !is_attached && *rests_until <= Instant::now() {
            let began = Instant::now();
            let attached = program.attach(method, &device);
            *rests_until = Instant::now() + began.elapsed() * REST_FACTOR;
            known.attachments.push(attached?);
        }
    }
    Ok(())
}

/// Calls `each` in every network namespace, or only in that of the calling thread.
fn visit_all(is_own_only: bool, each: impl FnMut(&Namespace) -> io::Result<()>) -> io::Result<VisitResult> {
    if is_own_only { visit_namespace(Path::new(OWN_NETNS), each) } else { Ok(visit_namespaces(each)) }
}

/// Calls `work` on a thread that ends with it, and with it its stay in a network namespace.
///
/// # Errors
/// If the thread can't be started.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let started = thread::Builder::new().name("guard-netns".to_owned()).spawn_scoped(scope, work)?;
        Ok(started.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause)))
    })
}

fn is_gone(error: &io::Error) -> bool {
    const ESRCH: i32 = 3;
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
}
