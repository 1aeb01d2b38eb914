//! The pipeline: turns transitions and snapshots of the socket table into events of connections, attributes them to
//! processes, and emits them.

use std::{collections::HashMap, rc::Rc, time::Duration};

use jiff::Timestamp;
use selfconn_ebpf::{Endpoint, Owner, Task, Transition, bind_failure::BindFailure, state};
use tokio::time::Instant;

use super::{
    blocked::BlockedReports,
    guarding::DuePrevention,
    pending::{PendingEvents, QueuedEvent},
    port_conflicts::{KnownConnections, PortConflicts},
    port_risk,
    prevented::Preventions,
    remediation::Remediation,
    reporting::{Reporting, Waiter, holder_target, opener_target},
};
use crate::{
    bpf::refused_connects::RefusedCounts,
    budget::{
        SharedLimit, SharedRate,
        memory::{MAX_MORE_HOLDERS, MAX_PENDING_EVENTS},
    },
    detect::{
        bind_conflict::{TimeWaitEntry, TimeWaits},
        connection::{Connection, ConnectionEvent, Connections, TIME_WAIT_NS},
    },
    event::{Closed, ConnectionFields, EventKind, StateChange},
    guard::GuardMode,
    lookup::LookupTarget,
    metrics,
    sockets::{Coverage, NetDevices, SocketSnapshot},
    system::{
        clock::{Offset, SuspendWatch, Suspension},
        process::{Attribution, ClosedAttribution, Holder, ProcessInfo, Subject},
    },
};

/// Maximum number of connections of the backlog whose events are emitted in one turn of the loop.
const BACKLOG_PORTION: usize = 256;

/// How long the log waits for the reader of stdout, so that stdout loses nothing. With stdout alone, events wait until
/// there is room.
const MAX_BACKLOG_AGE: Duration = Duration::from_millis(100);

/// Maximum number of connections in a second whose refused connects are looked up, which owners share: a look-up can
/// cost transitions.
const MAX_REFUSED_LOOKUPS: usize = 100;

/// Number of these connections after which the outputs are flushed.
const FLUSH_INTERVAL: usize = 16;

/// The tracked connections, everything that is known about them, and the events about them.
pub(super) struct Pipeline {
    pub(super) connections: Connections,
    /// The process behind each open connection, by the connection's number.
    attributions: HashMap<u64, Attribution>,
    pending: PendingEvents,
    /// The devices of the daemon's network namespace. `None`: they can't be asked for.
    devices: Option<NetDevices>,
    suspend_watch: SuspendWatch,
    refused_lookups: SharedRate,
    /// The events of the current transition. Kept, so that its memory is reused.
    events: Vec<QueuedEvent>,
    pub(super) remediation: Remediation,
    pub(super) conflicts: PortConflicts,
    preventions: Preventions,
    pub(super) reporting: Reporting,
    pub(super) established_counts: metrics::ConnectionCounts,
    pub(super) missed: u64,
}

impl Pipeline {
    pub(super) fn new(
        probe_count: u8,
        own_pid: Option<u32>,
        reporting: Reporting,
        guard_mode: GuardMode,
        remediation: Remediation,
        blocked: BlockedReports,
    ) -> Self {
        Self {
            connections: Connections::new(probe_count).with_own_pid(own_pid),
            attributions: HashMap::new(),
            pending: PendingEvents::default(),
            devices: NetDevices::of_current_netns().ok(),
            suspend_watch: SuspendWatch::start(),
            refused_lookups: SharedRate::new(MAX_REFUSED_LOOKUPS),
            events: Vec::new(),
            remediation,
            conflicts: PortConflicts::new(blocked),
            preventions: Preventions::new(guard_mode),
            reporting,
            established_counts: metrics::ConnectionCounts::default(),
            missed: 0,
        }
    }

