//! Computes which local ports the kernel chooses as a source port, and so which ports a connect can hit by
//! itself. Pure arithmetic on the texts of `net.ipv4.ip_local_port_range` and
//! `net.ipv4.ip_local_reserved_ports` (IPv6 uses the same two). Nothing here opens a file, because a range
//! belongs to a network namespace and only the caller knows which one.
//!
//! Every number here follows from the kernel's walk over the ports (`__inet_hash_connect` in
//! <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/inet_hashtables.c>). An unbound `connect()` starts
//! at an even offset from the range's low bound and continues in steps of two. It tries the ports of the low
//! bound's parity first, and the other ports only if all of these are taken. A connect to a closed port of
//! the low bound's parity hits itself on average once in as many attempts as there are such ports, and more
//! often if reserved ports lie just below it ([`odds`]). For a socket with a range of its own it takes all ports alike
//! since v6.8. `bind()` to port 0 starts with the other parity
//! (`inet_csk_find_open_port` in
//! <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/inet_connection_sock.c>).
//!
//! `ip_unprivileged_port_start` has no effect: the kernel refuses a range that begins below it, and it
//! refuses a value above the range's low bound (`ipv4_local_port_range` and `ipv4_privileged_ports` in
//! <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/sysctl_net_ipv4.c>), so no port of a range is
//! privileged. `ip_local_port_step_width` (not every kernel has it; v7.3 does) keeps the parity, and only
//! distributes the share of the reserved ports among the others.

use std::fmt;

mod odds;
mod reserved;
pub mod sysctl;

pub use odds::Odds;
pub use reserved::ReservedPorts;

/// The two bounds of `ip_local_port_range`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest port that may be chosen; `connect()` tries the ports of its parity first.
    pub low: u16,
    /// The highest port that may be chosen.
    pub high: u16,
}

/// The source ports that the kernel may choose in a network namespace: the range without the reserved ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPorts {
    /// `ip_local_port_range`.
    pub range: PortRange,
    /// `ip_local_reserved_ports`.
    pub reserved: ReservedPorts,
    /// `ip_local_port_step_width`; 0 also if the kernel does not have this setting.
    pub step_width: u32,
    /// True if `range` is the one that a socket was given (`IP_LOCAL_PORT_RANGE`): then `connect()` goes from each
    /// port to the next, whatever their parity.
    pub ignores_parity: bool,
}

/// How an unbound `connect()` can get a port as its source port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The port is among those that every `connect()` tries first: a connect to it can hit itself.
    First,
    /// The port is tried only if every port of `First` is taken. It can also be chosen by `bind()` to port 0
    /// and with `IP_LOCAL_PORT_RANGE`.
    Last,
    /// The port is reserved: it is a source port only if a program names it in `bind()`.
    Reserved,
    /// The port is outside the range: it is a source port only if a program names it in `bind()`.
    Outside,
}

/// The text of a sysctl is not in the format that the kernel prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortsParseError {
    expected: &'static str,
    text: String,
}

impl fmt::Display for PortsParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not {}", self.text.trim(), self.expected)
    }
}

impl std::error::Error for PortsParseError {}

impl PortRange {
    /// Parses the sysctl's text, for example `32768 60999`.
    pub fn parse(text: &str) -> Result<Self, PortsParseError> {
        let mut bounds = text.split_ascii_whitespace().map(str::parse);
        match (bounds.next(), bounds.next(), bounds.next()) {
            (Some(Ok(low)), Some(Ok(high)), None) if low <= high => Ok(Self { low, high }),
            _ => Err(PortsParseError {
                expected: "a port range: two ascending numbers",
                text: text.to_owned(),
            }),
        }
    }

    /// True if the port is within the bounds.
    pub fn contains(self, port: u16) -> bool {
        (self.low..=self.high).contains(&port)
    }

