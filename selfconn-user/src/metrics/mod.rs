//! Metrics for Prometheus: a snapshot of the daemon's counts, and its rendering in text format 0.0.4. No
//! label contains a pid, a port or an address, because their number is unbounded.
//!
//! The event loop creates a [`MetricsSnapshot`] only when a scrape requests it.

use prometheus::{
    TextEncoder,
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};
use selfconn_ebpf::cause;

use crate::{
    detect::connection::Connection,
    event::{LossCause, LossKind, Losses},
};

mod process;
pub mod server;
#[cfg(test)]
mod tests;

/// The daemon's counts at one moment. A metric that is `None` is not exported, because this kernel does not
/// provide it or because it is not collected.
#[derive(Clone, Debug, Default)]
pub struct MetricsSnapshot {
    /// Self-connections of this run.
    pub connections: ConnectionCounts,
    /// Self-connections that are open.
    pub connections_open: u64,
    /// Refused connects of an address to itself.
    pub refused_self_dials: Option<u64>,
    /// Closed ports that processes keep connecting to.
    pub ports_at_risk: Option<u64>,
    /// Binds that failed because a self-connection held the port.
    pub blocked_binds: Option<u64>,
    /// Actions of `--remedy`, by result.
    pub remedies: Vec<(&'static str, u64)>,
    /// Connects to itself that the guard refused or would have, by mode. Empty without a guard.
    pub prevented: Vec<(&'static str, u64)>,
    /// Network namespaces with the guard.
    pub guarded_namespaces: Option<u64>,
    /// Network namespaces without it.
    pub unguarded_namespaces: Option<u64>,
    /// Attempts to attach the guard that failed, and packets that it could not read or rewrite.
    pub guard_failures: Option<u64>,
    /// Self-tests of the hooks, by result. Empty if there are none.
    pub self_tests: Vec<(&'static str, u64)>,
    /// Losses by cause.
    pub lost: Losses,
    /// Transitions that a program did not examine. `None` if the kernel does not count them.
    pub transitions_not_examined: Option<u64>,
    /// The same for the binds of TCP ports, nearly all of which succeed.
    pub binds_not_examined: Option<u64>,
    /// Look-ups of a process whose reader was abandoned, because the process did not let it finish.
    pub lookups_abandoned: u64,
    /// Failed attempts to write or reopen the event log.
    pub log_write_errors: u64,
    /// Attached hooks, each with its method.
    pub hooks: Vec<(&'static str, &'static str)>,
    /// Problems that prevent the daemon from working. Empty if it is healthy.
    pub health_problems: Vec<String>,
}

/// Numbers of self-connections by the cause of their source port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    ephemeral: u64,
    bound: u64,
    unknown: u64,
}

impl ConnectionCounts {
    /// Counts a new self-connection.
    pub fn count(&mut self, connection: &Connection) {
        match connection.opener.map(|opener| opener.cause) {
            Some(cause::EPHEMERAL) => self.ephemeral += 1,
            Some(cause::BOUND) => self.bound += 1,
            _ => self.unknown += 1,
        }
    }
}

impl MetricsSnapshot {
    /// Renders all metrics as text for Prometheus, including the `process_*` metrics.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut families = self.families();
        families.extend(process::families());
        // The encoder fails only for a family without a sample, and `finish` removes those.
        if let Err(error) = TextEncoder::new().encode_utf8(&families, &mut text) {
            log::error!("cannot encode the metrics: {error}");
        }
        text
    }

    fn families(&self) -> Vec<MetricFamily> {
        let Self { connections, lost, .. } = self;
        let mut families = vec![
            Family::counter("selfconn_connections_total", "Self-connections reported, by how their source port was chosen.")
                .per_label("cause", &[
                    ("ephemeral", connections.ephemeral),
                    ("bound", connections.bound),
                    ("unknown", connections.unknown),
                ]),
            Family::gauge("selfconn_connections_open", "Self-connections that are open now.")
                .value(Some(self.connections_open)),
            Family::counter(
                "selfconn_refused_self_dials_total",
                "Refused connects of an address to itself, at ports in the port range of their network namespace.",
            )
            .value(self.refused_self_dials),
            Family::gauge(
                "selfconn_ports_at_risk",
                "Ports without a listener that processes keep connecting to and that can connect to themselves.",
            )
            .value(self.ports_at_risk),
            Family::counter(
                "selfconn_blocked_binds_total",
                "Binds that failed because a self-connection, or its TIME_WAIT, held the port.",
            )
            .value(self.blocked_binds),
            Family::counter("selfconn_remedies_total", "Actions of --remedy, by result.")
                .per_label("result", &self.remedies),
            Family::counter(
                "selfconn_prevented_total",
                "Connects to itself that the guard refused, or would have with mode dry-run.",
            )
            .per_label("mode", &self.prevented),
            Family::gauge("selfconn_guarded_namespaces", "Network namespaces in which the guard refuses.")
                .value(self.guarded_namespaces),
            Family::gauge(
                "selfconn_unguarded_namespaces",
                "Network namespaces in which the guard refuses nothing, or not for certain.",
            )
            .value(self.unguarded_namespaces),
            Family::counter(
                "selfconn_guard_failures_total",
                "Attempts to attach the guard that failed, and packets that it could not read or rewrite.",
            )
            .value(self.guard_failures),
            Family::counter(
                "selfconn_events_lost_total",
                "Records and events that were not observed or not written, by cause.",
            )
            .per_label("where", &lost.of_records_and_events().collect::<Vec<_>>()),
            Family::counter(
                "selfconn_events_suppressed_total",
                "Events that were not written because they were beyond the rate of their owner.",
            )
            .value(Some(lost.get(LossCause::Suppressed))),
            Family::counter(
                "selfconn_facts_lost_total",
                "Fields of events that are unknown because something was full or took too long, by cause.",
            )
            .per_label("where", &lost.of_kinds(&[LossKind::Fact]).collect::<Vec<_>>()),
            Family::counter(
                "selfconn_self_tests_total",
                "Self-connections that the daemon made to test its hooks. Passed: every attached hook observed it.",
            )
            .per_label("result", &self.self_tests),
            Family::counter(
                "selfconn_transitions_not_examined_total",
                "TCP transitions that one program did not examine; another may have. A lower bound.",
            )
            .value(self.transitions_not_examined),
            Family::counter(
                "selfconn_binds_not_examined_total",
                "Number of times that the kernel did not run a program for a bind, whether it failed or succeeded.",
            )
            .value(self.binds_not_examined),
            Family::counter(
                "selfconn_lookups_abandoned_total",
                "Look-ups of a process that were abandoned because the process did not let them finish.",
            )
            .value(Some(self.lookups_abandoned)),
            Family::counter("selfconn_log_write_errors_total", "Failed attempts to write or reopen the event log.")
                .value(Some(self.log_write_errors)),
            Family::gauge("selfconn_healthy", "1 while /healthz answers 200.")
                .value(Some(u64::from(self.health_problems.is_empty()))),
            Family::gauge("selfconn_build_info", "1, with the version of selfconn.")
                .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1),
        ];
        let mut hooks = Family::gauge("selfconn_hook_info", "1 for each attached hook, with its method.");
        for (hook, method) in &self.hooks {
            hooks = hooks.sample(&[("hook", hook), ("method", method)], 1);
        }
        families.push(hooks);
        families.into_iter().filter_map(Family::finish).collect()
    }
}

