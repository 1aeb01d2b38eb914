//! The pipeline: turns transitions, snapshots of the socket table and failed binds into events, attributes them to
//! processes, and emits them.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use jiff::Timestamp;
use selfconn_ebpf::{Owner, Task, Transition, bind_failure::BindFailure, guard::Prevention, state};

use super::{
    blocked::{BlockedReports, KnownHolder, PendingBlocked, Step},
    guarding::{self, DuePrevention},
    pending::{PendingEvents, QueuedEvent},
    port_risk,
    remediation::Remediation,
};
use crate::{
    bpf::refused_connects::RefusedCounts,
    budget::memory::MAX_PENDING_EVENTS,
    detect::{
        bind_conflict::{BindConflicts, PortHolder, TimeWaitEntry},
        connection::{Connection, ConnectionEvent, Connections, TIME_WAIT_NS},
        port_risk::{PortAtRisk, PortRiskEvent},
    },
    event::{self, Closed, ConnectionFields, EventKind, Prevented, StateChange},
    guard::GuardMode,
    lookup::{LookupTarget, Lookups},
    metrics,
    output::Outputs,
    sockets::{Coverage, NetDevices, SocketSnapshot},
    system::{
        cgroup::WatchedGroup,
        clock::{Offset, SuspendWatch, Suspension},
        process::{Attribution, Holder, ObservedTask, ProcessInfo},
    },
};

/// Maximum number of connections of a snapshot whose events are emitted in one turn of the loop.
const BACKLOG_PORTION: usize = 256;

/// Number of these connections after which the outputs are flushed.
const FLUSH_INTERVAL: usize = 16;

/// The tracked connections, everything that is known about them, and the outputs.
pub(super) struct Pipeline {
    /// Identifies this run in every `id`.
    pub(super) run_id: u64,
    pub(super) connections: Connections,
    pub(super) lookups: Lookups<Waiter>,
    /// The process behind each open connection, by the connection's number.
    attributions: HashMap<u64, Attribution>,
    pending: PendingEvents,
    /// The devices of the daemon's network namespace. `None`: they can't be asked for.
    devices: Option<NetDevices>,
    suspend_watch: SuspendWatch,
    /// The events of the current transition. Kept, so that its memory is reused.
    events: Vec<QueuedEvent>,
    reported: Reported,
    guard_mode: GuardMode,
    prevented_events: u64,
    pub(super) remediation: Remediation,
    pub(super) bind_conflicts: BindConflicts,
    pub(super) blocked: BlockedReports,
    pub(super) out: Outputs,
    pub(super) established_counts: metrics::ConnectionCounts,
    pub(super) missed: u64,
}

/// What is reported.
pub(super) struct Reported {
    /// Every state change, too.
    pub(super) states: bool,
    /// Only the processes of this control group. `None`: all.
    pub(super) group: Option<WatchedGroup>,
}

/// What waits for a look-up.
pub(super) enum Waiter {
    /// The events of a connection that a probe reported.
    Connection(u64),
    /// The events of a connection that a snapshot listed.
    Listed(u64),
    Blocked(Box<PendingBlocked>),
    PortRisk(Box<PortRiskEvent>, u64),
    /// A connect to itself that the guard refused, and how many there were.
    Prevented(Box<Prevention>, u64),
}

impl Pipeline {
    pub(super) fn new(
        probe_count: u8,
        lookups: Lookups<Waiter>,
        reported: Reported,
        guard_mode: GuardMode,
        remediation: Remediation,
        blocked: BlockedReports,
        out: Outputs,
    ) -> Self {
        Self {
            run_id: out.run(),
            connections: Connections::new(probe_count),
            lookups,
            attributions: HashMap::new(),
            pending: PendingEvents::default(),
            devices: NetDevices::of_current_netns().ok(),
            suspend_watch: SuspendWatch::start(),
            events: Vec::new(),
            reported,
            guard_mode,
            prevented_events: 0,
            remediation,
            bind_conflicts: BindConflicts::default(),
            blocked,
            out,
            established_counts: metrics::ConnectionCounts::default(),
            missed: 0,
        }
    }

