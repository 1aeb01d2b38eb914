//! The daemon: one loop on one thread owns the tracer, the parts, and the outputs. Nothing is shared, so
//! nothing is locked. Each part holds its state, and the loop calls it; no part knows the daemon. Work that
//! blocks or changes the network namespace runs on worker threads, which own no state of the daemon.

use std::{collections::HashSet, io, time::Duration};

use selfconn_ebpf::{ABSENT, Endpoint, Field, Record, bind_failure::BindFailure, guard::GuardRecord};
use tokio::time::{Instant, sleep};

use crate::{
    bpf::{
        attach::Method,
        features::KernelFeatures,
        loader::{Counters, Tracer},
    },
    budget::cmdline::CmdlineLimit,
    detect::remediation::Remedy,
    event::{EventKind, GuardStatus, LossCause, Losses, ProgramCounters, Unguarded},
    guard::{GuardMode, start::Guard, thread::GuardThread},
    lookup::Lookups,
    metrics::MetricsSnapshot,
    output::Outputs,
    sockets::{Cookie, SocketEntry, SocketSnapshot},
    system::{
        cgroup::WatchedGroup,
        clock::{self, Offset, sleep_until_some},
        memory,
    },
};
use blocked::BlockedReports;
use catch_up::{AfterRecords, CatchUp};
use guarding::GuardMonitor;
use losses::LossReporter;
use pipeline::{Pipeline, Reported};
use port_ranges::PortRangeResponse;
use port_risk::PortRiskMonitor;
use remediation::Remediation;
use remedy_worker::SocketResponse;
use self_test::SelfTest;
use signals::{SignalAction, Signals};
use snapshot_worker::SnapshotWorker;
use supervision::Supervision;

mod blocked;
mod catch_up;
mod guarding;
mod losses;
mod pending;
mod pipeline;
mod port_ranges;
mod port_risk;
mod remediation;
mod remedy_worker;
pub mod self_test;
mod signals;
mod snapshot_worker;
mod started;
pub mod supervision;

pub use self_test::HooksDead;

/// The most threads that a daemon has at the same time. The unit's `TasksMax` must not be below it.
///
/// The loop; `metrics`; the writer of stdout or the journal; `facts`; `holders`; `reader`, `ranges`, `remedy` and
/// `guard`, each with a thread that enters a namespace; and the readers of command lines, all of which may be stuck.
pub const MAX_THREADS: usize = 1 + 1 + 1 + 1 + 1 + 4 * 2 + crate::lookup::MAX_STUCK;

/// Maximum number of records drained per loop iteration, so that every other source gets its turn.
const MAX_BATCH: usize = 1024;

/// Maximum time that the end of a run works on the records in the ring buffer, without the time in which a slow
/// reader of stdout is waited for. The rest counts as lost. A full ring buffer of the usual size takes 0.4 s.
const FINAL_DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time to wait for a record that a probe has counted and not yet written. It is longer than any probe
/// runs.
const RECORD_TIMEOUT: Duration = Duration::from_millis(100);

/// Time between two looks at the ring buffer while such a record is missing.
const RECORD_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Maximum time between two looks at stdout while events of a snapshot wait for room.
const BACKLOG_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The options of a run, for the parts that need them.
pub struct DaemonOptions {
    /// True to report every state change.
    pub states: bool,
    /// Time between two snapshots of the socket table.
    pub snapshot_interval: Duration,
    /// What is kept of a command line: as much as events and rules need.
    pub kept_cmdline: CmdlineLimit,
    pub remedy: Option<Remedy>,
    /// The only control group whose processes are reported. `None`: all.
    pub only_group: Option<WatchedGroup>,
    pub guard_mode: GuardMode,
    /// The guard, attached in this process's network namespace.
    pub guard: Option<Guard>,
    pub self_test: SelfTest,
}

