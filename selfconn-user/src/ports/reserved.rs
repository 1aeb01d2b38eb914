//! The ports of `ip_local_reserved_ports`, and how many of them there are in a range.

use std::{fmt, ops::RangeInclusive, sync::Arc};

use super::PortsParseError;

/// The ports of `ip_local_reserved_ports`: the kernel never chooses them, but a program may name them in
/// `bind()`. The spans are in ascending order and do not touch. Any user can reserve every second port in a network
/// namespace of his own, so a copy copies no span, and no question walks over all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReservedPorts(Arc<[ReservedSpan]>);

/// Reserved ports that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReservedSpan {
    first: u16,
    last: u16,
    /// Number of reserved ports below `first`: of the even ones, and of the odd ones.
    before: [u16; 2],
}

/// Number of ports of this parity (0: even, 1: odd) below `end`.
const fn count_below(end: u32, parity: u32) -> u32 {
    (end + 1 - parity) / 2
}

impl ReservedPorts {
    /// Parses the sysctl's text: ports and spans separated by commas, for example `8080,9000-9010`, or
    /// nothing.
    pub fn parse(text: &str) -> Result<Self, PortsParseError> {
        let spans = text.trim().split(',').filter(|span| !span.is_empty()).map(|span| {
            let (first, last) = span.split_once('-').unwrap_or((span, span));
            let span = first.trim().parse().ok()?..=last.trim().parse().ok()?;
            (!span.is_empty()).then(|| span.into_inner())
        });
        spans.collect::<Option<_>>().map(Self::merged).ok_or_else(|| PortsParseError {
            expected: "a list of ports: numbers and spans between commas",
            text: text.to_owned(),
        })
    }

    /// Merges overlapping and adjacent spans.
    pub(super) fn merged(mut spans: Vec<(u16, u16)>) -> Self {
        spans.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(spans.len());
        for (first, last) in spans {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        let mut before = [0; 2];
        let spans = merged.into_iter().map(|(first, last)| {
            let span = ReservedSpan { first, last, before };
            // At most 32,768 of each parity.
            before = [0, 1].map(|parity| span.count_below(u32::from(last) + 1, parity) as u16);
            span
        });
        Self(spans.collect())
    }

    /// Returns these reserved ports and the additional `ports`.
    #[must_use]
    pub fn with(&self, ports: impl IntoIterator<Item = u16>) -> Self {
        let ports = ports.into_iter().map(|port| (port, port));
        Self::merged(self.0.iter().map(|span| (span.first, span.last)).chain(ports).collect())
    }

    /// The ports in ascending order.
    pub fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().flat_map(|span| span.first..=span.last)
    }

    /// True if no port is reserved.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True if the port is reserved.
    pub fn contains(&self, port: u16) -> bool {
        self.last_span_below(u32::from(port) + 1).is_some_and(|span| port <= span.last)
    }

    /// The last span that begins below `end`.
    fn last_span_below(&self, end: u32) -> Option<&ReservedSpan> {
        let after = self.0.partition_point(|span| u32::from(span.first) < end);
        after.checked_sub(1).map(|at| &self.0[at])
    }

    /// Number of reserved ports of this parity among these ports.
    pub(super) fn count(&self, ports: RangeInclusive<u16>, parity: u32) -> u32 {
        let below = |end| self.last_span_below(end).map_or(0, |span| span.count_below(end, parity));
        below(u32::from(*ports.end()) + 1) - below((*ports.start()).into())
    }
}

impl ReservedSpan {
    /// Number of reserved ports of this parity below `end`, if no later span begins below it.
    fn count_below(&self, end: u32, parity: u32) -> u32 {
        let of_span = count_below(end.min(u32::from(self.last) + 1), parity);
        u32::from(self.before[parity as usize]) + of_span - count_below(self.first.into(), parity)
    }
}

/// The format that the kernel prints and accepts.
impl fmt::Display for ReservedPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, ReservedSpan { first, last, .. }) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_numbers_and_spans() {
        let rows: [(&str, &[u16], &[u16]); 5] = [
            ("\n", &[], &[0, 1, 8080, 65535]),
            ("8080\n", &[8080], &[8079, 8081]),
            ("8080,9000-9010\n", &[8080, 9000, 9005, 9010], &[8081, 8999, 9011]),
            ("0-65535\n", &[0, 1, 65535], &[]),
            ("1,3,5\n", &[1, 3, 5], &[0, 2, 4, 6]),
        ];
        for (text, inside, outside) in rows {
            let reserved = ReservedPorts::parse(text).unwrap();
            assert!(inside.iter().all(|&port| reserved.contains(port)), "{text:?}");
            assert!(!outside.iter().any(|&port| reserved.contains(port)), "{text:?}");
        }
        for text in ["x", "8080;9000", "9010-9000", "65536", "1-2-3"] {
            assert!(ReservedPorts::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn reserved_ports_are_merged_into_the_fewest_spans() {
        let rows: [(&str, &[u16], &str); 9] = [
            ("", &[], ""),
            ("", &[44446], "44446"),
            ("8080", &[], "8080"),
            ("8080", &[8081], "8080-8081"),
            ("8080", &[8082], "8080,8082"),
            ("9000-9010,8080", &[8079, 9005, 9011], "8079-8080,9000-9011"),
            ("1-10,5-20,3", &[], "1-20"),
            ("65534", &[65535, 0], "0,65534-65535"),
            ("0-65535", &[1, 65535], "0-65535"),
        ];
        for (text, more, want) in rows {
            let merged = ReservedPorts::parse(text).unwrap().with(more.iter().copied());
            assert_eq!(merged.to_string(), want, "{text:?} with {more:?}");
            assert_eq!(
                ReservedPorts::parse(want).unwrap(),
                merged,
                "the printed text parses to the same ports"
            );
            assert_eq!(merged.is_empty(), want.is_empty());
        }
    }
}