    /// The failed binds, with what they need of the connections.
    fn conflicts(&mut self) -> (&mut PortConflicts, KnownConnections<'_>, &mut Reporting) {
        let Self { conflicts, connections, attributions, pending, reporting, .. } = self;
        (conflicts, KnownConnections { connections, attributions, pending }, reporting)
    }

    pub(super) fn on_bind_failure(&mut self, failure: &BindFailure, clock: Offset) {
        let (conflicts, known, reporting) = self.conflicts();
        conflicts.on_bind_failure(failure, clock, known, reporting);
    }

    /// Goes on with the `blocked` events whose holders are known. True if one of them is lost.
    pub(super) fn serve_blocked(&mut self) -> bool {
        let (conflicts, known, reporting) = self.conflicts();
        let lost_before = conflicts.binds.servers.losses.total();
        let options = conflicts.serve(known, reporting);
        let has_lost = conflicts.binds.servers.losses.total() > lost_before;
        self.connections.set_options(&options);
        has_lost
    }

    /// The guard has refused connects to itself.
    pub(super) fn on_prevented(&mut self, due: &DuePrevention) {
        self.preventions.report(due, &mut self.reporting);
    }

    /// Must be called before records are applied.
    pub(super) fn begin_batch(&mut self) {
        if let Some(Suspension { after_ns, duration_ns, .. }) = self.suspend_watch.check() {
            self.conflicts.binds.time_waits.on_suspension(after_ns, duration_ns);
        }
    }