/// The state of the event loop.
pub struct Daemon {
    tracer: Tracer,
    snapshot_worker: SnapshotWorker,
    port_risks: PortRiskMonitor,
    supervision: Supervision,
    pipeline: Pipeline,
    self_test: SelfTest,
    guard: GuardMonitor,
    loss_reporter: LossReporter,
    snapshot_interval: Duration,
    /// True if the probes can read a socket's network namespace.
    knows_netns: bool,
    /// True if the socket table has been read in this run.
    has_snapshot: bool,
    /// When the next snapshot is due. `None`: one is in progress.
    next_snapshot_at: Option<Instant>,
    /// What waits until every record from before it is applied.
    catch_up: CatchUp<AfterRecords>,
    /// Records that were still in the ring buffer at the end of the run.
    unread: u64,
    /// Failed binds that wait until every earlier transition is applied.
    pending_bind_failures: Vec<BindFailure>,
    /// The probes' counters, as last read.
    counters: Counters,
}

impl Daemon {
    /// Creates the daemon and emits `started`. The hooks must be attached already.
    ///
    /// # Errors
    /// If a worker thread can't be started.
    pub fn new(
        host: &KernelFeatures,
        mut tracer: Tracer,
        supervision: Supervision,
        mut out: Outputs,
        options: DaemonOptions,
    ) -> io::Result<Self> {
        let guard = GuardStatus {
            mode: options.guard_mode.name(),
            method: options.guard.as_ref().map(|guard| guard.method().name()),
            is_second: options.guard.as_ref().is_some_and(Guard::is_second),
        };
        out.emit(EventKind::Started(started::started(host, &tracer, guard)));
        let guard_thread = options.guard.map(GuardThread::start).transpose()?;
        let probe_count = u8::try_from(tracer.methods().live.len()).unwrap_or(u8::MAX);
        let lookups = Lookups::start(host.is_initial_pid_ns, options.kept_cmdline)?;
        let remediation = Remediation::start(options.remedy)?;
        let iterators = tracer.take_iterators();
        let blocked = BlockedReports::start(iterators.descriptors.clone())?;
        let snapshot_worker = snapshot_worker::start(iterators)?;
        Ok(Self {
            tracer,
            snapshot_worker,
            port_risks: PortRiskMonitor::start(host.shows_idle_sockets)?,
            supervision,
            pipeline: Pipeline::new(
                probe_count,
                lookups,
                Reported { states: options.states, group: options.only_group },
                options.guard_mode,
                remediation,
                blocked,
                out,
            ),
            self_test: options.self_test,
            guard: GuardMonitor::new(options.guard_mode, guard_thread),
            loss_reporter: LossReporter::default(),
            snapshot_interval: options.snapshot_interval,
            knows_netns: host.offsets[Field::NetnsInum as usize] != ABSENT,
            has_snapshot: false,
            next_snapshot_at: None,
            catch_up: CatchUp::default(),
            unread: 0,
            pending_bind_failures: Vec::new(),
            counters: Counters::default(),
        })
    }

