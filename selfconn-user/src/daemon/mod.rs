//! The daemon: one loop on one thread owns the tracer, the connections and the outputs. Nothing is shared, so
//! nothing is locked. Work that blocks or changes the network namespace runs on worker threads, which own no
//! state of the daemon.

use std::{
    collections::{HashMap, HashSet},
    io,
    time::Duration,
};

use rustix::process::Signal;
use selfconn_ebpf::{ABSENT, Field, Record};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    bpf::{
        features::KernelFeatures,
        loader::{Counters, Tracer},
    },
    detect::{bind_conflict::BindConflicts, connection::Connections, remediation::Remedy},
    event::{EventKind, Losses, Lost, ProgramCounters},
    metrics,
    output::Outputs,
    sockets::SocketSnapshot,
    system::{
        clock::{self, Offset},
        memory,
        process::Processes,
    },
};

use pipeline::Pipeline;
use self_test::SelfTest;
use supervision::Supervision;
use worker::SnapshotRequest;
use worker::SnapshotResponse;
use worker::SnapshotWorker;

mod bind_conflicts;
mod pipeline;
mod port_ranges;
mod port_risk;
mod remediation;
pub mod self_test;
mod started;
pub mod supervision;
mod worker;

pub use self_test::HooksDead;

/// Maximum number of records drained per loop iteration, so that signals are not starved.
const MAX_BATCH: usize = 1024;

/// Maximum number of batches that [`Daemon::drain_all`] drains. A ring buffer of a usual size holds fewer
/// records.
const MAX_BATCHES: usize = 512;

/// Delay from the first activity until the probes' counters are read and losses are reported. While an output
/// is not writable, losses are checked again after the same delay.
const LOSS_REPORT_DELAY: Duration = Duration::from_secs(1);

/// The state of the event loop.
pub struct Daemon {
    tracer: Tracer,
    snapshot_worker: SnapshotWorker,
    risk: port_risk::PortRiskMonitor,
    supervision: Supervision,
    pipeline: Pipeline,
    /// Time between two snapshots of the socket table.
    snapshot_interval: Duration,
    /// True if the probes can read a socket's network namespace.
    knows_netns: bool,
    /// True if the socket table has been read in this run.
    has_snapshot: bool,
    counters: Counters,
    reported_losses: Losses,
    self_test: SelfTest,
    /// Number of attach methods whose probes do not work any more.
    dead_hooks: u64,
}

impl Daemon {
    /// Creates the daemon and emits `started`. The hooks must be attached already.
    ///
    /// # Errors
    /// If a worker thread can't be started.
    pub fn new(
        host: &KernelFeatures,
        tracer: Tracer,
        supervision: Supervision,
        mut out: Outputs,
        states: bool,
        snapshot_interval: Duration,
        remedy: Option<Remedy>,
    ) -> io::Result<Self> {
        out.emit(EventKind::Started(started::started(host, tracer.methods(), tracer.bind_choice())));
        let probe_count = u8::try_from(tracer.methods().live.len()).unwrap_or(u8::MAX);
        Ok(Self {
            tracer,
            snapshot_worker: SnapshotWorker::start()?,
            risk: port_risk::PortRiskMonitor::start()?,
            supervision,
            pipeline: Pipeline {
                run_id: clock::boot_ns(),
                connections: Connections::new(probe_count),
                processes: Processes::new(host.is_initial_pid_ns),
                attributions: HashMap::new(),
                report_states: states,
                remedy,
                bind_conflicts: BindConflicts::default(),
                out,
                established_counts: metrics::ConnectionCounts::default(),
                missed: 0,
            },
            snapshot_interval,
            knows_netns: host.offsets[Field::NetnsInum as usize] != ABSENT,
            has_snapshot: false,
            counters: Counters::default(),
            reported_losses: Losses::default(),
            self_test: SelfTest::new(),
            dead_hooks: 0,
        })
    }

