//! What a run says of itself: its losses, its threads that have ended, its metrics.

use super::{Daemon, pipeline::Pipeline};
use crate::{
    bpf::attach::Method,
    event::{LossCause, Losses},
    metrics::MetricsSnapshot,
    system::busy::{self, ThreadProblem},
};

impl Daemon {
    /// Reads the probes' counters, and emits `lost` for every loss since the last call.
    pub(super) fn report_losses(&mut self) {
        self.update_counters();
        let totals = self.losses().plus(self.pipeline.reporting.out.lost());
        let tracer = &self.tracer;
        let Pipeline { connections, conflicts, reporting, .. } = &mut self.pipeline;
        let owners = || tracer.owners_with_losses();
        let counted = |cause| match cause {
            LossCause::Untracked => connections.take_untracked(),
            LossCause::Binds => conflicts.binds.servers.losses.take_unreported(),
            _ => Vec::new(),
        };
        self.loss_reporter.report(&totals, owners, counted, &mut reporting.out);
    }

    pub(super) fn update_counters(&mut self) {
        match self.tracer.counters() {
            Ok(counters) => self.counters = counters,
            Err(error) => log::error!("the probes' counters can't be read: {error:#}"),
        }
    }

    /// Losses before an event was made.
    pub(super) fn losses(&self) -> Losses {
        Losses::from([
            (LossCause::Ring, self.counters.ring_full + self.unread),
            (
                LossCause::Binds,
                self.counters.bind_failures_over_rate + self.pipeline.conflicts.binds.servers.losses.total(),
            ),
            (LossCause::Missed, self.pipeline.missed),
            (LossCause::RefusedTable, self.counters.refused_table_full),
            (LossCause::Hooks, self.loss_reporter.dead_hooks()),
            (LossCause::OpenerTable, self.counters.connect_table_full),
            (LossCause::Lookups, self.pipeline.reporting.lookups.given_up()),
            (LossCause::Untracked, self.pipeline.connections.untracked()),
        ])
    }

    /// Names of the threads that do their work no more, and why.
    pub(super) fn thread_problems(&self) -> impl Iterator<Item = (&'static str, ThreadProblem)> {
        let others = [
            self.snapshots.worker_problem(),
            self.port_risks.worker_problem(),
            self.pipeline.remediation.worker_problem(),
            self.pipeline.conflicts.reports.worker_problem(),
            self.guard.thread_problem(),
        ];
        let lookups = self.pipeline.reporting.lookups.worker_problems();
        let mut problems: Vec<_> = others.into_iter().flatten().chain(lookups).collect();
        let mut panicked = busy::panicked_threads();
        panicked.retain(|name| !problems.iter().any(|(known, _)| known == name));
        problems.extend(panicked.into_iter().map(|name| (name, ThreadProblem::Ended)));
        problems.into_iter()
    }

    /// Current values of all exported metrics. Every metric gets its value here.
    pub(super) fn collect_metrics(&mut self) -> MetricsSnapshot {
        self.update_counters();
        let mut health_problems = Vec::new();
        if !self.tracer.is_attached() {
            health_problems.push("hooks: none is attached".to_owned());
        }
        if !self.self_test.is_healthy() {
            health_problems.push("hooks: the last self-test failed".to_owned());
        }
        if !self.pipeline.reporting.out.can_write_log() {
            health_problems.push("log: it can't be written".to_owned());
        }
        health_problems
            .extend(self.thread_problems().map(|(name, problem)| format!("thread {name}: {problem}")));
        let hook_and_method = |(method, ()): &(Method, ())| (method.hook().name(), method.name());
        let remedy_counts = self.pipeline.remediation.counts();
        MetricsSnapshot {
            connections: self.pipeline.established_counts,
            connections_open: self.pipeline.connections.iter().count() as u64,
            refused_self_dials: Some(self.counters.refused_connects),
            ports_at_risk: Some(self.port_risks.at_risk() as u64),
            self_tests: self.self_test.counts().map_or_else(Vec::new, |counts| {
                vec![
                    ("passed", counts.passed),
                    ("failed", counts.failed),
                    ("not_connected", counts.not_connected),
                ]
            }),
            blocked_binds: Some(self.pipeline.conflicts.binds.servers.failures()),
            prevented: self
                .guard
                .counts()
                .map_or_else(Vec::new, |_| vec![(self.guard.mode().name(), self.counters.prevented)]),
            guarded_namespaces: self.guard.counts().map(|counts| counts.guarded as u64),
            unguarded_namespaces: self.guard.counts().map(|counts| counts.unguarded as u64),
            guard_failures: self.guard.counts().map(|counts| counts.failures + self.counters.guard_failed),
            remedies: remedy_counts.map(|(outcome, count)| (outcome.name(), count)).collect(),
            lost: self.losses().plus(self.pipeline.reporting.out.lost()),
            transitions_not_examined: self.tracer.not_examined(),
            binds_not_examined: self.tracer.binds_not_examined(),
            lookups_abandoned: self.pipeline.reporting.lookups.abandoned(),
            log_write_errors: self.pipeline.reporting.out.log_write_errors(),
            hooks: self.tracer.methods().live.iter().map(hook_and_method).collect(),
            health_problems,
        }
    }
}