    /// Runs until SIGINT or SIGTERM, until the reader of stdout is gone, or until the self-tests show that
    /// the hooks are dead.
    ///
    /// # Errors
    /// If signals or the ring buffer can't be waited for.
    pub async fn run(mut self) -> io::Result<Option<HooksDead>> {
        let mut signals = Signals::install(self.pipeline.out.can_reopen())?;
        let mut is_stdout_open = self.pipeline.out.flush().is_ok();
        self.supervision.ready(self.tracer.methods());
        let (mut has_more, mut remedied_at) = (false, Instant::now());
        // The first snapshot finds the self-connections that exist already. The hooks are attached, so no
        // later one is missed.
        self.request_snapshot();
        let mut hooks_dead = None;
        while is_stdout_open && hooks_dead.is_none() {
            let wake_at = self.next_wake();
            // Waits for the first source that has something. Every source is then served once.
            tokio::select! {
                biased;
                action = signals.next() => match action {
                    SignalAction::Stop => break,
                    SignalAction::ReopenLog => {
                        self.supervision.reloading();
                        if self.pipeline.out.reopen().is_err() {
                            break;
                        }
                        self.supervision.ready(self.tracer.methods());
                    }
                },
                request = self.supervision.next_metrics_request() => {
                    // An error means that the client is gone. It can be ignored.
                    let _ = request.send(self.collect_metrics());
                }
                () = self.snapshot_worker.ready() => {}
                () = self.port_risks.ready() => {}
                () = self.guard.ready() => {}
                () = self.pipeline.remediation.ready() => {}
                () = self.pipeline.lookups.ready() => {}
                () = self.pipeline.blocked.ready() => {}
                readable = self.tracer.readable() => readable?,
                // The pending events are written below.
                () = self.pipeline.out.ready() => {}
                () = sleep_until_some(wake_at) => {}
                // The runtime looks for signals, and for what else is readable, only while this task waits.
                () = tokio::task::yield_now(), if has_more => {}
            }
            let is_held_back = self.pipeline.out.holds_back_records();
            let drained = if is_held_back { 0 } else { self.drain_batch() };
            let has_more_guarded = !is_held_back && self.drain_guard() == MAX_BATCH;
            if self.pipeline.serve_lookups() || drained > 0 {
                self.loss_reporter.on_records();
            }
            self.serve_workers();
            hooks_dead = self.serve_caught_up(drained == 0 && !is_held_back);
            self.serve_timers();
            // A connection may be closed by a record that is not drained yet. A flood must not stop the remedy.
            if drained < MAX_BATCH || remedied_at.elapsed() > RECORD_TIMEOUT {
                remedied_at = Instant::now();
                let Pipeline { remediation, out, .. } = &mut self.pipeline;
                remediation.start_due_steps(out);
            }
            is_stdout_open = self.pipeline.out.make_room().await.is_ok();
            // A filling stdout wakes the loop.
            let can_emit = self.pipeline.has_backlog() && !self.pipeline.out.is_filling();
            has_more = drained == MAX_BATCH || has_more_guarded || is_held_back || can_emit;
        }
        self.supervision.stopping();
        let Pipeline { remediation, out, .. } = &mut self.pipeline;
        remediation.finish(out).await;
        self.guard.stop().await;
        // Events from before the signal are still reported. From here on nothing is observed.
        self.tracer.detach();
        let program_counters = self.drain_remaining().await;
        self.emit_due_preventions(true);
        self.pipeline.emit_all_pending().await;
        let (losses, open) = (self.losses(), self.pipeline.connections.iter().count());
        self.pipeline.out.stop(losses, open as u64, program_counters).await;
        Ok(hooks_dead)
    }

    /// When the loop has something to do although nothing happens.
    fn next_wake(&self) -> Option<Instant> {
        let times = [
            self.pipeline.remediation.next_at(),
            self.pipeline.blocked.next_at(),
            self.port_risks.next_at(),
            self.guard.next_at(),
            self.self_test.next_at(),
            self.loss_reporter.next_at(),
            self.next_snapshot_at,
            (!self.catch_up.is_empty()).then(|| Instant::now() + RECORD_POLL_INTERVAL),
            self.pipeline.has_backlog().then(|| Instant::now() + BACKLOG_POLL_INTERVAL),
        ];
        times.into_iter().flatten().min()
    }

    /// Takes the responses of the workers that are there.
    fn serve_workers(&mut self) {
        self.pipeline.serve_blocked();
        if let Some(snapshot) = self.snapshot_worker.try_response() {
            self.wait_for_records(AfterRecords::Reconcile(Box::new(snapshot)));
        }
        match self.pipeline.remediation.try_response() {
            Some(SocketResponse::LookedUp(number, cookie_result)) => {
                self.wait_for_records(AfterRecords::LookedUp(number, cookie_result));
            }
            Some(SocketResponse::Destroyed(number, began_ns, outcome)) => {
                let Pipeline { remediation, out, .. } = &mut self.pipeline;
                remediation.on_destroyed(number, began_ns, outcome, out);
            }
            None => {}
        }
        while let Some(report) = self.guard.try_report() {
            for unguarded in report.unguarded {
                let event = Unguarded { netns: unguarded.id.inode, why: unguarded.why };
                self.pipeline.out.emit(EventKind::Unguarded(event));
            }
        }
        if let Some(response) = self.port_risks.try_response() {
            self.evaluate_port_risks(&response);
        }
    }

