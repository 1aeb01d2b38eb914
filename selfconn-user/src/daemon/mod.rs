//! The daemon: one loop on one thread owns the tracer, the parts, and the outputs. Nothing is shared, so
//! nothing is locked. Each part holds its state, and the loop calls it; no part knows the daemon. Work that
//! blocks or changes the network namespace runs on worker threads, which own no state of the daemon.

use std::{collections::HashSet, io, time::Duration};

use selfconn_ebpf::{ABSENT, Endpoint, Field, Record};
use tokio::time::{Instant, sleep};

use crate::{
    bpf::{
        attach::Method,
        features::KernelFeatures,
        loader::{Counters, Tracer},
    },
    detect::remediation::Remedy,
    event::{EventKind, LossCause, Losses, ProgramCounters},
    metrics::MetricsSnapshot,
    output::Outputs,
    sockets::SocketSnapshot,
    system::{
        clock::{Offset, sleep_until_some},
        memory,
        process::Processes,
    },
};
use losses::LossReporter;
use pipeline::Pipeline;
use port_ranges::PortRangeResponse;
use port_risk::{PortRiskMonitor, RiskReporter};
use remediation::Remediation;
use self_test::SelfTest;
use signals::{SignalAction, Signals};
use snapshot_worker::{SnapshotRequest, SnapshotResponse, SnapshotWorker};
use supervision::Supervision;

mod losses;
mod pipeline;
mod port_ranges;
mod port_risk;
mod remediation;
pub mod self_test;
mod signals;
mod snapshot_worker;
mod started;
pub mod supervision;
mod worker;

pub use self_test::HooksDead;

/// Maximum number of records drained per loop iteration, so that signals are not starved.
const MAX_BATCH: usize = 1024;

/// Maximum number of batches that [`Daemon::drain_all`] drains. A ring buffer of a usual size holds fewer
/// records.
const MAX_BATCHES: usize = 512;

/// Maximum time to wait for a record that a probe has counted and not yet written. It is longer than any probe
/// runs.
const RECORD_TIMEOUT: Duration = Duration::from_millis(100);