    /// Runs until SIGINT or SIGTERM, until the reader of stdout is gone, or until the self-tests show that
    /// the hooks are dead.
    ///
    /// # Errors
    /// If signals or the ring buffer can't be waited for.
    pub async fn run(mut self) -> io::Result<Option<HooksDead>> {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Without a file to reopen, SIGHUP keeps its default action: the daemon ends with its terminal.
        let mut hangup = self.pipeline.out.can_reopen().then(|| signal(SignalKind::hangup())).transpose()?;
        // With a handler for SIGXFSZ, a limit on the log's size is a write error and does not kill the
        // daemon.
        let _too_large = signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?;
        let mut is_stdout_open = self.pipeline.out.flush().is_ok();
        self.supervision.ready(self.tracer.methods());
        let mut has_more = false;
        let mut report_losses_at: Option<Instant> = None;
        // The first snapshot finds the self-connections that exist already. The hooks are attached, so no
        // later one is missed.
        let mut next_snapshot_at: Option<Instant> = None;
        self.request_snapshot();
        let mut hooks_dead = None;
        while is_stdout_open && hooks_dead.is_none() {
            let (remedy_at, self_test_at) = (self.next_remedy_at(), self.next_self_test_at());
            let until_check = self.risk.time_until_check();
            tokio::select! {
                biased;
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                () = next_signal(&mut hangup) => {
                    self.supervision.reloading();
                    if self.pipeline.out.reopen().is_err() {
                        break;
                    }
                    self.supervision.ready(self.tracer.methods());
                }
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
                Some(response) = self.snapshot_worker.next_response() => match response {
                    SnapshotResponse::Table(snapshot) => {
                        self.drain_all().await;
                        self.reconcile(snapshot);
                        next_snapshot_at = Some(Instant::now() + self.snapshot_interval);
                    }
                    SnapshotResponse::LookedUp(number, found) => self.on_looked_up(number, found),
                    SnapshotResponse::Destroyed(number, began_ns, outcome) => self.on_destroyed(number, began_ns, outcome),
                },
                () = sleep_until(remedy_at.unwrap_or_else(Instant::now)), if remedy_at.is_some() => {}
                Some(response) = self.risk.next_response() => self.evaluate_port_risks(&response),
                () = sleep(until_check.unwrap_or_default()), if until_check.is_some() => {}
                () = sleep_until(self_test_at.unwrap_or_else(Instant::now)), if self_test_at.is_some() => {}
                () = sleep_until(next_snapshot_at.unwrap_or_else(Instant::now)), if next_snapshot_at.is_some() => {
                    next_snapshot_at = None;
                    self.request_snapshot();
                }
                () = sleep_until(report_losses_at.unwrap_or_else(Instant::now)), if report_losses_at.is_some() => {
                    self.report_losses();
                    report_losses_at = self.pipeline.out.pending().any().then(|| Instant::now() + LOSS_REPORT_DELAY);
                }
            }
            let drained = self.drain_batch();
            has_more = drained == MAX_BATCH;
            self.check_port_risks();
            if !has_more {
                self.start_due_remedies();
            }
            hooks_dead = self.run_self_test();
            is_stdout_open = self.pipeline.out.make_room().await.is_ok();
            if drained > 0 && report_losses_at.is_none() {
                report_losses_at = Some(Instant::now() + LOSS_REPORT_DELAY);
            }
        }
        self.supervision.stopping();
        self.finish_remedies().await;
        // Events from before the signal are still reported. From here on nothing is observed.
        self.tracer.detach();
        let program_counters = self.drain_remaining().await;
        let (losses, open) = (self.losses(), self.pipeline.connections.iter().count());
        self.pipeline.out.stop(losses, open as u64, program_counters).await;
        Ok(hooks_dead)
    }

