//! The daemon: one loop on one thread owns the tracer, the parts, and the outputs. Nothing is shared, so
//! nothing is locked. Each part holds its state, and the loop calls it; no part knows the daemon. Work that
//! blocks or changes the network namespace runs on worker threads, which own no state of the daemon.

use std::{collections::VecDeque, io, time::Duration};

use selfconn_ebpf::{ABSENT, Field, bind_failure::BindFailure};
use tokio::time::Instant;

use crate::{
    bpf::{
        features::KernelFeatures,
        loader::{Counters, Tracer},
    },
    budget::cmdline::CmdlineLimit,
    detect::remediation::Remedy,
    event::{EventKind, GuardStatus},
    guard::{GuardMode, start::Guard, thread::GuardThread},
    lookup::Lookups,
    output::Outputs,
    sockets::SocketSnapshot,
    system::{cgroup::WatchedGroup, clock::sleep_until_some, memory},
};
use blocked::BlockedReports;
use catch_up::{AfterRecords, CatchUp};
use gathering::Gathering;
use guarding::GuardMonitor;
use losses::LossReporter;
use pipeline::Pipeline;
use port_risk::PortRiskMonitor;
use records::{MAX_BATCH, RECORD_POLL_INTERVAL, RECORD_TIMEOUT};
use remediation::Remediation;
use remedy_worker::SocketResponse;
use reporting::{Reported, Reporting};
use self_test::SelfTest;
use signals::{SignalAction, Signals};
use snapshots::Snapshots;
use supervision::Supervision;
use thread_watch::ThreadWatch;

mod blocked;
mod blocked_event;
mod catch_up;
mod gathering;
mod guarding;
mod losses;
mod pending;
mod pipeline;
mod port_conflicts;
mod port_ranges;
mod port_risk;
mod prevented;
mod records;
mod remediation;
mod remedy_worker;
mod reporting;
pub mod self_test;
mod signals;
mod snapshot_worker;
mod snapshots;
mod started;
mod status;
pub mod supervision;
mod thread_watch;
mod waiting_ports;

pub use self_test::HooksDead;

/// The most threads that a daemon has at the same time. The unit's `TasksMax` must not be below it.
///
/// The loop; `metrics`; the writer of stdout or the journal; `stderr`; `holders`; `tables`; `reader`, `ranges`, `remedy`
/// and `guard`, each with a thread that enters a namespace; and the readers of facts and of command lines, all of which
/// may be stuck.
pub const MAX_THREADS: usize = 6 + 4 * 2 + 2 * crate::lookup::MAX_STUCK;

