//! The thread that attaches the guard to every network namespace, and looks whether it still is there.
//!
//! Attaching takes some 9 ms with the kernel's lock for network configuration held (`tcx_entry_sync`,
//! include/net/tcx.h at v6.6), so the thread rests after each, and holds the lock for at most a twentieth of the time. A
//! namespace is entered by a thread of its own that ends with the visit, and a link does not keep a namespace alive.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::{Duration, Instant},
};

use selfconn_ebpf::{Endpoint, guard::FirstConnect};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{
    queue::{MAX_NAMESPACES, NamespaceQueue, Waiting},
    rules::GuardRules,
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

/// What a network namespace is without the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnguardedNetns {
    pub id: NetnsId,
    pub why: String,
}

/// What has changed.
#[derive(Debug, Default)]
pub struct GuardReport {
    /// Network namespaces that are not guarded, each reported once for each reason.
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
    reports: UnboundedReceiver<GuardReport>,
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
    let mut groups = HashMap::new();
    cgroup::visit_named(|group| {
        let bits = rules.of_group(&group);
        if bits != 0 {
            groups.insert(group.id, bits);
        }
    })?;
    program.set_cgroups(&groups)
}

impl GuardThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(guard: Guard) -> io::Result<Self> {
        let (first_connects, receiver) = mpsc::sync_channel(MAX_FIRST_CONNECTS);
        let (report_sender, reports) = unbounded_channel();
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
    is_disarmed: bool,
}

/// The state of the thread.
struct GuardWork {
    program: GuardProgram,
    method: GuardMethod,
    rules: GuardRules,
    guarded: HashMap<NetnsId, GuardedNetns>,
    queue: NamespaceQueue<PathBuf>,
    /// Namespaces that are not guarded, with the reason that was reported.
    unguarded: HashMap<NetnsId, String>,
    failures: u64,
    is_own_only: bool,
    reports: UnboundedSender<GuardReport>,
    reported: GuardCounts,
    /// Until then nothing is attached.
    rests_until: Instant,
}

impl GuardWork {
    fn new(guard: Guard, reports: UnboundedSender<GuardReport>) -> Self {
        let Guard { program, method, rules, own, is_second: _, is_own_only } = guard;
        let mut work = Self {
            program,
            method,
            rules,
            guarded: HashMap::new(),
            queue: NamespaceQueue::default(),
            unguarded: HashMap::new(),
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
                work.guarded
                    .insert(id, GuardedNetns { owner: 0, attachments: own.keep(), is_disarmed: false });
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
        loop {
            if walk_at <= Instant::now() {
                self.walk();
                walk_at = Instant::now() + WALK_INTERVAL;
            }
            if self.rules.by_cgroup() && cgroups_at <= Instant::now() {
                if let Err(error) = set_cgroups(&mut self.program, &self.rules) {
                    log::warn!(
                        "the control groups of --guard-except and --guard-only can't be set: {error:#}"
                    );
                }
                cgroups_at = Instant::now() + CGROUP_INTERVAL;
            }
            if self.rests_until <= Instant::now()
                && let Some(next) = self.queue.pop()
            {
                self.guard(next);
            }
            self.report_counts();
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
                self.enqueue(Waiting { id, owner, path }, true);
            }
            // The thread has ended, or is in another namespace by now. The next walk may find this one.
            _ => {}
        }
    }