    /// The ports that every `connect()` tries first.
    ///
    /// The kernel rounds the length of its walk down to an even number. If the number of ports is odd, the
    /// highest port is therefore not a starting point, although it has the low bound's parity.
    pub fn first_ports(self) -> impl DoubleEndedIterator<Item = u16> + ExactSizeIterator + Clone {
        let pairs = u32::from(self.high - self.low).div_ceil(2);
        // A range of one port is not rounded down. The sum stays within the range, hence within u16.
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

impl LocalPorts {
    /// Parses the texts of both sysctls.
    pub fn parse(range: &str, reserved: &str) -> Result<Self, PortsParseError> {
        Ok(Self {
            range: PortRange::parse(range)?,
            reserved: ReservedPorts::parse(reserved)?,
            step_width: 0,
            ignores_parity: false,
        })
    }

    /// The ports that the kernel chooses for a socket with a range of its own (`IP_LOCAL_PORT_RANGE`). A bound of that
    /// range counts only if it is in the range of the namespace (`inet_sk_get_local_port_range`,
    /// net/ipv4/inet_connection_sock.c at v6.12).
    #[must_use]
    pub fn for_socket(&self, own: PortRange) -> Self {
        let bound = |own, shared| if self.range.contains(own) { own } else { shared };
        Self {
            range: PortRange { low: bound(own.low, self.range.low), high: bound(own.high, self.range.high) },
            ignores_parity: true,
            ..self.clone()
        }
    }

    /// How a `connect()` can get this port. If every port that is tried first is reserved, the ports of the
    /// other parity take their place. If the number of ports is odd, the highest port is not a starting
    /// point, but it is reached if the port of the same parity below it is reserved.
    pub fn reach(&self, port: u16) -> Reach {
        if !self.range.contains(port) {
            Reach::Outside
        } else if self.reserved.contains(port) {
            Reach::Reserved
        } else if self.ignores_parity || self.range.is_first(port) || self.is_behind_reserved(port) {
            Reach::First
        } else if (port - self.range.low).is_multiple_of(2) || self.expected_connects() > 0 {
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

    /// The ports to which a connect can hit itself.
    pub fn first_ports(&self) -> impl Iterator<Item = u16> {
        let PortRange { low, high } = self.range;
        let (count, step) = match self.ignores_parity {
            true => (usize::from(high - low) + 1, 1),
            false => (self.range.first_ports().len(), 2),
        };
        // The sum stays within the range, hence within u16.
        (0..count).map(move |n| low + (n * step) as u16).filter(|&port| !self.reserved.contains(port))
    }

    /// The mean number of connects to one closed port of [`Reach::First`] until a connect hits itself. It
    /// equals the number of such ports: (high - low + 1) / 2 if none of them is reserved, 0 if all of them
    /// are. Takes no walk over the ports.
    pub fn expected_connects(&self) -> u32 {
        let PortRange { low, high } = self.range;
        if self.ignores_parity {
            let reserved = self.reserved.count(low..=high, 0) + self.reserved.count(low..=high, 1);
            return u32::from(high - low) + 1 - reserved;
        }
        let first_ports = self.range.first_ports().len() as u32;
        // The last of them has the parity of the lowest. It is within the range, hence within u16.
        let last = u32::from(low) + 2 * (first_ports - 1);
        first_ports - self.reserved.count(low..=last as u16, u32::from(low) % 2)
    }
}

/// The probability of at least one hit in this many connects, if on average one in `expected_connects` hits.
///
/// Successive connects are not fully independent, because the kernel moves on from the last port by a small
/// random step. In the long run each hits with the same probability, and measured medians agree with the
/// formula.
pub fn chance_after(connects: u64, expected_connects: u32) -> f64 {
    if expected_connects == 0 {
        return 0.0;
    }
    1.0 - (1.0 - 1.0 / f64::from(expected_connects)).powf(connects as f64)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

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
            // Measured with 40000-40004: none of 40,000 connects used 40004.
            ("40000 40004", "", 40002, Reach::First),
            ("40000 40004", "", 40004, Reach::Last),
            ("40000 40000", "", 40000, Reach::First),
            ("1 65535", "", 65533, Reach::First),
            ("1 65535", "", 65535, Reach::Last),
            ("0 65535", "", 65534, Reach::First),
            // From a reserved port the walk continues to a port that is not a starting point.
            ("40000 40004", "40002", 40004, Reach::First),
            ("40000 40004", "40000", 40004, Reach::Last),
            // If every even port is reserved, only odd ports are left.
            ("40000 40003", "40000,40002", 40001, Reach::First),
            ("40000 40003", "40000,40002", 40003, Reach::First),
            ("40000 40003", "40000", 40001, Reach::Last),
        ];
        for (range, reserved, port, want) in rows {
            assert_eq!(ports(range, reserved).reach(port), want, "{range} less {reserved:?}: {port}");
        }
    }

    #[test]
    fn a_socket_with_a_range_of_its_own_reaches_every_port_in_it() {
        let own = |low, high| PortRange { low, high };
        for (range, own, port, want, expected) in [
            ("40000 40199", own(40_050, 40_099), 40_051, Reach::First, 50),
            ("40000 40199", own(40_050, 40_099), 40_099, Reach::First, 50),
            ("40000 40199", own(40_050, 40_099), 40_100, Reach::Outside, 50),
            ("40000 40199", own(40_107, 40_107), 40_107, Reach::First, 1),
            // A bound outside the namespace's range does not count.
            ("40000 40199", own(30_000, 40_099), 40_001, Reach::First, 100),
            ("40000 40199", own(40_100, 50_000), 40_199, Reach::First, 100),
            ("40000 40199", own(0, 0), 40_001, Reach::First, 200),
            ("0 65535", own(0, 65_535), 65_535, Reach::First, 65_536),
        ] {
            let ports = ports(range, "").for_socket(own);
            assert_eq!(
                (ports.reach(port), ports.expected_connects()),
                (want, expected),
                "{range}, {own}: {port}"
            );
        }
        let reserved = ports("40000 40199", "40051").for_socket(own(40_050, 40_099));
        assert_eq!((reserved.reach(40_051), reserved.expected_connects()), (Reach::Reserved, 49));
    }

    #[test]
    fn first_ports_are_the_ports_with_reach_first() {
        for (range, reserved) in [
            ("32768 60999", ""),
            ("32768 60999", "40000-50000,51000"),
            ("40000 40004", ""),
            ("40001 40001", ""),
            ("0 65535", "1-3"),
            ("1 65535", ""),
        ] {
            let shared = ports(range, reserved);
            for ports in [shared.for_socket(shared.range), shared] {
                let expected = (0..=u16::MAX).filter(|&port| ports.reach(port) == Reach::First);
                assert!(ports.first_ports().eq(expected), "{range} less {reserved:?}");
            }
        }
    }

    #[test]
    fn expected_connects_equal_the_number_of_first_ports() {
        let rows = [
            ("32768 60999", "", 14_116),
            ("40000 40199", "", 100),
            ("40000 40199", "40000-40098,40101", 50),
            ("40000 40199", "40000-40199", 0),
            ("40000 40000", "", 1),
            ("0 65535", "", 32_768),
        ];
        for (range, reserved, want) in rows {
            assert_eq!(ports(range, reserved).expected_connects(), want, "{range} less {reserved:?}");
        }
    }

    /// Any ports, many of one parity near each other or at both ends of u16, with any spans reserved, or every second
    /// port.
    fn arbitrary_ports() -> impl Strategy<Value = LocalPorts> {
        let port = prop_oneof![0..8_u16, 40_000..40_300_u16, 65_528..=u16::MAX, any::<u16>()];
        let short_span =
            (port.clone(), 0..5_u16).prop_map(|(first, more)| (first, first.saturating_add(more)));
        let every_second =
            (0..2_u16).prop_map(|parity| (parity..=u16::MAX).step_by(2).map(|at| (at, at)).collect());
        let spans = prop_oneof![9 => vec(short_span, 0..40), 1 => every_second];
        (port.clone(), port, spans, any::<bool>()).prop_map(|(one, other, spans, ignores_parity)| {
            LocalPorts {
                range: PortRange { low: one.min(other), high: one.max(other) },
                reserved: ReservedPorts::merged(spans),
                step_width: 0,
                ignores_parity,
            }
        })
    }

    proptest! {
        #[test]
        fn the_number_of_expected_connects_is_that_of_a_walk_over_all_ports(
            ports in arbitrary_ports(),
            other in any::<u16>(),
        ) {
            let walked: Vec<u16> = ports.first_ports().collect();
            prop_assert_eq!(ports.expected_connects() as usize, walked.len());
            let PortRange { low, high } = ports.range;
            for port in [low, high, low + (high - low) / 2, other] {
                let reach = if !ports.range.contains(port) {
                    Reach::Outside
                } else if ports.reserved.ports().any(|reserved| reserved == port) {
                    Reach::Reserved
                } else if walked.contains(&port) || ports.is_behind_reserved(port) {
                    Reach::First
                } else if (port - low).is_multiple_of(2) || !walked.is_empty() {
                    Reach::Last
                } else {
                    Reach::First
                };
                prop_assert_eq!(ports.reach(port), reach, "{}", port);
            }
        }
    }

    #[test]
    fn the_chance_grows_from_zero_to_almost_one() {
        let rows =
            [(0, 14_116, 0.0), (14_116, 14_116, 0.632), (141_160, 14_116, 0.99995), (5, 0, 0.0), (1, 1, 1.0)];
        for (connects, expected_connects, want) in rows {
            let got = chance_after(connects, expected_connects);
            assert!((got - want).abs() < 0.001, "{connects} connects of {expected_connects}: {got}");
        }
    }
}