/// Maximum time between two looks at stdout while events of a snapshot wait for room.
const BACKLOG_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The interval in which the loop looks whether records must still wait for a slow reader of stdout.
const HELD_BACK_POLL_INTERVAL: Duration = Duration::from_millis(100);

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
    snapshots: Snapshots,
    port_risks: PortRiskMonitor,
    supervision: Supervision,
    pipeline: Pipeline,
    self_test: SelfTest,
    guard: GuardMonitor,
    loss_reporter: LossReporter,
    thread_watch: ThreadWatch,
    /// What waits until every record from before it is applied.
    catch_up: CatchUp<AfterRecords>,
    /// Records that were still in the ring buffer at the end of the run.
    unread: u64,
    /// Failed binds that wait until every earlier transition is applied.
    pending_bind_failures: Vec<BindFailure>,
    /// Failed binds that wait for their turn only.
    ready_bind_failures: VecDeque<BindFailure>,
    /// The probes' counters, as last read.
    counters: Counters,
    gathering: Gathering,
    /// True if the records wait for the reader of stdout since the last turn.
    is_held_back: bool,
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
        let knows_netns = host.offsets[Field::NetnsInum as usize] != ABSENT;
        let snapshots = Snapshots::start(iterators, options.snapshot_interval, knows_netns)?;
        let reported = Reported { states: options.states, group: options.only_group };
        let reporting = Reporting::new(lookups, reported, out);
        Ok(Self {
            tracer,
            snapshots,
            port_risks: PortRiskMonitor::start(host.shows_idle_sockets)?,
            supervision,
            pipeline: Pipeline::new(
                probe_count,
                host.is_initial_pid_ns.then(std::process::id),
                reporting,
                options.guard_mode,
                remediation,
                blocked,
            ),
            self_test: options.self_test,
            guard: GuardMonitor::new(options.guard_mode, guard_thread),
            loss_reporter: LossReporter::default(),
            thread_watch: ThreadWatch::default(),
            catch_up: CatchUp::default(),
            unread: 0,
            pending_bind_failures: Vec::new(),
            ready_bind_failures: VecDeque::new(),
            counters: Counters::default(),
            gathering: Gathering::default(),
            is_held_back: false,
        })
    }

    /// Runs until SIGINT or SIGTERM, until the reader of stdout is gone, or until the self-tests show that
    /// the hooks are dead.
    ///
    /// # Errors
    /// If signals or the ring buffer can't be waited for.
    pub async fn run(mut self) -> io::Result<Option<HooksDead>> {
        let mut signals = Signals::install(self.pipeline.reporting.out.can_reopen())?;
        let mut is_stdout_open = self.pipeline.reporting.out.flush().is_ok();
        self.supervision.ready(self.tracer.methods());
        let (mut has_more, mut remedied_at) = (false, Instant::now());
        // The first snapshot finds the self-connections that exist already. The hooks are attached, so no
        // later one is missed.
        self.snapshots.request(&self.tracer, &mut self.pipeline);
        let mut hooks_dead = None;
        while is_stdout_open && hooks_dead.is_none() {
            // Records that wait for stdout wake nobody.
            let gathers = self.gathering.until().is_some() || self.is_held_back;
            let wake_at = self.next_wake();
            // Waits for the first source that has something. Every source is then served once.
            tokio::select! {
                biased;
                action = signals.next() => match action {
                    SignalAction::Stop => break,
                    SignalAction::ReopenLog => {
                        self.supervision.reloading();
                        if self.pipeline.reporting.out.reopen().is_err() {
                            break;
                        }
                        self.supervision.ready(self.tracer.methods());
                    }
                },
                request = self.supervision.next_metrics_request() => {
                    // An error means that the client is gone. It can be ignored.
                    let _ = request.send(self.collect_metrics());
                }
                () = self.snapshots.ready() => {}
                () = self.port_risks.ready() => {}
                () = self.guard.ready() => {}
                () = self.pipeline.remediation.ready() => {}
                () = self.pipeline.reporting.lookups.ready() => {}
                () = self.pipeline.conflicts.reports.ready() => {}
                readable = self.tracer.readable(gathers) => readable?,
                // The pending events are written below.
                () = self.pipeline.reporting.out.ready() => {}
                () = sleep_until_some(wake_at) => {}
                // The runtime looks for signals, and for what else is readable, only while this task waits.
                () = tokio::task::yield_now(), if has_more => {}
            }
            let is_held_back = self.pipeline.reporting.out.holds_back_records();
            let drained = if is_held_back { 0 } else { self.drain_batch() };
            self.gathering.on_read(drained, drained == MAX_BATCH, Instant::now());
            self.defer_bind_failures();
            // The guard's records don't wait for stdout: with them come the namespaces that must be guarded.
            let has_more_guarded = self.serve_guard();
            if self.pipeline.serve_lookups() || drained > 0 {
                self.loss_reporter.schedule();
            }
            self.serve_workers();
            hooks_dead = self.serve_caught_up(drained == 0 && !is_held_back);
            let has_more_failures = self.serve_bind_failures();
            self.serve_timers();
            // A connection may be closed by a record that is not drained yet. A flood must not stop the remedy.
            if drained < MAX_BATCH || remedied_at.elapsed() > RECORD_TIMEOUT {
                remedied_at = Instant::now();
                let Pipeline { remediation, reporting, .. } = &mut self.pipeline;
                remediation.start_due_steps(&mut reporting.out);
            }
            is_stdout_open = self.pipeline.reporting.out.flush().is_ok();
            // A filling stdout wakes the loop.
            let can_emit = self.pipeline.has_backlog() && self.pipeline.has_room();
            // The ring buffer wakes nobody for what was in it while it was held back.
            self.is_held_back = self.pipeline.reporting.out.holds_back_records();
            let can_read = is_held_back && !self.is_held_back;
            has_more = drained == MAX_BATCH || has_more_failures || has_more_guarded || can_emit || can_read;
        }
        self.supervision.stopping();
        let Pipeline { remediation, reporting, .. } = &mut self.pipeline;
        reporting.out.begin_end();
        remediation.finish(&mut reporting.out).await;
        // From here on the guard refuses nothing, so its records and its counters are complete when they are read
        // below.
        self.guard.stop().await;
        // Events from before the signal are still reported. From here on nothing is observed. The end of the process
        // would detach the programs, too, but not while one of its threads hangs in the kernel.
        self.tracer.detach();
        let program_counters = self.drain_remaining().await;
        self.emit_due_preventions(true);
        self.pipeline.emit_all_pending().await;
        // What waited may be lost.
        self.report_losses();
        let (losses, open) = (self.losses(), self.pipeline.connections.iter().count());
        self.pipeline.reporting.out.stop(losses, open as u64, program_counters).await;
        Ok(hooks_dead)
    }

    /// When the loop has something to do although nothing happens.
    fn next_wake(&self) -> Option<Instant> {
        let after = |interval| Some(Instant::now() + interval);
        let times = [
            self.pipeline.remediation.next_at(),
            self.pipeline.conflicts.reports.next_at(),
            self.port_risks.next_at(),
            self.guard.next_at(),
            self.guard.read_at(),
            self.gathering.until(),
            // The end of one that waits for records does not come by waiting for its time.
            self.self_test.next_at().filter(|_| !self.evaluates_self_test()),
            self.loss_reporter.next_at(),
            Some(self.thread_watch.next_at()),
            self.snapshots.next_at(),
            match (self.is_held_back, self.catch_up.is_empty()) {
                // A reader that stalls meanwhile wakes nobody.
                (true, _) => after(HELD_BACK_POLL_INTERVAL),
                (false, false) => after(RECORD_POLL_INTERVAL),
                (false, true) => None,
            },
            self.pipeline.has_backlog().then(|| Instant::now() + BACKLOG_POLL_INTERVAL),
        ];
        times.into_iter().flatten().min()
    }

    /// True if the end of a self-test waits for records.
    fn evaluates_self_test(&self) -> bool {
        self.catch_up.count(|then| matches!(then, AfterRecords::EvaluateSelfTest)) > 0
    }

    /// Takes the responses of the workers that are there.
    fn serve_workers(&mut self) {
        if self.pipeline.serve_blocked() {
            self.loss_reporter.schedule();
        }
        if let Some(snapshot) = self.snapshots.try_take() {
            self.wait_for_records(AfterRecords::Reconcile(Box::new(snapshot)));
        }
        match self.pipeline.remediation.try_response() {
            Some(SocketResponse::LookedUp(number, cookie_result)) => {
                self.wait_for_records(AfterRecords::LookedUp(number, cookie_result));
            }
            Some(SocketResponse::Destroyed(number, began_ns, outcome)) => {
                let Pipeline { remediation, reporting, .. } = &mut self.pipeline;
                remediation.on_destroyed(number, began_ns, outcome, &mut reporting.out);
            }
            None => {}
        }
        self.guard.serve_reports(&mut self.pipeline.reporting.out);
        let Self { tracer, pipeline, port_risks, guard, .. } = self;
        let Pipeline { connections, reporting, .. } = pipeline;
        let guard_in = |netns| guard.mode_in(netns);
        port_risks.serve_response(tracer.refused_counts(), connections, guard_in, reporting);
    }

    /// Does what is due.
    fn serve_timers(&mut self) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        self.port_risks.check_due_ports(&mut self.tracer, &mut self.pipeline.reporting);
        self.self_test.begin_if_due(|| self.tracer.counters());
        if self.self_test.can_evaluate() && !self.evaluates_self_test() {
            self.wait_for_records(AfterRecords::EvaluateSelfTest);
        }
        if is_due(self.guard.next_at()) {
            self.emit_due_preventions(false);
        }
        if is_due(self.snapshots.next_at()) {
            self.snapshots.request(&self.tracer, &mut self.pipeline);
        }
        if is_due(Some(self.thread_watch.next_at())) {
            let problems: Vec<_> = self.thread_problems().collect();
            self.thread_watch.look(problems.into_iter());
        }
        if is_due(self.loss_reporter.next_at()) {
            self.report_losses();
            self.loss_reporter.reschedule(&self.pipeline.reporting.out);
        }
    }

    /// Emits `prevented` where it is due. `all`: also what is pending, because the run ends.
    fn emit_due_preventions(&mut self, all: bool) {
        self.update_counters();
        let lost = self.counters.guard_ring_full;
        if all {
            self.guard.read_at_once();
            while self.serve_guard() {}
        }
        for due in self.guard.take_due(Instant::now(), lost, all) {
            self.pipeline.on_prevented(&due);
        }
    }

    /// Reads the guard's records. True if there may be more.
    fn serve_guard(&mut self) -> bool {
        let Self { guard, tracer, pipeline, .. } = self;
        guard.serve_records(tracer, MAX_BATCH, Instant::now(), |due| pipeline.on_prevented(due))
    }

    /// Applies a snapshot. All records from before it must have been drained.
    fn apply_snapshot(&mut self, mut snapshot: SocketSnapshot) {
        let Self { snapshots, tracer, pipeline, port_risks, self_test, .. } = self;
        let found = snapshots.apply(&mut snapshot, tracer, pipeline, self_test);
        port_risks.on_snapshot(&snapshot, tracer.refused_counts(), &mut pipeline.reporting);
        self.report_losses();
        // A burst since the last snapshot is usually over by now. Its memory is given back.
        memory::trim_heap();
        let listed = snapshot.entries.len();
        log::debug!("read the socket table: {listed} self-connections, {found} of them new");
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
        assert_eq!(limits, [48]);
        assert!(limits[0] >= 2 * MAX_THREADS, "{MAX_THREADS} threads, and those of a daemon that still ends");
        assert!(unit.contains(&format!("at most {MAX_THREADS} threads")), "the comment in the unit");
    }
}