    /// Keeps `then` until every record that is matched by now is applied.
    fn wait_for_records(&mut self, then: AfterRecords) {
        self.update_counters();
        let Counters { matched, ring_full, .. } = self.counters;
        self.catch_up.push(matched.saturating_sub(ring_full), Instant::now() + RECORD_TIMEOUT, then);
    }

    /// Does what waited for records that are applied now. `Some`: the hooks are dead.
    fn serve_caught_up(&mut self, is_ring_empty: bool) -> Option<HooksDead> {
        while let Some(then) = self.catch_up.next(self.tracer.delivered(), is_ring_empty, Instant::now()) {
            match then {
                AfterRecords::Reconcile(snapshot) => {
                    self.reconcile(*snapshot);
                    self.next_snapshot_at = Some(Instant::now() + self.snapshot_interval);
                }
                AfterRecords::LookedUp(number, cookie_result) => self.on_looked_up(number, cookie_result),
                AfterRecords::EvaluateSelfTest => {
                    if let Some(dead) = self.self_test.evaluate(self.tracer.counters()) {
                        self.loss_reporter.report_dead_hooks(&dead, &mut self.pipeline.out);
                        return Some(HooksDead(dead));
                    }
                }
            }
        }
        None
    }

    fn on_looked_up(&mut self, number: u64, cookie_result: Result<Option<Cookie>, String>) {
        let Pipeline { remediation, out, .. } = &mut self.pipeline;
        remediation.on_looked_up(number, cookie_result, out);
    }

