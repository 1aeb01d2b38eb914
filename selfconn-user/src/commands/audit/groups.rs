//! Joins ports that were named together and differ in nothing but their number, so that a range is one line.

use std::collections::HashMap;

use super::assess::PortAssessment;

/// Rows of ports at most two apart: a range that the kernel reaches by parity has the risk of each other port.
#[derive(Debug)]
pub(super) struct PortGroup<'a> {
    pub(super) first: &'a PortAssessment,
    last: u16,
    pub(super) count: usize,
}

impl PortGroup<'_> {
    /// The address, and the port or ports.
    pub(super) fn endpoint_text(&self) -> String {
        let first = self.first.endpoint_text();
        if self.last == self.first.port { first } else { format!("{first}-{}", self.last) }
    }
}

/// One group for each listener, and for each run of ports without one.
pub(super) fn group(rows: &[PortAssessment]) -> Vec<PortGroup<'_>> {
    let mut groups: Vec<PortGroup<'_>> = vec![];
    let mut open = HashMap::new();
    for row in rows {
        if row.listener.is_none() {
            let at = *open.entry((row.addr, row.risk, row.brief.as_str())).or_insert(groups.len());
            if let Some(group) = groups.get_mut(at)
                && row.port.checked_sub(group.last).is_some_and(|step| step <= 2)
            {
                group.last = row.port;
                group.count += 1;
                continue;
            }
            open.insert((row.addr, row.risk, row.brief.as_str()), groups.len());
        }
        groups.push(PortGroup { first: row, last: row.port, count: 1 });
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::audit::{
        assess::{
            assess,
            tests::{audited, java, namespace},
        },
        collect::RouteSource,
    };

    #[test]
    fn a_range_is_a_line_for_each_risk_and_a_listener_is_a_line_of_its_own() {
        let requested = (40_098..=40_109).chain([40_150]);
        let mut ports: Vec<_> = requested.map(|port| audited(None, port, RouteSource::Same, None)).collect();
        ports.push(audited(Some("127.0.0.1"), 40_104, RouteSource::Same, java()));
        let rows = assess(&namespace("40100 40199", "", ports));
        let lines: Vec<_> = group(&rows)
            .iter()
            .map(|group| (group.first.risk.name(), group.endpoint_text(), group.count))
            .collect();
        let line = |risk, endpoint: &str, count| (risk, endpoint.to_owned(), count);
        assert_eq!(
            lines,
            [
                line("high", "*:40100-40102", 2),
                line("high", "127.0.0.1:40104", 1),
                line("high", "*:40106-40108", 2),
                line("high", "*:40150", 1),
                line("low", "*:40101-40109", 5),
                line("none", "*:40098-40099", 2),
            ]
        );
        assert_eq!(group(&[]).len(), 0);
    }
}
