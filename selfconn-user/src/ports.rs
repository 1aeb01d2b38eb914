//! Which local ports the kernel chooses as a source, and so which ports can hit themselves: pure arithmetic on the
//! texts of `net.ipv4.ip_local_port_range` and `net.ipv4.ip_local_reserved_ports` (IPv6 uses the same two). Nothing
//! here opens a file: a range belongs to a network namespace, and the caller knows which.
//!
//! The kernel's walk, from which every number here follows (`__inet_hash_connect` in
//! <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/inet_hashtables.c>): an unbound `connect()` starts at an even
//! offset from the range's low bound and goes on in steps of two, so it tries the ports of the low bound's parity
//! first, and the others only when each of those is taken. A dial to a closed port of the first kind hits itself once
//! in as many attempts as there are such ports, more often where reserved ports lie just below it ([`odds`]). `bind()`
//! to port 0 does the opposite and starts with the other parity (`inet_csk_find_open_port` in
//! <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/inet_connection_sock.c>).
//!
//! `ip_unprivileged_port_start` has no say: the kernel refuses a range that begins below it, and a start above the
//! range's low bound (`ipv4_local_port_range` and `ipv4_privileged_ports` in
//! <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/sysctl_net_ipv4.c>), so no port of a range is privileged.
//! `ip_local_port_step_width` (not every kernel has it; v7.3 has) keeps the parity, and only spreads what falls to reserved ports.

use std::fmt;

mod odds;

pub use odds::Odds;

/// The two bounds of `ip_local_port_range`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest port that may be chosen; its parity is what `connect()` tries first.
    pub low: u16,
    /// The highest port that may be chosen.
    pub high: u16,
}

/// The ports of `ip_local_reserved_ports`: never chosen by the kernel, still free to be named in `bind()`. Spans in
/// ascending order, none of which touches the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReservedPorts(Vec<(u16, u16)>);

/// A namespace's choice of source ports: the range, less what is reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPorts {
    /// `ip_local_port_range`.
    pub range: PortRange,
    /// `ip_local_reserved_ports`.
    pub reserved: ReservedPorts,
    /// `ip_local_port_step_width`; 0 also where the kernel has none.
    pub step_width: u32,
}

/// How a `connect()` that did not bind comes by a port as its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Among the ports that every `connect()` tries first: a dial to it can hit itself.
    First,
    /// Only when every port of the first kind is taken, and by other ways to a source port: `bind()` to port 0,
    /// `IP_LOCAL_PORT_RANGE`.
    Last,
    /// Reserved: no way but to name it in `bind()`.
    Reserved,
    /// Outside the range: no way but to name it in `bind()`.
    Outside,
}

/// A text that is not what the kernel prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotPorts {
    what: &'static str,
    text: String,
}

impl fmt::Display for NotPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not {}", self.text.trim(), self.what)
    }
}

impl std::error::Error for NotPorts {}

impl PortRange {
    /// Reads the sysctl's text, as in `32768 60999`.
    pub fn parse(text: &str) -> Result<Self, NotPorts> {
        let mut bounds = text.split_ascii_whitespace().map(str::parse);
        match (bounds.next(), bounds.next(), bounds.next()) {
            (Some(Ok(low)), Some(Ok(high)), None) if low <= high => Ok(Self { low, high }),
            _ => Err(NotPorts { what: "a port range: two ascending numbers", text: text.to_owned() }),
        }
    }

    /// Whether the port is between the bounds.
    pub fn contains(self, port: u16) -> bool {
        (self.low..=self.high).contains(&port)
    }

    /// The ports every `connect()` tries first.
    ///
    /// The kernel rounds the length of its walk down to an even number, so of an odd number of ports the
    /// topmost is no starting point, although it has the low bound's parity.
    pub fn first_ports(self) -> impl DoubleEndedIterator<Item = u16> + ExactSizeIterator + Clone {
        let pairs = u32::from(self.high - self.low).div_ceil(2);
        // A range of one port is walked as it is. The sum stays within the range, hence within u16.
        (0..pairs.max(1) as u16).map(move |pair| self.low + 2 * pair)
    }

