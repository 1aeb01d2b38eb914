//! Records in the loop: they are taken from the ring buffers in batches, and what waits for them is done when they are
//! applied.

use std::time::Duration;

use selfconn_ebpf::Record;
use tokio::time::{Instant, sleep};

use super::{Daemon, catch_up::AfterRecords, pipeline::Pipeline, self_test::HooksDead};
use crate::{bpf::loader::Counters, event::ProgramCounters, sockets::Cookie, system::clock::Offset};

/// Maximum number of records drained per loop iteration, so that every other source gets its turn.
pub(super) const MAX_BATCH: usize = 1024;

/// Maximum time that the end of a run works on the records in the ring buffer, without the time in which a slow
/// reader of stdout is waited for. The rest counts as lost. A full ring buffer of the usual size takes 0.4 s.
const FINAL_DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time to wait for a record that a probe has counted and not yet written. It is longer than any probe
/// runs.
pub(super) const RECORD_TIMEOUT: Duration = Duration::from_millis(100);

/// Time between two looks at the ring buffer while such a record is missing.
pub(super) const RECORD_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// How long failed binds are handled before every other source gets its turn.
const MAX_BIND_FAILURES_TIME: Duration = Duration::from_millis(10);

/// Maximum number of times that failed binds wait for records at the same time. More stay in the ring buffer.
const MAX_DEFERRED: usize = 4;

impl Daemon {
    /// Drains and handles at most [`MAX_BATCH`] records of each ring buffer, and no more when stdout is filling. Returns
    /// their number, or [`MAX_BATCH`] if there may be more.
    pub(super) fn drain_batch(&mut self) -> usize {
        self.pipeline.begin_batch();
        let clock = Offset::now();
        let has_deferred = self.deferred_bind_failures() > 0;
        let Self { tracer, pipeline, port_risks, self_test, loss_reporter, .. } = self;
        let Self { pending_bind_failures, ready_bind_failures, .. } = self;
        let room = MAX_BATCH.saturating_sub(pending_bind_failures.len() + ready_bind_failures.len());
        let bind_failures = tracer.drain_bind_failures(room);
        let bind_failure_count = bind_failures.len();
        pending_bind_failures.extend(bind_failures);
        if !pending_bind_failures.is_empty() {
            loss_reporter.schedule();
        }
        let drained = tracer.drain_while(MAX_BATCH, |record, refused| {
            match record {
                Record::Transition(transition) if self_test.consume(transition) => {}
                Record::Transition(transition) => pipeline.apply(transition, refused, clock),
                Record::RefusedConnects(destination) => port_risks.on_threshold(*destination),
                Record::ListenerClosed(endpoint) => port_risks.on_listener_closed(endpoint),
                Record::BindFailure(failure) => ready_bind_failures.push_back(*failure),
            }
            // The events of a batch can be longer than all that may wait for stdout.
            !pipeline.reporting.out.holds_back_records()
        });
        // Every transition from before these failed binds is applied now, if the ring buffer was emptied.
        // Earlier failed binds that still wait for records are handled first.
        if drained < MAX_BATCH && !has_deferred {
            ready_bind_failures.extend(pending_bind_failures.drain(..));
        }
        if bind_failure_count == room { MAX_BATCH } else { MAX_BATCH.min(drained + bind_failure_count) }
    }

    /// Handles failed binds whose earlier records are applied, for [`MAX_BIND_FAILURES_TIME`] at most. True: there are
    /// more.
    pub(super) fn serve_bind_failures(&mut self) -> bool {
        let Self { pipeline, ready_bind_failures, .. } = self;
        if ready_bind_failures.is_empty() {
            return false;
        }
        let (clock, began) = (Offset::now(), Instant::now());
        while !pipeline.reporting.out.holds_back_records() {
            if began.elapsed() > MAX_BIND_FAILURES_TIME {
                return !ready_bind_failures.is_empty();
            }
            let Some(failure) = ready_bind_failures.pop_front() else { break };
            pipeline.on_bind_failure(&failure, clock);
        }
        false
    }