    /// Does what is due.
    fn serve_timers(&mut self) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        self.check_port_risks();
        self.self_test.begin_if_due(|| self.tracer.counters());
        if self.self_test.can_evaluate()
            && !self.catch_up.has(|then| matches!(then, AfterRecords::EvaluateSelfTest))
        {
            self.wait_for_records(AfterRecords::EvaluateSelfTest);
        }
        if is_due(self.guard.next_at()) {
            self.emit_due_preventions(false);
        }
        if is_due(self.next_snapshot_at) {
            self.next_snapshot_at = None;
            self.request_snapshot();
        }
        if is_due(self.loss_reporter.next_at()) {
            self.report_losses();
            self.loss_reporter.reschedule(&self.pipeline.out);
        }
    }

    /// Drains the rest of the ring buffer after the probes are detached. A probe may still be running on
    /// another CPU: waits for the records that are counted as matched.
    async fn drain_remaining(&mut self) -> ProgramCounters {
        let until = Instant::now() + RECORD_TIMEOUT;
        let mut worked = Duration::ZERO;
        loop {
            // A closed stdout is detected at the next flush.
            let _ = self.pipeline.out.make_room().await;
            if self.pipeline.out.holds_back_records() {
                continue;
            }
            let began = Instant::now();
            let drained = self.drain_batch();
            self.pipeline.serve_lookups();
            worked += began.elapsed();
            if drained > 0 && worked < FINAL_DRAIN_TIMEOUT {
                continue;
            }
            self.report_losses();
            let Counters { matched, ring_full, connect_table_full, .. } = self.counters;
            let delivered = self.tracer.delivered() - self.pending_bind_failures.len() as u64;
            if matched == delivered + ring_full || Instant::now() > until {
                self.unread = matched.saturating_sub(delivered + ring_full);
                return ProgramCounters {
                    matched,
                    delivered,
                    not_examined: self.tracer.not_examined(),
                    not_remembered: connect_table_full,
                };
            }
            sleep(RECORD_POLL_INTERVAL).await;
        }
    }

    /// Drains and handles at most [`MAX_BATCH`] records of each ring buffer. Returns their number, or
    /// [`MAX_BATCH`] if there may be more.
    fn drain_batch(&mut self) -> usize {
        self.pipeline.begin_batch();
        let clock = Offset::now();
        let Self { tracer, pipeline, port_risks, self_test, pending_bind_failures, loss_reporter, .. } = self;
        let room = MAX_BATCH.saturating_sub(pending_bind_failures.len());
        let bind_failures = tracer.drain_bind_failures(room);
        let bind_failure_count = bind_failures.len();
        pending_bind_failures.extend(bind_failures);
        if !pending_bind_failures.is_empty() {
            loss_reporter.on_records();
        }
        let drained = tracer.drain(MAX_BATCH, |record, refused| match record {
            Record::Transition(transition) if self_test.consume(transition) => {}
            Record::Transition(transition) => pipeline.apply(transition, refused, clock),
            Record::RefusedConnects(destination) => port_risks.on_threshold(*destination),
            Record::ListenerClosed(endpoint) => port_risks.on_listener_closed(endpoint),
            Record::BindFailure(failure) => pipeline.on_bind_failure(failure, clock),
        });
        // Every transition from before these failed binds is applied now, if the ring buffer was emptied.
        if drained < MAX_BATCH {
            for failure in pending_bind_failures.drain(..) {
                pipeline.on_bind_failure(&failure, clock);
            }
        }
        if bind_failure_count == room { MAX_BATCH } else { MAX_BATCH.min(drained + bind_failure_count) }
    }

    /// Emits `prevented` where it is due. `all`: also what is pending, because the run ends.
    fn emit_due_preventions(&mut self, all: bool) {
        self.update_counters();
        let lost = self.counters.guard_ring_full;
        while all && self.drain_guard() == MAX_BATCH {}
        for due in self.guard.take_due(Instant::now(), lost, all) {
            self.pipeline.on_prevented(&due);
        }
    }

    /// Drains at most [`MAX_BATCH`] records of the guard. Returns their number.
    fn drain_guard(&mut self) -> usize {
        let records = self.tracer.drain_guard(MAX_BATCH);
        for record in &records {
            match record {
                GuardRecord::Prevention(prevention) => {
                    if let Some(due) = self.guard.on_prevention(prevention, Instant::now()) {
                        self.pipeline.on_prevented(&due);
                    }
                }
                GuardRecord::FirstConnect(first) => {
                    if let Some(thread) = self.guard.thread() {
                        thread.on_first_connect(*first);
                    }
                }
            }
        }
        records.len()
    }

    /// Checks the ports with many refused connects, if a check is due.
    fn check_port_risks(&mut self) {
        let now_ns = clock::boot_ns();
        let mut events = Vec::new();
        let counts = self.tracer.refused_counts();
        if !self.port_risks.check_due_ports(counts, now_ns, |event| events.push(event)) {
            return;
        }
        self.tracer.update_watched_ports(self.port_risks.tracked());
        for event in events {
            self.pipeline.on_port_risk(event, now_ns);
        }
    }

    /// Evaluates the ports at risk with the port ranges that the worker has read.
    fn evaluate_port_risks(&mut self, response: &PortRangeResponse) {
        let Self { tracer, pipeline, port_risks, guard, .. } = self;
        let now_ns = clock::boot_ns();
        // A connect of either family can have this destination.
        let is_taken = |endpoint: &Endpoint| {
            let key = endpoint.table_key();
            pipeline.connections.iter().any(|connection| connection.endpoint.table_key() == key)
        };
        let mut events = Vec::new();
        let guard_in = |netns| guard.mode_in(netns);
        let report = |event| events.push(event);
        port_risks.evaluate(response, tracer.refused_counts(), is_taken, guard_in, now_ns, report);
        for event in events {
            pipeline.on_port_risk(event, now_ns);
        }
    }

    /// Ends the ports at risk, and removes the counts, of the namespaces that have ended.
    fn end_port_risks(&mut self, snapshot: &SocketSnapshot) {
        let has_ended = |destination: &Endpoint, last_ns| {
            last_ns < snapshot.began_ns && snapshot.proves_end_of_netns(destination)
        };
        let mut events = Vec::new();
        self.port_risks.remove_ended(self.tracer.refused_counts(), has_ended, |event| events.push(event));
        for event in events {
            self.pipeline.on_port_risk(event, clock::boot_ns());
        }
    }

    /// Requests a snapshot of the socket table from the worker.
    fn request_snapshot(&mut self) {
        self.pipeline.connections.begin_snapshot();
        let netns_hints =
            if self.pipeline.lookups.can_look_up() { self.opener_threads() } else { Vec::new() };
        self.snapshot_worker.send(netns_hints);
    }

    /// Thread ids of the openers in the connect table. Such a thread may be in a namespace that no process is
    /// in.
    fn opener_threads(&self) -> Vec<u32> {
        let entries = self.tracer.connect_entries().unwrap_or_default();
        let threads: HashSet<u32> = entries.iter().map(|(_, entry)| entry.opener.task.tid).collect();
        threads.into_iter().collect()
    }

    /// Reconciles the tracked connections with a snapshot of the socket table. All records from before the
    /// snapshot must have been drained.
    fn reconcile(&mut self, mut snapshot: SocketSnapshot) {
        let entries = self.tracer.connect_entries().unwrap_or_else(|error| {
            log::error!("the connect table can't be read: {error:#}");
            Vec::new()
        });
        snapshot.add_connect_entries(&entries, self.knows_netns);
        let stale_connects = snapshot.stale_connects(&entries);
        // A self-test in progress is listed, too.
        let is_self_test = |entry: &SocketEntry| {
            entry.cookie.is_some_and(|cookie| self.self_test.is_self_test_socket(cookie))
        };
        snapshot.entries.retain(|entry| !is_self_test(entry));
        let missed = self.pipeline.reconcile(&snapshot, self.knows_netns);
        // Connections of the first snapshot existed before this run. They do not count as missed.
        if self.has_snapshot {
            self.pipeline.missed += missed;
        }
        self.has_snapshot = true;
        self.pipeline.record_time_waits(&snapshot);
        for (sock, at_ns) in stale_connects {
            self.tracer.remove_connect(sock, at_ns);
        }
        self.port_risks.remove_expired_counts(self.tracer.refused_counts());
        self.end_port_risks(&snapshot);
        self.pipeline.bind_conflicts.remove_expired(snapshot.began_ns);
        let connections = self.pipeline.connections.iter().map(|connection| &connection.endpoint);
        let listed = snapshot.entries.iter().map(|entry| &entry.endpoint);
        let time_waits = self.pipeline.bind_conflicts.time_wait_endpoints();
        self.tracer.update_held_ports(connections.chain(listed).chain(time_waits), snapshot.began_ns);
        self.report_losses();
        // A burst since the last snapshot is usually over by now. Its memory is given back.
        memory::trim_heap();
        log::debug!(
            "read the socket table: {} self-connections, {missed} of them new",
            snapshot.entries.len()
        );
    }

    /// Reads the probes' counters, and emits `lost` for every loss since the last call.
    fn report_losses(&mut self) {
        self.update_counters();
        let totals = self.losses().plus(self.pipeline.out.lost());
        let tracer = &self.tracer;
        let Pipeline { connections, bind_conflicts, out, .. } = &mut self.pipeline;
        let owners = || tracer.owners_with_losses();
        let counted = |cause| match cause {
            LossCause::Untracked => connections.take_untracked(),
            LossCause::Binds => bind_conflicts.losses.take_unreported(),
            _ => Vec::new(),
        };
        self.loss_reporter.report(&totals, owners, counted, out);
    }

    fn update_counters(&mut self) {
        match self.tracer.counters() {
            Ok(counters) => self.counters = counters,
            Err(error) => log::error!("the probes' counters can't be read: {error:#}"),
        }
    }

    /// Losses before an event was made.
    fn losses(&self) -> Losses {
        Losses::from([
            (LossCause::Ring, self.counters.ring_full + self.unread),
            (
                LossCause::Binds,
                self.counters.bind_failures_over_rate + self.pipeline.bind_conflicts.losses.total(),
            ),
            (LossCause::Missed, self.pipeline.missed),
            (LossCause::RefusedTable, self.counters.refused_table_full),
            (LossCause::Hooks, self.loss_reporter.dead_hooks()),
            (LossCause::OpenerTable, self.counters.connect_table_full),
            (LossCause::Lookups, self.pipeline.lookups.given_up()),
            (LossCause::Untracked, self.pipeline.connections.untracked()),
        ])
    }

    /// Names of the worker threads that a panic has ended.
    fn ended_workers(&self) -> impl Iterator<Item = &'static str> {
        let others = [
            self.snapshot_worker.ended(),
            self.port_risks.ended_worker(),
            self.pipeline.remediation.ended_worker(),
            self.pipeline.blocked.ended_worker(),
            self.guard.ended_thread(),
        ];
        others.into_iter().flatten().chain(self.pipeline.lookups.ended_workers())
    }

    /// Current values of all exported metrics. Every metric gets its value here.
    fn collect_metrics(&mut self) -> MetricsSnapshot {
        self.update_counters();
        let mut health_problems = Vec::new();
        if !self.tracer.is_attached() {
            health_problems.push("hooks: none is attached".to_owned());
        }
        if !self.self_test.is_healthy() {
            health_problems.push("hooks: the last self-test failed".to_owned());
        }
        if !self.pipeline.out.can_write_log() {
            health_problems.push("log: it can't be written".to_owned());
        }
        health_problems.extend(self.ended_workers().map(|name| format!("thread {name}: it has ended")));
        let hook_and_method = |(method, ()): &(Method, ())| (method.hook().name(), method.name());
        let remedy_counts = self.pipeline.remediation.counts();
        MetricsSnapshot {
            connections: self.pipeline.established_counts,
            connections_open: self.pipeline.connections.iter().count() as u64,
            refused_self_dials: Some(self.counters.refused_connects),
            ports_at_risk: Some(self.port_risks.at_risk() as u64),
            self_tests: self
                .self_test
                .counts()
                .map_or_else(Vec::new, |counts| vec![("passed", counts.passed), ("failed", counts.failed)]),
            blocked_binds: Some(self.pipeline.bind_conflicts.failures()),
            prevented: self
                .guard
                .counts()
                .map_or_else(Vec::new, |_| vec![(self.guard.mode().name(), self.counters.prevented)]),
            guarded_namespaces: self.guard.counts().map(|counts| counts.guarded as u64),
            unguarded_namespaces: self.guard.counts().map(|counts| counts.unguarded as u64),
            guard_failures: self.guard.counts().map(|counts| counts.failures + self.counters.guard_failed),
            remedies: remedy_counts.map(|(outcome, count)| (outcome.name(), count)).collect(),
            lost: self.losses().plus(self.pipeline.out.lost()),
            transitions_not_examined: self.tracer.not_examined(),
            lookups_abandoned: self.pipeline.lookups.abandoned(),
            log_write_errors: self.pipeline.out.log_write_errors(),
            hooks: self.tracer.methods().live.iter().map(hook_and_method).collect(),
            health_problems,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_lets_every_thread_start() {
        let unit = include_str!("../../../packaging/systemd/selfconn.service");
        let limits: Vec<usize> =
            unit.lines().filter_map(|line| line.strip_prefix("TasksMax=")?.parse().ok()).collect();
        assert_eq!(limits, [40]);
        assert!(limits[0] >= 2 * MAX_THREADS, "{MAX_THREADS} threads, and those of a daemon that still ends");
        assert!(unit.contains(&format!("at most {MAX_THREADS} threads")), "the comment in the unit");
    }
}