    fn is_first(self, port: u16) -> bool {
        self.contains(port)
            && (port - self.low).is_multiple_of(2)
            && (port < self.high || self.low == self.high)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.low, self.high)
    }
}

impl ReservedPorts {
    /// Reads the sysctl's text: ports and spans between commas, as in `8080,9000-9010`, or nothing.
    pub fn parse(text: &str) -> Result<Self, NotPorts> {
        let spans = text.trim().split(',').filter(|span| !span.is_empty()).map(|span| {
            let (first, last) = span.split_once('-').unwrap_or((span, span));
            let span = first.trim().parse().ok()?..=last.trim().parse().ok()?;
            (!span.is_empty()).then(|| span.into_inner())
        });
        spans.collect::<Option<_>>().map(Self::merged).ok_or_else(|| NotPorts {
            what: "a list of ports: numbers and spans between commas",
            text: text.to_owned(),
        })
    }

    /// As few spans as there can be.
    fn merged(mut spans: Vec<(u16, u16)>) -> Self {
        spans.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(spans.len());
        for (first, last) in spans {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// These, and those.
    #[must_use]
    pub fn with(&self, ports: impl IntoIterator<Item = u16>) -> Self {
        let ports = ports.into_iter().map(|port| (port, port));
        Self::merged(self.0.iter().copied().chain(ports).collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the port is reserved.
    pub fn contains(&self, port: u16) -> bool {
        let after = self.0.partition_point(|&(first, _)| first <= port);
        after.checked_sub(1).is_some_and(|at| port <= self.0[at].1)
    }
}

/// As the kernel prints and takes it.
impl fmt::Display for ReservedPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl LocalPorts {
    /// Reads the texts of both sysctls.
    pub fn parse(range: &str, reserved: &str) -> Result<Self, NotPorts> {
        Ok(Self { range: PortRange::parse(range)?, reserved: ReservedPorts::parse(reserved)?, step_width: 0 })
    }

    /// How a `connect()` comes by this port. Where every port that is tried first is reserved, the others take their
    /// place; and the topmost of an odd number of ports, which is no starting point, is come by over reserved ones.
    pub fn reach(&self, port: u16) -> Reach {
        if !self.range.contains(port) {
            Reach::Outside
        } else if self.reserved.contains(port) {
            Reach::Reserved
        } else if self.range.is_first(port) || self.is_behind_reserved(port) {
            Reach::First
        } else if (port - self.range.low).is_multiple_of(2) || self.first_ports().next().is_some() {
            Reach::Last
        } else {
            Reach::First
        }
    }

    fn is_behind_reserved(&self, port: u16) -> bool {
        port == self.range.high
            && (port - self.range.low).is_multiple_of(2)
            && port.checked_sub(2).is_some_and(|below| self.reserved.contains(below))
    }

    /// The ports that can be hit by dialling them.
    pub fn first_ports(&self) -> impl Iterator<Item = u16> {
        self.range.first_ports().filter(|&port| !self.reserved.contains(port))
    }

    /// The mean number of dials to one closed port of [`Reach::First`] until it answers itself: as many as
    /// there are such ports. (high - low + 1) / 2 when none of them is reserved; 0 when all are.
    pub fn expected_dials(&self) -> u32 {
        self.first_ports().count() as u32
    }
}

/// The chance of at least one hit in this many dials, when one in `expected_dials` hits.
///
/// Dials in a row are not quite independent (the kernel moves on from the last port by a small random step),
/// but in the long run each hits with the same probability, and measured medians agree.
pub fn chance_after(dials: u64, expected_dials: u32) -> f64 {
    if expected_dials == 0 {
        return 0.0;
    }
    1.0 - (1.0 - 1.0 / f64::from(expected_dials)).powf(dials as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(range: &str, reserved: &str) -> LocalPorts {
        LocalPorts::parse(range, reserved).unwrap()
    }

    #[test]
    fn a_range_is_two_ascending_numbers() {
        let rows = [
            ("32768\t60999\n", Some((32768, 60999))),
            ("1 65535", Some((1, 65535))),
            ("40000 40000", Some((40000, 40000))),
            ("60999\t32768\n", None),
            ("32768", None),
            ("32768 60999 7", None),
            ("32768 65536", None),
            ("-1 60999", None),
            ("", None),
        ];
        for (text, want) in rows {
            let got = PortRange::parse(text).ok().map(|range| (range.low, range.high));
            assert_eq!(got, want, "{text:?}");
        }
    }

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
    fn reserved_ports_are_merged_into_as_few_spans_as_there_can_be() {
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
            assert_eq!(ReservedPorts::parse(want).unwrap(), merged, "what is printed is read again");
            assert_eq!(merged.is_empty(), want.is_empty());
        }
    }

    #[test]
    fn reach_follows_the_parity_of_the_low_bound() {
        let rows = [
            ("32768 60999", "", 32768, Reach::First),
            ("32768 60999", "", 60998, Reach::First),
            ("32768 60999", "", 60999, Reach::Last),
            ("32768 60999", "", 32767, Reach::Outside),
            ("32768 60999", "", 61000, Reach::Outside),
            ("32769 60999", "", 44445, Reach::First),
            ("32769 60999", "", 44446, Reach::Last),
            ("32768 60999", "44446", 44446, Reach::Reserved),
            ("32768 60999", "44440-44450", 44445, Reach::Reserved),
            ("32768 60999", "80", 80, Reach::Outside),
            // Measured: of 40000-40004, 40004 was hit in none of 40,000 dials.
            ("40000 40004", "", 40002, Reach::First),
            ("40000 40004", "", 40004, Reach::Last),
            ("40000 40000", "", 40000, Reach::First),
            ("1 65535", "", 65533, Reach::First),
            ("1 65535", "", 65535, Reach::Last),
            ("0 65535", "", 65534, Reach::First),
            // The walk goes on from a reserved port to the one that is no starting point.
            ("40000 40004", "40002", 40004, Reach::First),
            ("40000 40004", "40000", 40004, Reach::Last),
            // With every even port reserved, odd ones are all there is.
            ("40000 40003", "40000,40002", 40001, Reach::First),
            ("40000 40003", "40000,40002", 40003, Reach::First),
            ("40000 40003", "40000", 40001, Reach::Last),
        ];
        for (range, reserved, port, want) in rows {
            assert_eq!(ports(range, reserved).reach(port), want, "{range} less {reserved:?}: {port}");
        }
    }

    #[test]
    fn the_ports_tried_first_are_those_in_first_reach() {
        for (range, reserved) in [
            ("32768 60999", ""),
            ("32768 60999", "40000-50000,51000"),
            ("40000 40004", ""),
            ("40001 40001", ""),
            ("0 65535", "1-3"),
            ("1 65535", ""),
        ] {
            let ports = ports(range, reserved);
            let slow = (0..=u16::MAX).filter(|&port| ports.reach(port) == Reach::First);
            assert!(ports.first_ports().eq(slow), "{range} less {reserved:?}");
        }
    }

    #[test]
    fn one_dial_hits_in_as_many_as_there_are_first_ports() {
        let rows = [
            ("32768 60999", "", 14_116),
            ("40000 40199", "", 100),
            ("40000 40199", "40000-40098,40101", 50),
            ("40000 40199", "40000-40199", 0),
            ("40000 40000", "", 1),
            ("0 65535", "", 32_768),
        ];
        for (range, reserved, want) in rows {
            assert_eq!(ports(range, reserved).expected_dials(), want, "{range} less {reserved:?}");
        }
    }

    #[test]
    fn the_chance_grows_from_nothing_to_nearly_certain() {
        let rows =
            [(0, 14_116, 0.0), (14_116, 14_116, 0.632), (141_160, 14_116, 0.99995), (5, 0, 0.0), (1, 1, 1.0)];
        for (dials, expected, want) in rows {
            let got = chance_after(dials, expected);
            assert!((got - want).abs() < 0.001, "{dials} dials of {expected}: {got}");
        }
    }
}
