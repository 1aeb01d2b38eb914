//! The queries of the dashboard, and what they find in a Prometheus that scrapes a daemon.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Queries with one of these find nothing on a daemon without options, on some kernels, or after the self-connection.
const MAY_BE_EMPTY: [&str; 8] = [
    "selfconn_remedies_total",
    "selfconn_prevented_total",
    "selfconn_guard_failures_total",
    "guarded_namespaces",
    "selfconn_transitions_not_examined_total",
    "selfconn_binds_not_examined_total",
    "(selfconn_connections_open{job=~\"$job\",instance=~\"$instance\"}) > 0",
    "(selfconn_ports_at_risk{job=~\"$job\",instance=~\"$instance\"}) > 0",
];

/// What Grafana replaces, and by what if everything is selected.
const VARIABLES: [(&str, &str); 4] =
    [("$job", ".+"), ("$instance", ".+"), ("$__rate_interval", "1m"), ("$__range", "1h")];

/// A dashboard of Grafana.
#[derive(PartialEq)]
pub(super) struct Dashboard(Value);

impl Dashboard {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).map(Self).with_context(|| format!("parse {}", path.display()))
    }

    /// The queries of the panels.
    pub(super) fn of_panels(&self) -> Vec<&str> {
        let panels = self.0["panels"].as_array().into_iter().flatten();
        let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
        targets.filter_map(|target| target["expr"].as_str()).collect()
    }

    /// The queries of the variables.
    pub(super) fn of_variables(&self) -> Vec<&str> {
        let variables = self.0["templating"]["list"].as_array().into_iter().flatten();
        let variables = variables.filter(|variable| variable["type"] == "query");
        variables.filter_map(|variable| variable["query"].as_str()).collect()
    }

    /// Asks each query of the panels. `ask` returns what it finds, as text, and fails if it is not valid.
    pub(super) fn finds_something(&self, ask: impl Fn(&str) -> Result<String>) -> Result<usize> {
        let queries = self.of_panels();
        ensure!(!queries.is_empty(), "the dashboard has no queries");
        for query in &queries {
            let expression =
                VARIABLES.iter().fold((*query).to_owned(), |query, (name, value)| query.replace(name, value));
            let found = ask(&expression)?;
            let may_be_empty = MAY_BE_EMPTY.iter().any(|part| query.contains(part));
            ensure!(may_be_empty || !found.trim().is_empty(), "the dashboard finds nothing with {query}");
        }
        Ok(queries.len())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_query_that_finds_nothing_is_an_error_unless_it_may() {
        let with =
            |query| Dashboard(json!({ "panels": [{ "targets": [{ "expr": query }] }, { "type": "row" }] }));
        let nothing = |_: &str| Ok("\n".to_owned());
        assert!(with("sum(x)").finds_something(nothing).is_err());
        assert_eq!(with("sum(selfconn_remedies_total)").finds_something(nothing).unwrap(), 1);
        let echo = |query: &str| {
            assert_eq!(query, "rate(x{job=~\".+\"}[1m])");
            Ok(query.to_owned())
        };
        assert_eq!(with("rate(x{job=~\"$job\"}[$__rate_interval])").finds_something(echo).unwrap(), 1);
        assert!(Dashboard(json!({})).finds_something(nothing).is_err(), "no query at all");
    }
}