    /// Must be called before records are applied.
    pub(super) fn begin_batch(&mut self) {
        if let Some(Suspension { after_ns, duration_ns, .. }) = self.suspend_watch.check() {
            self.bind_conflicts.on_suspension(after_ns, duration_ns);
        }
    }

    /// Applies a transition. The resulting events are emitted at once if the process is known, and otherwise
    /// after its look-up.
    pub(super) fn apply(&mut self, transition: &Transition, refused: &RefusedCounts, clock: Offset) {
        let mut events = std::mem::take(&mut self.events);
        let (at_ns, report_states) = (transition.at_ns, self.reported.states);
        let time = clock.wall(at_ns);
        self.connections.apply(transition, |event| {
            if report_states || !matches!(event, ConnectionEvent::State(_, _, to) if to != state::CLOSE) {
                events.push(QueuedEvent::new(event, at_ns, time));
            }
        });
        if self.suspend_watch.may_have_slept_since(at_ns) {
            events.iter_mut().for_each(QueuedEvent::forget_time_wait);
        }
        // The last state change and the close are two events of one transition.
        let ended: Vec<u64> =
            events.iter().filter(|event| event.is_last()).map(|event| event.connection.number).collect();
        for event in events.drain(..) {
            self.count(&event);
            self.on_event(event, refused, clock);
        }
        self.events = events;
        for number in ended {
            if !self.pending.contains(number) {
                self.attributions.remove(&number);
            }
        }
    }

    fn count(&mut self, event: &QueuedEvent) {
        if let ConnectionEvent::Established(connection) = event.event() {
            self.established_counts.count(connection);
        }
    }

    fn on_event(&mut self, event: QueuedEvent, refused: &RefusedCounts, clock: Offset) {
        let number = event.connection.number;
        if !self.attributions.contains_key(&number) {
            // Looked up at the first event, while the process still exists. Later events use the same result.
            let target = opener_target(&event.connection);
            let known = match &target {
                Some(target) => self.lookups.known(target, event.at_ns),
                None => Some(Rc::default()),
            };
            let is_known = known.is_some();
            let device = self.devices.as_ref().and_then(|devices| devices.name(&event.connection.endpoint));
            let attribution = Attribution {
                process: known.unwrap_or_default(),
                holders: None,
                device,
                refused_before: Some(refused.total(&event.connection.endpoint)),
            };
            self.attributions.insert(number, attribution);
            if let Some(target) = target.filter(|_| !is_known) {
                self.lookups.begin(target, Waiter::Connection(number));
                self.push_pending(event);
                return;
            }
        }
        if self.pending.contains(number) {
            self.push_pending(event);
        } else {
            record_time_wait(&mut self.bind_conflicts, &event, self.attributions.get(&number));
            self.emit(&event, clock);
        }
    }

    /// Keeps an event until its process is looked up, or its turn comes.
    fn push_pending(&mut self, event: QueuedEvent) {
        // A server may fail to bind the port before that.
        record_time_wait(&mut self.bind_conflicts, &event, None);
        self.pending.push(event);
        while self.pending.len() > MAX_PENDING_EVENTS {
            match self.pending.pop_backlog() {
                Some(number) => self.emit_pending(number),
                None => {
                    self.lookups.give_up_one();
                    if !self.lookups.has_completed() {
                        break;
                    }
                }
            }
            self.emit_completed();
            // A closed stdout is detected at the next flush.
            let _ = self.out.flush();
        }
    }

    fn emit(&mut self, queued: &QueuedEvent, clock: Offset) {
        let unknown = Attribution::default();
        let (event, number) = (queued.event(), queued.connection.number);
        let attribution = self.attributions.get(&number).unwrap_or(&unknown);
        if !self.is_reported(&queued.connection, attribution) {
            return;
        }
        if let Some(kind) = event_of(event, attribution, self.run_id, self.reported.states, clock) {
            self.out.emit_at(queued.time, kind);
        }
        let remedied = self.remediation.on_connection_event(event, attribution, self.run_id, queued.at_ns);
        if let Some(remedied) = remedied {
            self.out.emit_at(queued.time, EventKind::Remedied(Box::new(remedied)));
        }
    }