/// Time between two looks at the ring buffer while such a record is missing.
const RECORD_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The options of a run, for the parts that need them.
pub struct DaemonOptions {
    /// True to report every state change.
    pub states: bool,
    /// Time between two snapshots of the socket table.
    pub snapshot_interval: Duration,
    pub remedy: Option<Remedy>,
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
    loss_reporter: LossReporter,
    snapshot_interval: Duration,
    /// True if the probes can read a socket's network namespace.
    knows_netns: bool,
    /// True if the socket table has been read in this run.
    has_snapshot: bool,
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
        out.emit(EventKind::Started(started::started(host, &tracer)));
        let probe_count = u8::try_from(tracer.methods().live.len()).unwrap_or(u8::MAX);
        let processes = Processes::new(host.is_initial_pid_ns);
        let remediation = Remediation::new(options.remedy);
        let snapshot_worker = snapshot_worker::start(tracer.take_descriptor_iter())?;
        Ok(Self {
            tracer,
            snapshot_worker,
            port_risks: PortRiskMonitor::start()?,
            supervision,
            pipeline: Pipeline::new(probe_count, processes, options.states, remediation, out),
            self_test: options.self_test,
            loss_reporter: LossReporter::default(),
            snapshot_interval: options.snapshot_interval,
            knows_netns: host.offsets[Field::NetnsInum as usize] != ABSENT,
            has_snapshot: false,
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
        let mut has_more = false;
        // The first snapshot finds the self-connections that exist already. The hooks are attached, so no
        // later one is missed.
        let mut next_snapshot_at: Option<Instant> = None;
        self.request_snapshot();
        let mut hooks_dead = None;
        while is_stdout_open && hooks_dead.is_none() {
            let remedy_at = self.pipeline.remediation.next_at();
            let port_check_at = self.port_risks.next_at();
            let self_test_at = self.self_test.next_at();
            let loss_report_at = self.loss_reporter.next_at();
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
                // Before the records, because their stream may never end. Requests arrive at most a few times
                // a second.
                request = self.supervision.next_metrics_request() => {
                    // An error means that the client is gone. It can be ignored.
                    let _ = request.send(self.collect_metrics());
                }
                () = std::future::ready(()), if has_more => {}
                readable = self.tracer.readable() => readable?,
                // The pending events are written below.
                () = self.pipeline.out.ready() => {}
                response = self.snapshot_worker.response() => match response {
                    SnapshotResponse::Table(snapshot) => {
                        self.drain_all().await;
                        self.reconcile(snapshot);
                        next_snapshot_at = Some(Instant::now() + self.snapshot_interval);
                    }
                    SnapshotResponse::LookedUp(number, cookie_result) => {
                        while self.drain_batch() > 0 {}
                        let Self { pipeline: Pipeline { remediation, out, .. }, snapshot_worker, .. } = &mut self;
                        remediation.on_looked_up(number, cookie_result, snapshot_worker, out);
                    }
                    SnapshotResponse::Destroyed(number, began_ns, outcome) => {
                        let Pipeline { remediation, out, .. } = &mut self.pipeline;
                        remediation.on_destroyed(number, began_ns, outcome, out);
                    }
                },
                response = self.port_risks.response() => self.evaluate_port_risks(&response),
                // What is due is done below.
                () = sleep_until_some(remedy_at) => {}
                () = sleep_until_some(port_check_at) => {}
                () = sleep_until_some(self_test_at) => {}
                () = sleep_until_some(next_snapshot_at) => {
                    next_snapshot_at = None;
                    self.request_snapshot();
                }
                () = sleep_until_some(loss_report_at) => {
                    self.report_losses();
                    self.loss_reporter.reschedule(&self.pipeline.out);
                }
            }
            let drained = self.drain_batch();
            has_more = drained == MAX_BATCH;
            if drained > 0 {
                self.loss_reporter.on_records();
            }
            self.check_port_risks();
            if !has_more {
                let Pipeline { remediation, out, .. } = &mut self.pipeline;
                remediation.start_due_steps(&self.snapshot_worker, out);
            }
            hooks_dead = self.run_self_test();
            is_stdout_open = self.pipeline.out.make_room().await.is_ok();
        }
        self.supervision.stopping();
        let Self { pipeline: Pipeline { remediation, out, .. }, snapshot_worker, .. } = &mut self;
        remediation.finish(snapshot_worker, out).await;
        // Events from before the signal are still reported. From here on nothing is observed.
        self.tracer.detach();
        let program_counters = self.drain_remaining().await;
        let (losses, open) = (self.losses(), self.pipeline.connections.iter().count());
        self.pipeline.out.stop(losses, open as u64, program_counters).await;
        Ok(hooks_dead)
    }