    /// How many times failed binds wait for records.
    fn deferred_bind_failures(&self) -> usize {
        self.catch_up.count(|then| matches!(then, AfterRecords::BindFailures(_)))
    }

    /// In a flood the ring buffer is never empty. Failed binds then wait for the records from before them.
    pub(super) fn defer_bind_failures(&mut self) {
        if !self.pending_bind_failures.is_empty() && self.deferred_bind_failures() < MAX_DEFERRED {
            let failures = std::mem::take(&mut self.pending_bind_failures);
            self.wait_for_records(AfterRecords::BindFailures(failures));
        }
    }

    /// Keeps `then` until every record that is matched by now is applied.
    pub(super) fn wait_for_records(&mut self, then: AfterRecords) {
        self.update_counters();
        let Counters { matched, ring_full, .. } = self.counters;
        self.catch_up.push(matched.saturating_sub(ring_full), Instant::now() + RECORD_TIMEOUT, then);
    }

    /// Does what waited for records that are applied now. `Some`: the hooks are dead.
    pub(super) fn serve_caught_up(&mut self, is_ring_empty: bool) -> Option<HooksDead> {
        while let Some(then) = self.catch_up.next(self.tracer.delivered(), is_ring_empty, Instant::now()) {
            match then {
                AfterRecords::Reconcile(snapshot) => self.apply_snapshot(*snapshot),
                AfterRecords::LookedUp(number, cookie_result) => self.on_looked_up(number, cookie_result),
                AfterRecords::BindFailures(failures) => self.ready_bind_failures.extend(failures),
                AfterRecords::EvaluateSelfTest => {
                    if let Some(dead) = self.self_test.evaluate(self.tracer.counters()) {
                        self.loss_reporter.report_dead_hooks(&dead, &mut self.pipeline.reporting.out);
                        return Some(HooksDead(dead));
                    }
                }
            }
        }
        None
    }

    fn on_looked_up(&mut self, number: u64, cookie_result: Result<Option<Cookie>, String>) {
        let Pipeline { remediation, reporting, .. } = &mut self.pipeline;
        remediation.on_looked_up(number, cookie_result, &mut reporting.out);
    }

    /// Drains the rest of the ring buffer after the probes are detached. A probe may still be running on
    /// another CPU: waits for the records that are counted as matched.
    pub(super) async fn drain_remaining(&mut self) -> ProgramCounters {
        for then in self.catch_up.take_all() {
            if let AfterRecords::BindFailures(failures) = then {
                self.pending_bind_failures.extend(failures);
            }
        }
        let mut until = Instant::now() + RECORD_TIMEOUT;
        let mut worked = Duration::ZERO;
        loop {
            // A closed stdout is detected at the next flush.
            let _ = self.pipeline.reporting.out.make_room().await;
            if self.pipeline.reporting.out.holds_back_records() {
                until = Instant::now() + RECORD_TIMEOUT;
                continue;
            }
            let began = Instant::now();
            let drained = self.drain_batch();
            self.serve_bind_failures();
            self.pipeline.serve_lookups();
            worked += began.elapsed();
            let has_more = drained > 0 || !self.ready_bind_failures.is_empty();
            if has_more && worked < FINAL_DRAIN_TIMEOUT {
                continue;
            }
            self.report_losses();
            let Counters { matched, ring_full, connect_table_full, .. } = self.counters;
            let unserved = self.pending_bind_failures.len() + self.ready_bind_failures.len();
            let delivered = self.tracer.delivered() - unserved as u64;
            if matched == delivered + ring_full || Instant::now() > until {
                self.unread = matched.saturating_sub(delivered + ring_full);
                return ProgramCounters {
                    matched,
                    delivered,
                    not_examined: self.tracer.not_examined(),
                    binds_not_examined: self.tracer.binds_not_examined(),
                    not_remembered: connect_table_full,
                };
            }
            sleep(RECORD_POLL_INTERVAL).await;
        }
    }
}