    /// False: only one control group's processes are reported, and the connection is of another one.
    fn is_reported(&self, connection: &Connection, attribution: &Attribution) -> bool {
        self.reported.group.as_ref().is_none_or(|watched| match connection.opener {
            Some(opener) => opener.owner.cgroup == watched.id,
            None => attribution.process.cgroup.as_ref().is_some_and(|path| watched.contains(path)),
        })
    }

    /// As [`Self::is_reported`], of what this owner did.
    fn is_of_reported(&self, owner: &Owner) -> bool {
        self.reported.group.as_ref().is_none_or(|watched| owner.cgroup == watched.id)
    }

    /// Emits the events of a connection that waited.
    fn emit_pending(&mut self, number: u64) {
        let clock = Offset::now();
        let mut has_ended = false;
        for event in self.pending.take(number) {
            has_ended |= event.is_last();
            if let (ConnectionEvent::Closed(connection, _), Some(attribution)) =
                (event.event(), self.attributions.get(&number))
            {
                self.bind_conflicts.attribute_time_wait(connection, attribution);
            }
            self.emit(&event, clock);
        }
        if has_ended {
            self.attributions.remove(&number);
        }
    }

    /// Takes the results of look-ups, and emits what waited for them. Returns true if there was something.
    pub(super) fn serve_lookups(&mut self) -> bool {
        self.lookups.update();
        let has_completed = self.lookups.has_completed();
        self.emit_completed();
        let mut portion = 0;
        while portion < BACKLOG_PORTION
            && !self.out.is_filling()
            && let Some(number) = self.pending.pop_backlog()
        {
            self.emit_pending(number);
            portion += 1;
            if portion % FLUSH_INTERVAL == 0 {
                // A closed stdout is detected at the next flush.
                let _ = self.out.flush();
            }
        }
        has_completed || portion > 0
    }

    fn emit_completed(&mut self) {
        while let Some((waiter, process)) = self.lookups.next_completed() {
            self.on_completed(waiter, process);
        }
    }

    fn on_completed(&mut self, waiter: Waiter, process: Rc<ProcessInfo>) {
        match waiter {
            Waiter::Connection(number) => {
                self.attribute(number, process);
                self.emit_pending(number);
            }
            Waiter::Listed(number) => {
                self.attribute(number, process);
                self.pending.push_backlog(number);
            }
            Waiter::Blocked(blocked) => self.on_blocked_process(*blocked, process),
            Waiter::PortRisk(event, now_ns) => self.emit_port_risk(&event, now_ns, &process),
            Waiter::Prevented(prevention, count) => self.emit_prevented(&prevention, count, process),
        }
    }

    fn attribute(&mut self, number: u64, process: Rc<ProcessInfo>) {
        if let Some(attribution) = self.attributions.get_mut(&number) {
            attribution.process = process;
        }
    }

    /// True if events of a snapshot wait for their turn.
    pub(super) fn has_backlog(&self) -> bool {
        self.pending.has_backlog()
    }

    /// Emits everything that waits, with what is known: the run ends.
    pub(super) async fn emit_all_pending(&mut self) {
        self.give_up_lookups().await;
        for blocked in self.blocked.give_up_all() {
            self.on_holders_known(blocked);
        }
        // A `blocked` may have two more processes to look up.
        for _ in 0..2 {
            self.give_up_lookups().await;
        }
        while let Some(number) = self.pending.pop_backlog() {
            self.emit_pending(number);
            self.make_room().await;
        }
    }

    async fn give_up_lookups(&mut self) {
        self.lookups.give_up_all();
        while let Some((waiter, process)) = self.lookups.next_completed() {
            self.on_completed(waiter, process);
            self.make_room().await;
        }
    }

    /// If stdout is filling, waits for its reader.
    async fn make_room(&mut self) {
        if self.out.is_filling() {
            // The run ends anyway if it is closed.
            let _ = self.out.make_room().await;
        }
    }