    /// Drains the rest of the ring buffer after the probes are detached. A probe may still be running on
    /// another CPU: waits for the records that are counted as matched.
    async fn drain_remaining(&mut self) -> ProgramCounters {
        let until = Instant::now() + RECORD_TIMEOUT;
        loop {
            self.drain_all().await;
            self.report_losses();
            let Counters { matched, ring_full, connect_table_full, .. } = self.counters;
            let delivered = self.tracer.delivered();
            if matched == delivered + ring_full || Instant::now() > until {
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

    /// Drains all records so far, and records that arrive meanwhile, within bounds, because a flood would
    /// never end. It must not stop at the first batch that is not full, because a record that is still being
    /// written holds up the records after it.
    async fn drain_all(&mut self) {
        let until = Instant::now() + RECORD_TIMEOUT;
        for _ in 0..MAX_BATCHES {
            if self.drain_batch() == 0 {
                self.update_counters();
                let Counters { matched, ring_full, .. } = self.counters;
                if matched <= self.tracer.delivered() + ring_full || Instant::now() > until {
                    break;
                }
                sleep(RECORD_POLL_INTERVAL).await;
            }
            // A closed stdout is detected at the next flush.
            let _ = self.pipeline.out.make_room().await;
        }
    }

    /// Drains and handles at most [`MAX_BATCH`] records. Returns their number.
    fn drain_batch(&mut self) -> usize {
        let clock = Offset::now();
        let Self { tracer, pipeline, port_risks, self_test, .. } = self;
        tracer.drain(MAX_BATCH, |record| match record {
            Record::Transition(transition) if self_test.consume(transition) => {}
            Record::Transition(transition) => pipeline.apply(transition, clock),
            Record::RefusedConnects(destination) => port_risks.on_threshold(*destination),
            Record::BindFailure(failure) => pipeline.on_bind_failure(failure, clock),
        })
    }

    /// Checks the ports with many refused connects, if a check is due.
    fn check_port_risks(&mut self) {
        let Self { tracer, pipeline: Pipeline { processes, out, .. }, port_risks, .. } = self;
        port_risks.check_due_ports(tracer.refused_counts(), RiskReporter { processes, out });
    }

    /// Evaluates the ports at risk with the port ranges that the worker has read.
    fn evaluate_port_risks(&mut self, response: &PortRangeResponse) {
        let Self { tracer, pipeline: Pipeline { processes, out, connections, .. }, port_risks, .. } = self;
        // A connect of either family can have this destination.
        let is_taken = |endpoint: &Endpoint| {
            connections.iter().any(|connection| connection.endpoint.table_key() == endpoint.table_key())
        };
        let reporter = RiskReporter { processes, out };
        port_risks.evaluate(response, tracer.refused_counts(), is_taken, reporter);
    }

    /// Begins or evaluates a self-test, if due. `Some`: the hooks are dead.
    fn run_self_test(&mut self) -> Option<HooksDead> {
        self.self_test.begin_if_due(&self.tracer);
        if !self.self_test.can_evaluate() {
            return None;
        }
        while self.drain_batch() > 0 {}
        let dead = self.self_test.evaluate(&self.tracer)?;
        self.loss_reporter.report_dead_hooks(&dead, &mut self.pipeline.out);
        Some(HooksDead(dead))
    }

    /// Requests a snapshot of the socket table from the worker.
    fn request_snapshot(&mut self) {
        self.pipeline.connections.begin_snapshot();
        let netns_hints =
            if self.pipeline.processes.can_look_up() { self.opener_threads() } else { Vec::new() };
        self.snapshot_worker.send(SnapshotRequest::Table(netns_hints));
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
        let missed = self.pipeline.reconcile(&snapshot, self.knows_netns);
        // Connections of the first snapshot existed before this run. They do not count as missed.
        if self.has_snapshot {
            self.pipeline.missed += missed;
        }
        self.has_snapshot = true;
        self.pipeline.record_time_waits(&snapshot);
        for sock in snapshot.stale_connects(&entries) {
            self.tracer.remove_connect(sock);
        }
        self.port_risks.remove_expired_counts(self.tracer.refused_counts());
        self.pipeline.bind_conflicts.remove_expired(snapshot.began_ns);
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
        self.loss_reporter.report(&totals, &mut self.pipeline.out);
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
            (LossCause::Ring, self.counters.ring_full),
            (LossCause::Missed, self.pipeline.missed),
            (LossCause::RefusedTable, self.counters.refused_table_full),
            (LossCause::Hooks, self.loss_reporter.dead_hooks()),
            (LossCause::OpenerTable, self.counters.connect_table_full),
        ])
    }

    /// Current values of all exported metrics. Every metric gets its value here.
    fn collect_metrics(&mut self) -> MetricsSnapshot {
        self.update_counters();
        let mut health_problems = Vec::new();
        if !self.tracer.is_attached() {
            health_problems.push("hooks: none is attached");
        }
        if !self.self_test.is_healthy() {
            health_problems.push("hooks: the last self-test failed");
        }
        if !self.pipeline.out.can_write_log() {
            health_problems.push("log: it can't be written");
        }
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
            remedies: remedy_counts.map(|(outcome, count)| (outcome.name(), count)).collect(),
            lost: self.losses().plus(self.pipeline.out.lost()),
            transitions_not_examined: self.tracer.not_examined(),
            log_write_errors: self.pipeline.out.log_write_errors(),
            hooks: self.tracer.methods().live.iter().map(hook_and_method).collect(),
            health_problems,
        }
    }
}