    fn enqueue(&mut self, waiting: Waiting<PathBuf>, connects: bool) {
        let id = waiting.id;
        if !self.queue.push(waiting, connects) {
            self.on_unguarded(
                id,
                format!("its owner has too many network namespaces; {MAX_NAMESPACES} can be guarded in all"),
            );
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
                attachments = attached?.keep();
                Ok(())
            });
            visited.map(|_| attachments)
        })
        .flatten();
        self.rests_until = Instant::now() + took * REST_FACTOR;
        match outcome {
            Ok(attachments) => {
                self.unguarded.remove(&id);
                self.guarded.insert(id, GuardedNetns { owner, attachments, is_disarmed: false });
            }
            // It has ended, or its process has. The next walk finds it again if it still exists.
            Err(error) if is_gone(&error) => self.queue.release(owner),
            Err(error) => {
                self.queue.release(owner);
                self.failures += 1;
                self.on_unguarded(id, format!("the program can't be attached: {error}"));
            }
        }
    }

    /// Enters every namespace: looks whether the program is still attached and first in the ones that are guarded, and
    /// enqueues the others.
    fn walk(&mut self) {
        let (mut visited, mut new) = (HashSet::new(), Vec::new());
        let mut changes = Vec::new();
        let (guarded, program, method) = (&mut self.guarded, &self.program, self.method);
        let (rests_until, is_own_only) = (&mut self.rests_until, self.is_own_only);
        let visit = in_thread(|| {
            visit_all(is_own_only, |namespace: &Namespace| {
                visited.insert(namespace.id);
                match guarded.get_mut(&namespace.id) {
                    Some(known) => {
                        let why = look(program, known)?;
                        // Without cookies this may be another namespace that has the same inode.
                        if namespace.id.cookie == 0 && why == Some(Disarmed::TakenOff) {
                            new.push((namespace.clone(), known.owner));
                        } else {
                            attach_to_new_devices(program, method, known, rests_until)?;
                            changes.push((namespace.id, why));
                        }
                    }
                    None => new.push((namespace.clone(), netns_owner()?)),
                }
                Ok(())
            })
        });
        let visit = match visit {
            Ok(visit) => visit,
            Err(error) => {
                return log::warn!("the guard can't look for network namespaces: no thread: {error}");
            }
        };
        for why in &visit.unseen {
            log::info!("a network namespace can't be guarded: {why}");
        }
        for (id, why) in changes {
            self.on_looked(id, why);
        }
        for (namespace, owner) in new {
            if let Some(old) = self.guarded.remove(&namespace.id) {
                self.queue.release(old.owner);
            }
            if !self.queue.contains(namespace.id) {
                self.enqueue(Waiting { id: namespace.id, owner, path: namespace.path }, false);
            }
        }
        // A namespace that was not found has ended if its links are detached. A filter ends with it.
        let (queue, method) = (&mut self.queue, self.method);
        self.guarded.retain(|id, known| {
            let is_detached = known.attachments.iter().all(Attachment::is_link_detached);
            let has_ended = !visited.contains(id) && (is_detached || method == GuardMethod::Clsact);
            if has_ended {
                queue.release(known.owner);
            }
            !has_ended
        });
        self.unguarded.retain(|id, _| visited.contains(id));
    }

    fn on_looked(&mut self, id: NetnsId, why: Option<Disarmed>) {
        let Some(known) = self.guarded.get_mut(&id) else { return };
        known.is_disarmed = why.is_some();
        match why {
            None => {
                self.unguarded.remove(&id);
            }
            Some(Disarmed::TakenOff) => self.on_unguarded(id, "the program was taken off".to_owned()),
            Some(Disarmed::Behind(other)) => {
                self.on_unguarded(id, format!("the program {other} runs first, and may end the chain"));
            }
        }
    }

    fn on_unguarded(&mut self, id: NetnsId, why: String) {
        if self.unguarded.get(&id) != Some(&why) {
            self.unguarded.insert(id, why.clone());
            self.report(vec![UnguardedNetns { id, why }]);
        }
    }

    fn report_counts(&mut self) {
        if self.counts() != self.reported {
            self.report(Vec::new());
        }
    }

    fn report(&mut self, unguarded: Vec<UnguardedNetns>) {
        self.reported = self.counts();
        // Fails only if the daemon ends.
        let _ = self.reports.send(GuardReport { unguarded, counts: self.reported });
    }

    fn counts(&self) -> GuardCounts {
        let guarded = self.guarded.values().filter(|known| !known.is_disarmed).count();
        GuardCounts { guarded, unguarded: self.unguarded.len() + self.queue.len(), failures: self.failures }
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
        });
        match visit {
            Ok(visit) => {
                for why in &visit.unseen {
                    log::warn!("the guard may be left in a network namespace: {why}");
                }
            }
            Err(error) => log::warn!("the guard can't be detached: no thread: {error}"),
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
fn visit_all(is_own_only: bool, each: impl FnMut(&Namespace) -> io::Result<()>) -> VisitResult {
    if is_own_only {
        visit_namespace(Path::new(OWN_NETNS), each).unwrap_or_else(|error| VisitResult {
            unseen: vec![format!("that of the daemon: {error}")],
            ..VisitResult::default()
        })
    } else {
        visit_namespaces(each)
    }
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