    /// Reconciles the connections with a snapshot of the socket table. Returns the number of missed
    /// self-connections. The events are emitted later, in portions.
    pub(super) fn reconcile(&mut self, snapshot: &SocketSnapshot, knows_netns: bool) -> u64 {
        // A connection that the snapshot may have left out is not missing in it.
        let coverage = |connection: &Connection| {
            let coverage = if knows_netns { snapshot.coverage(&connection.endpoint) } else { Coverage::Read };
            let is_missing = coverage != Coverage::Read || !snapshot.left_out.may_have(connection.uid);
            if is_missing { coverage } else { Coverage::Unknown }
        };
        // Outside the initial pid namespace the holders' pids in /proc differ from the pids in events.
        let can_look_up = self.lookups.can_look_up();
        let holders_of =
            |connection: &Connection| snapshot.holders_of(connection.inode).map(<[Holder]>::to_vec);
        let (began_ns, time) = (snapshot.began_ns, Timestamp::now());
        let mut events = Vec::new();
        self.connections.set_left_out(snapshot.left_out.users());
        let missed = self.connections.reconcile(&snapshot.entries, began_ns, coverage, |event| {
            events.push(QueuedEvent::new(event, began_ns, time));
        });
        for event in events {
            self.count(&event);
            let connection = &event.connection;
            let number = connection.number;
            if self.pending.contains(number) {
                self.push_pending(event);
                continue;
            }
            let mut target = None;
            self.attributions.entry(number).or_insert_with(|| {
                target = opener_target(connection);
                let mut attribution = Attribution::default();
                if target.is_none() && can_look_up {
                    attribution.holders = holders_of(connection);
                    let first = attribution.holders.iter().flatten().next();
                    target = first.and_then(holder_target);
                }
                attribution
            });
            match target.map(|target| (target, self.lookups.known(&target, began_ns))) {
                Some((target, None)) => self.lookups.begin(target, Waiter::Listed(number)),
                known => {
                    if let Some((_, Some(process))) = known {
                        self.attribute(number, process);
                    }
                    self.pending.push_backlog(number);
                }
            }
            self.push_pending(event);
        }
        for connection in self.connections.iter() {
            if let (Some(attribution), Some(holders)) =
                (self.attributions.get_mut(&connection.number), holders_of(connection))
            {
                attribution.holders = Some(holders);
            }
        }
        missed
    }

    /// Handles a failed bind: if a self-connection holds the port and a report is due, looks up the process,
    /// and emits `blocked`.
    pub(super) fn on_bind_failure(&mut self, failure: &BindFailure, clock: Offset) {
        let Some(holder) = self.bind_conflicts.find_holder(failure, self.connections.iter()) else {
            return self.bind_conflicts.record_unexplained(failure);
        };
        let number = holder.connection().number;
        let attribution = self.attributions.get(&number).cloned().unwrap_or_default();
        let mut blocked = PendingBlocked::new(*failure, &holder, attribution, clock.wall(failure.at_ns));
        let Some(conflict) = self.bind_conflicts.record_failure(failure, number) else { return };
        (blocked.conflict, blocked.failure.failures) = (conflict.number, conflict.failures);
        let target = LookupTarget::Observed(ObservedTask::from_bind_failure(failure), failure.owner);
        self.look_up_for_blocked(blocked, target);
    }

    fn look_up_for_blocked(&mut self, blocked: PendingBlocked, target: LookupTarget) {
        match self.lookups.known(&target, blocked.failure.at_ns) {
            Some(process) => self.on_blocked_process(blocked, process),
            None => self.lookups.begin(target, Waiter::Blocked(Box::new(blocked))),
        }
    }

    /// A process of a `blocked` event is looked up.
    fn on_blocked_process(&mut self, mut blocked: PendingBlocked, process: Rc<ProcessInfo>) {
        match blocked.step {
            Step::Binder => {
                blocked.binder = Some(process);
                if let Some(blocked) = self.blocked.request(blocked) {
                    self.on_holders_known(blocked);
                }
            }
            Step::Holder => {
                blocked.holder_process = Some(process);
                self.on_holder_process_known(blocked);
            }
            Step::Opener => {
                if let KnownHolder::Open(_, attribution) = &mut blocked.holder {
                    attribution.process = process;
                }
                self.emit_blocked(&blocked);
            }
        }
    }

    /// Goes on with the `blocked` events whose holders are known.
    pub(super) fn serve_blocked(&mut self) {
        for blocked in self.blocked.serve() {
            self.on_holders_known(blocked);
        }
    }