/// A metric family and its samples.
struct Family(MetricFamily, Vec<Metric>);

impl Family {
    fn new(name: &str, help: &str, kind: MetricType) -> Self {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        Self(family, Vec::new())
    }

    fn counter(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::COUNTER)
    }

    fn gauge(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::GAUGE)
    }

    /// Adds a sample. Counts are exact up to 2^53, as in Prometheus.
    #[expect(clippy::cast_precision_loss, reason = "Prometheus has floating-point numbers only")]
    fn sample(self, labels: &[(&str, &str)], value: u64) -> Self {
        self.sample_f64(labels, value as f64)
    }

    fn sample_f64(mut self, labels: &[(&str, &str)], value: f64) -> Self {
        let label = |(name, value): &(&str, &str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        let mut metric = Metric::from_label(labels.iter().map(label).collect());
        if self.0.get_field_type() == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.1.push(metric);
        self
    }

    /// Adds one sample for each value of a label.
    fn per_label(self, label: &str, samples: &[(&str, u64)]) -> Self {
        samples.iter().fold(self, |family, (value, count)| family.sample(&[(label, value)], *count))
    }

    /// Adds a sample without labels if the value is known.
    fn value(self, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.sample(&[], value),
            None => self,
        }
    }

    fn value_f64(self, value: Option<f64>) -> Self {
        match value {
            Some(value) => self.sample_f64(&[], value),
            None => self,
        }
    }

    /// Returns `None` for a metric without samples, which is then not exported.
    fn finish(self) -> Option<MetricFamily> {
        let Self(mut family, samples) = self;
        if samples.is_empty() {
            return None;
        }
        family.set_metric(samples);
        Some(family)
    }
}
