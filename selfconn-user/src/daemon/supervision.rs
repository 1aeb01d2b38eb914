//! Supervision from outside: the service manager, whose watchdog expects regular pings, and the clients that
//! scrape the metrics. The event loop serves both itself. If they get no answer, the loop is therefore stuck.

use tokio::{
    sync::mpsc::Receiver,
    time::{Instant, sleep_until},
};

use super::Daemon;
use crate::{
    bpf::attach::{Choice, Method},
    metrics::{MetricsSnapshot, server::MetricsRequest},
    system::sd_notify::ServiceManager,
};

/// The service manager and the metrics server, as far as the event loop serves them.
pub struct Supervision {
    manager: Option<ServiceManager>,
    requests: Option<Receiver<MetricsRequest>>,
    ping_at: Option<Instant>,
}

impl Supervision {
    /// `None`: there is no service manager, or no metrics server.
    #[must_use]
    pub fn new(manager: Option<ServiceManager>, requests: Option<Receiver<MetricsRequest>>) -> Self {
        Self { manager, requests, ping_at: None }
    }

    /// Reports to the service manager that the hooks are attached.
    pub(super) fn ready(&mut self, methods: &Choice<()>) {
        if let Some(manager) = &self.manager {
            let names: Vec<_> = methods.live.iter().map(|(method, ())| method.name()).collect();
            manager.ready(&format!("watching by {}", names.join(" and ")));
            // The next ping keeps its time: repeated reloads must not postpone it.
            self.ping_at = self.ping_at.or(manager.ping_interval().map(|interval| Instant::now() + interval));
        }
    }

    /// Reports that the log is being reopened. [`Self::ready`] ends the reload.
    pub(super) fn reloading(&self) {
        if let Some(manager) = &self.manager {
            manager.reloading();
        }
    }

    /// Reports that the daemon is stopping.
    pub(super) fn stopping(&self) {
        if let Some(manager) = &self.manager {
            manager.stopping();
        }
    }

    /// Waits for the next request for metrics, and pings the watchdog meanwhile. It is cancel safe: no
    /// request is lost if the future is dropped.
    pub(super) async fn next_metrics_request(&mut self) -> MetricsRequest {
        loop {
            let Self { requests, ping_at, manager } = self;
            let next_request = async {
                match requests {
                    Some(requests) => requests.recv().await,
                    None => std::future::pending().await,
                }
            };
            let watchdog_due = async {
                match *ping_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = watchdog_due => {
                    if let Some(manager) = manager {
                        manager.ping();
                        *ping_at = manager.ping_interval().map(|interval| Instant::now() + interval);
                    }
                }
                request = next_request => match request {
                    Some(request) => return request,
                    // The metrics server's thread has ended, and has logged why.
                    None => self.requests = None,
                }
            }
        }
    }
}

impl Daemon {
    /// Current values of all exported metrics. Every metric gets its value here.
    pub(super) fn collect_metrics(&mut self) -> MetricsSnapshot {
        self.update_counters();
        let mut health_problems = Vec::new();
        if !self.tracer.is_attached() {
            health_problems.push("hooks: none is attached");
        }
        if !self.hooks_are_healthy() {
            health_problems.push("hooks: the last self-test failed");
        }
        if !self.pipeline.out.can_write_log() {
            health_problems.push("log: it can't be written");
        }
        let hook_and_method = |(method, ()): &(Method, ())| (method.hook().name(), method.name());
        MetricsSnapshot {
            connections: self.pipeline.established_counts,
            connections_open: self.pipeline.connections.iter().count() as u64,
            refused_self_dials: Some(self.counters.refused_connects),
            ports_at_risk: Some(self.risk.at_risk() as u64),
            self_tests: self
                .self_test_counts()
                .map_or_else(Vec::new, |counts| vec![("passed", counts.passed), ("failed", counts.failed)]),
            blocked_binds: Some(self.blocked_binds()),
            remedies: self.remedies().map(|(outcome, count)| (outcome.name(), count)).collect(),
            lost: self.losses().plus(self.pipeline.out.lost()),
            transitions_not_examined: self.tracer.not_examined(),
            log_write_errors: self.pipeline.out.log_write_errors(),
            hooks: self.tracer.methods().live.iter().map(hook_and_method).collect(),
            health_problems,
        }
    }
}