    fn on_holders_known(&mut self, mut blocked: PendingBlocked) {
        match blocked.holders.iter().flatten().next().and_then(holder_target) {
            Some(target) if self.lookups.can_look_up() => {
                blocked.step = Step::Holder;
                self.look_up_for_blocked(blocked, target);
            }
            _ => self.on_holder_process_known(blocked),
        }
    }

    /// Emits the event, unless the look-up of the opener is in progress.
    fn on_holder_process_known(&mut self, mut blocked: PendingBlocked) {
        if let KnownHolder::Open(connection, _) = &blocked.holder
            && self.pending.contains(connection.number)
            && let Some(target) = opener_target(connection)
        {
            blocked.step = Step::Opener;
            self.lookups.begin(target, Waiter::Blocked(Box::new(blocked)));
            return;
        }
        self.emit_blocked(&blocked);
    }

    fn emit_blocked(&mut self, blocked: &PendingBlocked) {
        let (holder, attribution) = match &blocked.holder {
            KnownHolder::Open(connection, at_failure) => {
                let now = self.attributions.get(&connection.number).unwrap_or(at_failure);
                (PortHolder::Open(connection), now)
            }
            KnownHolder::TimeWait(entry) => (PortHolder::TimeWait(entry), &entry.attribution),
        };
        let connection = holder.connection();
        if !self.is_of_reported(&blocked.failure.owner) && !self.is_reported(connection, attribution) {
            return;
        }
        let fields = ConnectionFields::new(connection, self.run_id, attribution);
        let current = event::CurrentHolder {
            holders: blocked.holders.clone(),
            process: blocked.holder_process.clone().unwrap_or_default(),
        };
        let binder = blocked.binder.clone().unwrap_or_default();
        let id = event::blocked_id(self.run_id, blocked.conflict);
        let report =
            event::Blocked::new(id, &blocked.failure, &binder, &holder, fields, current, Offset::now());
        self.out.emit_at(blocked.time, EventKind::Blocked(Box::new(report)));
    }

    /// Looks up the process whose connects to itself the guard refused, and emits `prevented`.
    pub(super) fn on_prevented(&mut self, due: &DuePrevention) {
        let DuePrevention { newest, count } = *due;
        let Some(prevention) = newest else {
            let prevented = self.prevented(None, count);
            return self.out.emit(EventKind::Prevented(Box::new(prevented)));
        };
        let Some(target) = opener_target(&guarding::connection_of(&prevention)) else {
            return self.emit_prevented(&prevention, count, Rc::default());
        };
        match self.lookups.known(&target, prevention.at_ns) {
            Some(process) => self.emit_prevented(&prevention, count, process),
            None => self.lookups.begin(target, Waiter::Prevented(Box::new(prevention), count)),
        }
    }

    fn emit_prevented(&mut self, prevention: &Prevention, count: u64, process: Rc<ProcessInfo>) {
        let attribution = Attribution { process, ..Attribution::default() };
        let connection = guarding::connection_of(prevention);
        let fields = ConnectionFields::new(&connection, self.run_id, &attribution);
        let prevented = self.prevented(Some(fields), count);
        let time = Offset::now().wall(prevention.at_ns);
        self.out.emit_at(time, EventKind::Prevented(Box::new(prevented)));
    }

    fn prevented(&mut self, fields: Option<ConnectionFields>, count: u64) -> Prevented {
        self.prevented_events += 1;
        Prevented::new(self.run_id, self.prevented_events, fields, self.guard_mode.name(), count)
    }

    /// Looks up the newest connecting process of a port at risk, and emits the event.
    pub(super) fn on_port_risk(&mut self, event: PortRiskEvent, now_ns: u64) {
        let (PortRiskEvent::AtRisk(PortAtRisk { connects, .. }) | PortRiskEvent::Over(connects, _)) = &event;
        let newest = connects.newest;
        if !self.is_of_reported(&newest.owner) {
            return;
        }
        // If two CPUs wrote to the count at the same time, the task may be mixed from two attempts. Only a
        // matching start time proves that it is not.
        if newest.start_ns == 0 {
            return self.emit_port_risk(&event, now_ns, &ProcessInfo::default());
        }
        let target = LookupTarget::Observed(ObservedTask::from_opener(&newest), newest.owner);
        match self.lookups.known(&target, now_ns) {
            Some(process) => self.emit_port_risk(&event, now_ns, &process),
            None => self.lookups.begin(target, Waiter::PortRisk(Box::new(event), now_ns)),
        }
    }

