//! What is told to Prometheus: the daemon's counts as one struct of numbers, and those numbers as text format 0.0.4.
//! No label has a pid, a port or an address in it: their number has no bound.
//!
//! The loop fills [`Numbers`] when it is asked, which is when somebody scrapes; nothing is kept up to date meanwhile.

use prometheus::{
    TextEncoder,
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};
use selfconn_ebpf::cause;

use crate::{connection::Connection, event::Losses};

mod own;
pub mod server;

/// What the loop knows, at one moment. `None` is not told: it can't be known here, or is not looked for.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// Self-connections of this run.
    pub connections: Connections,
    /// Those that are open.
    pub connections_open: u64,
    /// Refused dials of an address to itself.
    pub refused_self_dials: Option<u64>,
    /// Ports that somebody keeps dialling so.
    pub ports_at_risk: Option<u64>,
    /// Binds that a self-connection stood in the way of.
    pub blocked_binds: Option<u64>,
    /// What `--remedy` did, by result.
    pub remedies: Vec<(&'static str, u64)>,
    /// Tests of the hooks, by result; nothing where there are none.
    pub self_tests: Vec<(&'static str, u64)>,
    /// What was lost.
    pub lost: Losses,
    /// Transitions that some program did not look at; `None`: the kernel doesn't count them.
    pub transitions_not_examined: Option<u64>,
    /// Openers that the table of dials had no room for.
    pub openers_not_remembered: u64,
    /// Writes that the event log refused.
    pub log_write_errors: u64,
    /// Live hooks, each with its method.
    pub hooks: Vec<(&'static str, &'static str)>,
    /// What keeps the daemon from doing its work; nothing: it is healthy.
    pub ailments: Vec<&'static str>,
}

/// Self-connections by who chose their port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    ephemeral: u64,
    bound: u64,
    unknown: u64,
}

impl Connections {
    /// One more was opened.
    pub fn count(&mut self, connection: &Connection) {
        match connection.opener.map(|opener| opener.cause) {
            Some(cause::EPHEMERAL) => self.ephemeral += 1,
            Some(cause::BOUND) => self.bound += 1,
            _ => self.unknown += 1,
        }
    }
}

impl Numbers {
    /// As text for Prometheus, with what this process uses.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut families = self.families();
        families.extend(own::families());
        // Refused is only a family without a metric, and there is none among these.
        if let Err(error) = TextEncoder::new().encode_utf8(&families, &mut text) {
            log::error!("the metrics can't be written: {error}");
        }
        text
    }

    fn families(&self) -> Vec<MetricFamily> {
        let Self { connections, lost, .. } = self;
        let mut told = vec![
            Family::counter("selfconn_connections_total", "Self-connections told, by who chose the port.")
                .each("cause", &[
                    ("ephemeral", connections.ephemeral),
                    ("bound", connections.bound),
                    ("unknown", connections.unknown),
                ]),
            Family::gauge("selfconn_connections_open", "Self-connections that are open now.")
                .one(Some(self.connections_open)),
            Family::counter(
                "selfconn_refused_self_dials_total",
                "Refused dials of an address to itself.",
            )
            .one(self.refused_self_dials),
            Family::gauge(
                "selfconn_ports_at_risk",
                "Ports that somebody keeps dialling though nobody listens, and that can connect to themselves.",
            )
            .one(self.ports_at_risk),
            Family::counter(
                "selfconn_blocked_binds_total",
                "Servers that could not bind a port because a self-connection held it.",
            )
            .one(self.blocked_binds),
            Family::counter("selfconn_remedies_total", "What --remedy did, by its result.")
                .each("result", &self.remedies),
            Family::counter("selfconn_events_lost_total", "What was not seen or not written, by where.").each(
                "where",
                &[
                    ("ring", lost.ring),
                    ("missed", lost.missed),
                    ("log", lost.log),
                    ("stdout", lost.stdout),
                    ("journal", lost.journal),
                    ("dials", lost.dials),
                    ("hooks", lost.hooks),
                ],
            ),
            Family::counter(
                "selfconn_self_tests_total",
                "Self-connections of the daemon's own, by whether every live hook saw them.",
            )
            .each("result", &self.self_tests),
            Family::counter(
                "selfconn_transitions_not_examined_total",
                "TCP transitions that one program did not look at; another may have. A lower bound.",
            )
            .one(self.transitions_not_examined),
            Family::counter(
                "selfconn_openers_not_remembered_total",
                "Dials for which the table of openers had no room.",
            )
            .one(Some(self.openers_not_remembered)),
            Family::counter("selfconn_log_write_errors_total", "Writes that the event log refused.")
                .one(Some(self.log_write_errors)),
            Family::gauge("selfconn_healthy", "1 while /healthz answers 200.")
                .one(Some(u64::from(self.ailments.is_empty()))),
            Family::gauge("selfconn_build_info", "1, with the version of selfconn.")
                .with(&[("version", env!("CARGO_PKG_VERSION"))], 1),
        ];
        let mut hooks = Family::gauge("selfconn_hook_info", "1 for each live hook, with its method.");
        for (hook, method) in &self.hooks {
            hooks = hooks.with(&[("hook", hook), ("method", method)], 1);
        }
        told.push(hooks);
        told.into_iter().filter_map(Family::done).collect()
    }
}

/// A metric with its samples.
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

    /// A sample. Counts stay exact up to 2^53, as Prometheus keeps them.
    #[expect(clippy::cast_precision_loss, reason = "Prometheus has floating-point numbers only")]
    fn with(self, labels: &[(&str, &str)], value: u64) -> Self {
        self.with_f64(labels, value as f64)
    }

    fn with_f64(mut self, labels: &[(&str, &str)], value: f64) -> Self {
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

    /// One sample for each value of a label.
    fn each(self, label: &str, samples: &[(&str, u64)]) -> Self {
        samples.iter().fold(self, |family, (value, count)| family.with(&[(label, value)], *count))
    }

    /// A sample without labels, if it is known.
    fn one(self, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.with(&[], value),
            None => self,
        }
    }

    fn one_f64(self, value: Option<f64>) -> Self {
        match value {
            Some(value) => self.with_f64(&[], value),
            None => self,
        }
    }

    /// What is unknown is left out as a whole.
    fn done(self) -> Option<MetricFamily> {
        let Self(mut family, samples) = self;
        if samples.is_empty() {
            return None;
        }
        family.set_metric(samples);
        Some(family)
    }
}

#[cfg(test)]
mod tests;