    /// Applies a transition. The resulting events are emitted at once if the process is known, and otherwise
    /// after its look-up.
    pub(super) fn apply(&mut self, transition: &Transition, refused: &RefusedCounts, clock: Offset) {
        let mut events = std::mem::take(&mut self.events);
        let (at_ns, report_states) = (transition.at_ns, self.reporting.reported.states);
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
            self.on_established(&event);
            self.on_event(event, refused, clock);
        }
        self.events = events;
        for number in ended {
            if !self.pending.contains(number) {
                self.attributions.remove(&number);
            }
        }
    }

    fn on_established(&mut self, event: &QueuedEvent) {
        if let ConnectionEvent::Established(connection) = event.event() {
            self.established_counts.count(connection);
            self.conflicts.binds.time_waits.on_established(&connection.endpoint, event.at_ns);
        }
    }

    fn on_event(&mut self, event: QueuedEvent, refused: &RefusedCounts, clock: Offset) {
        let number = event.connection.number;
        // The opener is looked up at the first event, while the process still exists, or at the first event that has it.
        // Later events use the same result.
        let known = self.attributions.get(&number);
        let is_new = known.is_none();
        let knew_opener = known.is_some_and(|known| known.subject == Subject::Opener);
        if is_new {
            let device = self.devices.as_ref().and_then(|devices| devices.name(&event.connection.endpoint));
            let refused_before = self.refused_before(&event, refused);
            let attribution = Attribution { device, refused_before, ..Attribution::default() };
            self.attributions.insert(number, attribution);
        }
        if let Some(target) = opener_target(&event.connection).filter(|_| !knew_opener) {
            let known = self.reporting.lookups.known(&target, event.at_ns);
            let is_known = known.is_some();
            self.attribute(number, Subject::Opener, known.unwrap_or_default());
            if !is_known {
                self.reporting.lookups.begin(target, Waiter::Connection(number));
                self.push_pending(event);
                return;
            }
        }
        if self.pending.contains(number) {
            self.push_pending(event);
        } else {
            record_time_wait(&mut self.conflicts.binds.time_waits, &event, self.attributions.get(&number));
            self.emit(&event, clock);
        }
    }

    /// `None`: too many were looked up in this second.
    fn refused_before(&mut self, event: &QueuedEvent, refused: &RefusedCounts) -> Option<u64> {
        let destination = &event.connection.endpoint;
        if !refused.may_have(destination, event.at_ns) {
            return Some(0);
        }
        let owner = event.connection.opener.map_or(Owner::UNKNOWN, |opener| opener.owner);
        let is_allowed = self.refused_lookups.try_take(owner, Instant::now()).is_ok();
        is_allowed.then(|| refused.total(destination))
    }

    /// Keeps an event until its process is looked up, or its turn comes.
    fn push_pending(&mut self, event: QueuedEvent) {
        // A server may fail to bind the port before that.
        let attribution = self.attributions.get(&event.connection.number);
        record_time_wait(&mut self.conflicts.binds.time_waits, &event, attribution);
        self.pending.push(event);
        while self.pending.len() > MAX_PENDING_EVENTS {
            match self.pending.pop_backlog(false) {
                Some(number) => self.emit_pending(number),
                None => {
                    self.reporting.lookups.give_up_one();
                    if !self.reporting.lookups.has_completed() {
                        break;
                    }
                }
            }
            self.emit_completed();
            // A closed stdout is detected at the next flush.
            let _ = self.reporting.out.flush();
        }
    }

    fn emit(&mut self, queued: &QueuedEvent, clock: Offset) {
        let unknown = Attribution::default();
        let (event, number) = (queued.event(), queued.connection.number);
        let attribution = self.attributions.get(&number).unwrap_or(&unknown);
        if !self.reporting.is_reported(&queued.connection, attribution) {
            return;
        }
        if let Some(kind) =
            event_of(event, attribution, self.reporting.run_id, self.reporting.reported.states, clock)
        {
            self.reporting.out.emit_at(queued.time, kind);
        }
        let remedied =
            self.remediation.on_connection_event(event, attribution, self.reporting.run_id, queued.at_ns);
        if let Some(remedied) = remedied {
            self.reporting.out.emit_at(queued.time, EventKind::Remedied(Box::new(remedied)));
        }
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
                self.conflicts.binds.time_waits.attribute(connection, attribution);
            }
            self.emit(&event, clock);
        }
        if has_ended {
            self.attributions.remove(&number);
        }
    }

    /// Takes the results of look-ups, and emits what waited for them. Returns true if there was something.
    pub(super) fn serve_lookups(&mut self) -> bool {
        self.reporting.lookups.update();
        let has_completed = self.reporting.lookups.has_completed();
        self.emit_completed();
        let mut portion = 0;
        while portion < BACKLOG_PORTION
            && self.has_room()
            && let Some(number) = self.pending.pop_backlog(!self.reporting.out.is_filling())
        {
            self.emit_pending(number);
            portion += 1;
            if portion % FLUSH_INTERVAL == 0 {
                // A closed stdout is detected at the next flush.
                let _ = self.reporting.out.flush();
            }
        }
        has_completed || portion > 0
    }

    fn emit_completed(&mut self) {
        while let Some((waiter, process)) = self.reporting.lookups.next_completed() {
            self.on_completed(waiter, process);
        }
    }

    fn on_completed(&mut self, waiter: Waiter, process: Rc<ProcessInfo>) {
        match waiter {
            Waiter::Connection(number) => {
                self.attribute(number, Subject::Opener, process);
                // All that one process has done may have waited for this.
                if self.has_room() {
                    self.emit_pending(number);
                } else {
                    self.attribute_time_wait(number);
                    self.pending.push_backlog(number);
                }
            }
            Waiter::Listed(number, subject) => {
                self.attribute(number, subject, process);
                self.pending.push_backlog(number);
            }
            Waiter::Blocked(blocked) => {
                let (conflicts, known, reporting) = self.conflicts();
                conflicts.on_process(*blocked, process, known, reporting);
            }
            Waiter::PortRisk(event, now_ns) => {
                port_risk::on_process(&event, now_ns, &process, &mut self.reporting);
            }
            Waiter::Prevented(prevention, count) => {
                self.preventions.emit(&prevention, count, process, &mut self.reporting);
            }
        }
    }

    /// A server may fail to bind the port before the events of this connection have their turn.
    fn attribute_time_wait(&mut self, number: u64) {
        let Some(attribution) = self.attributions.get(&number) else { return };
        for event in self.pending.of_connection(number) {
            if let ConnectionEvent::Closed(connection, _) = event.event() {
                self.conflicts.binds.time_waits.attribute(connection, attribution);
            }
        }
    }

    fn attribute(&mut self, number: u64, subject: Subject, process: Rc<ProcessInfo>) {
        if let Some(attribution) = self.attributions.get_mut(&number) {
            attribution.set_process(subject, process);
        }
    }

    /// True if events wait for their turn only.
    pub(super) fn has_backlog(&self) -> bool {
        self.pending.has_backlog()
    }

    /// True if the outputs have room for events that can wait.
    pub(super) fn has_room(&self) -> bool {
        let out = &self.reporting.out;
        !out.is_filling() || (!out.holds_back_records() && self.pending.backlog_age() >= MAX_BACKLOG_AGE)
    }

    /// Emits everything that waits, with what is known: the run ends.
    pub(super) async fn emit_all_pending(&mut self) {
        self.give_up_lookups().await;
        let (conflicts, known, reporting) = self.conflicts();
        conflicts.give_up_holders(known, reporting);
        // A `blocked` may have two more processes to look up.
        for _ in 0..2 {
            self.give_up_lookups().await;
        }
        while let Some(number) = self.pending.pop_backlog(true) {
            self.emit_pending(number);
            self.reporting.make_room().await;
        }
    }

    async fn give_up_lookups(&mut self) {
        self.reporting.lookups.give_up_all();
        while let Some((waiter, process)) = self.reporting.lookups.next_completed() {
            self.on_completed(waiter, process);
            self.reporting.make_room().await;
        }
    }

    /// Reconciles the connections with a snapshot of the socket table. Returns the number of new self-connections. The
    /// hooks missed them, unless they may be older than the run. The events are emitted later, in portions.
    pub(super) fn reconcile(
        &mut self,
        snapshot: &SocketSnapshot,
        knows_netns: bool,
        may_be_older: impl Fn(&Endpoint) -> bool,
    ) -> u64 {
        // A connection that the snapshot may have left out is not missing in it.
        let coverage = |connection: &Connection| {
            let coverage = if knows_netns { snapshot.coverage(&connection.endpoint) } else { Coverage::Read };
            let is_missing = coverage != Coverage::Read || !snapshot.left_out.may_have(connection.uid);
            if is_missing { coverage } else { Coverage::Unknown }
        };
        // Outside the initial pid namespace the holders' pids in /proc differ from the pids in events.
        let can_look_up = self.reporting.lookups.can_look_up();
        let holders_of =
            |connection: &Connection| snapshot.holders_of(connection.socket_ref()).map(<[Holder]>::to_vec);
        let (began_ns, time) = (snapshot.began_ns, Timestamp::now());
        // Each event is queued at once: all of them together would take megabytes beside the queue.
        let mut connections = std::mem::take(&mut self.connections);
        connections.set_left_out(&snapshot.left_out);
        let found = connections.reconcile(&snapshot.entries, began_ns, coverage, |event| {
            if let ConnectionEvent::Established(connection) = &event {
                self.missed += u64::from(!may_be_older(&connection.endpoint));
            }
            let event = QueuedEvent::new(event, began_ns, time);
            self.on_established(&event);
            let connection = &event.connection;
            let number = connection.number;
            if self.pending.contains(number) {
                self.push_pending(event);
                return;
            }
            let mut target = None;
            self.attributions.entry(number).or_insert_with(|| {
                target = opener_target(connection).map(|target| (target, Subject::Opener));
                let mut attribution = Attribution::default();
                if target.is_none() && can_look_up {
                    attribution.holders = holders_of(connection);
                    target = first_holder_target(&attribution, connection);
                }
                attribution
            });
            match target.map(|target| (self.reporting.lookups.known(&target.0, began_ns), target)) {
                Some((None, (target, subject))) => {
                    self.reporting.lookups.begin(target, Waiter::Listed(number, subject));
                }
                known => {
                    if let Some((Some(process), (_, subject))) = known {
                        self.attribute(number, subject, process);
                    }
                    self.pending.push_backlog(number);
                }
            }
            self.push_pending(event);
        });
        self.connections = connections;
        let (mut of_snapshot, mut older) = (0, Vec::new());
        for connection in self.connections.iter() {
            let Some(attribution) = self.attributions.get_mut(&connection.number) else { continue };
            // What a part of the processes hold does not replace what all held.
            let holders =
                holders_of(connection).filter(|_| snapshot.holders.complete || attribution.holders.is_none());
            if holders.is_none() && attribution.more_holders() > 0 {
                older.push((connection.number, connection.payer()));
            }
            if let Some(holders) = holders {
                let is_another = attribution.first_holder() != holders.first();
                attribution.holders = Some(holders);
                of_snapshot += attribution.more_holders();
                // Another process is named now, or another program of it.
                if is_another
                    && can_look_up
                    && connection.opener.is_none()
                    && let Some((target, subject)) = first_holder_target(attribution, connection)
                {
                    let waiter = Waiter::Listed(connection.number, subject);
                    self.reporting.lookups.begin(target, waiter);
                }
            }
        }
        // An incomplete pass replaces none, so they would add up from one to the next.
        let mut room = SharedLimit::new(MAX_MORE_HOLDERS.saturating_sub(of_snapshot));
        for (number, payer) in older {
            if let Some(attribution) = self.attributions.get_mut(&number)
                && !room.try_take(payer, attribution.more_holders())
            {
                attribution.limit_more_holders(0);
            }
        }
        // Some have ended without an event: their connect() failed, and the record of it was lost.
        let Self { connections, attributions, pending, reporting, .. } = self;
        let numbers = connections.numbers();
        attributions.retain(|number, _| {
            let is_open = numbers.binary_search(number).is_ok() || pending.contains(*number);
            if !is_open {
                reporting.out.forget_connection(*number);
            }
            is_open
        });
        found
    }

    /// Records the TIME_WAIT sockets of self-connections whose close this run did not observe, and removes those
    /// that the kernel does not have any more: they ended early, or with their network namespace.
    pub(super) fn record_time_waits(&mut self, snapshot: &SocketSnapshot) {
        let mut listed = Vec::with_capacity(snapshot.entries.len());
        listed.extend(snapshot.entries.iter().filter_map(|entry| entry.cookie));
        listed.sort_unstable();
        let is_complete = snapshot.without_sock_diag.is_none() && !snapshot.left_out.has_without_user();
        self.conflicts.binds.time_waits.remove_ended(|TimeWaitEntry { connection, until_ns, .. }| {
            let began_ns = until_ns.saturating_sub(TIME_WAIT_NS);
            let is_missing = connection.cookie.is_some_and(|cookie| listed.binary_search(&cookie).is_err());
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
            self.conflicts.binds.time_waits.insert_listed(
                TimeWaitEntry { connection, attribution: ClosedAttribution::default(), until_ns },
                snapshot.began_ns,
            );
        }
    }
}

/// The process that is named if the opener is unknown.
fn first_holder_target(
    attribution: &Attribution,
    connection: &Connection,
) -> Option<(LookupTarget, Subject)> {
    let holder = attribution.first_holder()?;
    Some((holder_target(holder, connection)?, Subject::Holder(Rc::new(holder.clone()))))
}

/// Records the TIME_WAIT of a self-connection that is closed. `None`: its process is not looked up yet.
fn record_time_wait(time_waits: &mut TimeWaits, event: &QueuedEvent, attribution: Option<&Attribution>) {
    if let ConnectionEvent::Closed(connection, end) = event.event()
        && let Some(until_ns) = end.port_blocked_until_ns
    {
        let attribution = attribution.map(ClosedAttribution::from).unwrap_or_default();
        let entry = TimeWaitEntry { connection: connection.clone(), attribution, until_ns };
        time_waits.insert(entry, event.at_ns);
    }
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