    fn emit_port_risk(&mut self, event: &PortRiskEvent, now_ns: u64, process: &ProcessInfo) {
        self.out.emit_at(Offset::now().wall(now_ns), port_risk::event_kind(event, self.run_id, process));
    }

    /// Records the TIME_WAIT sockets of self-connections whose close this run did not observe, and removes those
    /// that the kernel does not have any more: they ended early, or with their network namespace.
    pub(super) fn record_time_waits(&mut self, snapshot: &SocketSnapshot) {
        let listed: HashSet<u64> = snapshot.entries.iter().filter_map(|entry| entry.cookie).collect();
        let is_complete = snapshot.without_sock_diag.is_none() && !snapshot.left_out.has_without_user();
        self.bind_conflicts.remove_ended(|TimeWaitEntry { connection, until_ns, .. }| {
            let began_ns = until_ns.saturating_sub(TIME_WAIT_NS);
            let is_missing = connection.cookie.is_some_and(|cookie| !listed.contains(&cookie));
            began_ns < snapshot.began_ns
                && match snapshot.coverage(&connection.endpoint) {
                    Coverage::NetnsEnded => true,
                    Coverage::Read => is_missing && is_complete,
                    Coverage::Unknown => false,
                }
        });
        for entry in &snapshot.entries {
            let Some(time_left) = entry.time_wait_left else { continue };
            debug_assert_eq!(entry.state, state::TIME_WAIT);
            let connection = Connection::from_entry(0, entry);
            let time_left_ns = u64::try_from(time_left.as_nanos()).unwrap_or(u64::MAX);
            let until_ns = snapshot.began_ns.saturating_add(time_left_ns);
            self.bind_conflicts.insert_listed_time_wait(
                TimeWaitEntry { connection, attribution: Attribution::default(), until_ns },
                snapshot.began_ns,
            );
        }
    }
}

/// Records the TIME_WAIT of a self-connection that is closed. `None`: its process is not looked up yet.
fn record_time_wait(
    bind_conflicts: &mut BindConflicts,
    event: &QueuedEvent,
    attribution: Option<&Attribution>,
) {
    if let ConnectionEvent::Closed(connection, end) = event.event()
        && let Some(until_ns) = end.port_blocked_until_ns
    {
        let attribution = attribution.cloned().unwrap_or_default();
        let entry = TimeWaitEntry { connection: connection.clone(), attribution, until_ns };
        bind_conflicts.insert_time_wait(entry, event.at_ns);
    }
}

/// The process that opened a connection. `None`: it is unknown.
fn opener_target(connection: &Connection) -> Option<LookupTarget> {
    let opener = connection.opener?;
    Some(LookupTarget::Observed(ObservedTask::from_opener(&opener), opener.owner))
}

/// `None`: the holder has exited.
fn holder_target(holder: &Holder) -> Option<LookupTarget> {
    holder.start_ticks.map(|start_ticks| LookupTarget::Holder { pid: holder.pid, start_ticks })
}

/// The event to emit for a connection event, if any.
fn event_of(
    event: ConnectionEvent<'_>,
    attribution: &Attribution,
    run_id: u64,
    report_states: bool,
    clock: Offset,
) -> Option<EventKind> {
    let fields = |connection: &Connection| ConnectionFields::new(connection, run_id, attribution);
    match event {
        ConnectionEvent::Established(connection) => {
            Some(EventKind::Established(Box::new(fields(connection))))
        }
        ConnectionEvent::State(connection, from, to) => {
            report_states.then(|| EventKind::State(Box::new(StateChange::new(fields(connection), from, to))))
        }
        ConnectionEvent::Closed(connection, end) => {
            let closer: Option<&Task> = connection.closer.as_ref();
            Some(EventKind::Closed(Box::new(Closed::new(fields(connection), closer, &end, clock))))
        }
    }
}