    /// Drains the rest of the ring buffer after the probes are detached. A probe may still be running on
    /// another CPU: waits for the records that are counted as matched, at most 100 ms, which is longer than
    /// any probe runs.
    async fn drain_remaining(&mut self) -> ProgramCounters {
        let until = Instant::now() + Duration::from_millis(100);
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
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Drains all records so far, and records that arrive meanwhile, within bounds, because a flood would
    /// never end. It must not stop at the first batch that is not full, because a record that is still being
    /// written holds up the records after it.
    async fn drain_all(&mut self) {
        let until = Instant::now() + Duration::from_millis(100);
        for _ in 0..MAX_BATCHES {
            if self.drain_batch() == 0 {
                self.update_counters();
                let Counters { matched, ring_full, .. } = self.counters;
                if matched <= self.tracer.delivered() + ring_full || Instant::now() > until {
                    break;
                }
                sleep(Duration::from_millis(1)).await;
            }
            // A closed stdout is detected at the next flush.
            let _ = self.pipeline.out.make_room().await;
        }
    }

    /// Drains and handles at most [`MAX_BATCH`] records. Returns their number.
    fn drain_batch(&mut self) -> usize {
        let clock = Offset::now();
        let Self { tracer, pipeline, risk, self_test, .. } = self;
        tracer.drain(MAX_BATCH, |record| match record {
            Record::Transition(transition) if self_test.consume(transition) => {}
            Record::Transition(transition) => pipeline.apply(transition, clock),
            Record::RefusedConnects(destination) => risk.on_threshold(*destination),
            Record::BindFailure(failure) => pipeline.on_bind_failure(failure, clock),
        })
    }

    /// Checks the ports with many refused connects, if a check is due.
    fn check_port_risks(&mut self) {
        if self.risk.time_until_check().is_some_and(|until_check| until_check.is_zero()) {
            let Self { tracer, pipeline: Pipeline { processes, out, .. }, risk, .. } = self;
            risk.check_due_ports(tracer.refused_counts(), port_risk::RiskReporter { processes, out });
        }
    }

    /// Evaluates the ports at risk with the port ranges that the worker has read.
    fn evaluate_port_risks(&mut self, response: &port_ranges::PortRangeResponse) {
        let Self { tracer, pipeline: Pipeline { processes, out, connections, .. }, risk, .. } = self;
        // A connect of either family can have this destination.
        let is_taken =
            |endpoint: &_| connections.iter().any(|connection| connection.endpoint.any_family() == *endpoint);
        risk.evaluate(
            response,
            tracer.refused_counts(),
            is_taken,
            port_risk::RiskReporter { processes, out },
        );
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
        self.risk.remove_expired_counts(self.tracer.refused_counts());
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
        let now = self.losses().plus(self.pipeline.out.lost());
        let pending = self.pipeline.out.pending();
        for (loss, is_pending, now, reported) in [
            ("ring", false, now.ring, &mut self.reported_losses.ring),
            ("missed", false, now.missed, &mut self.reported_losses.missed),
            ("log", pending.log, now.log, &mut self.reported_losses.log),
            ("stdout", pending.stdout, now.stdout, &mut self.reported_losses.stdout),
            ("journal", pending.journal, now.journal, &mut self.reported_losses.journal),
            ("refused_table", false, now.refused_table, &mut self.reported_losses.refused_table),
        ] {
            // Losses of an output are reported only after it accepts events again. Otherwise the `lost` event
            // would be dropped, too.
            if now > *reported && !is_pending {
                self.pipeline.out.emit(EventKind::Lost(Lost {
                    r#where: loss,
                    count: now - *reported,
                    method: None,
                }));
                *reported = now;
            }
        }
    }

    fn update_counters(&mut self) {
        match self.tracer.counters() {
            Ok(counters) => self.counters = counters,
            Err(error) => log::error!("the probes' counters can't be read: {error:#}"),
        }
    }

    /// Losses before an event was made.
    fn losses(&self) -> Losses {
        Losses {
            ring: self.counters.ring_full,
            missed: self.pipeline.missed,
            refused_table: self.counters.refused_table_full,
            hooks: self.dead_hooks,
            ..Losses::default()
        }
    }
}

/// Waits for the signal. Without a signal handler it waits forever.
async fn next_signal(signal: &mut Option<tokio::signal::unix::Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
