//! Assesses the risk of each port, and gives the reason. Pure functions on the state that `collect` read: no
//! I/O here.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use super::collect::{AuditedPort, ListenerProcess, NamespaceInfo, RouteSource};
use crate::{
    event::text::group_thousands,
    ports::{LocalPorts, Odds, Reach},
};

/// How easily a client gets the port as its source port.
///
/// A source port is chosen by `connect()`, by `bind()` to port 0, or by the client itself. The last case is
/// not an accident, and no setting prevents it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Risk {
    /// `connect()` can choose the port.
    High,
    /// Only a client that does something special before `connect()` gets the port, or any client if all
    /// better ports are taken.
    Low,
    /// The kernel never chooses the port.
    None,
}

impl Risk {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Low => "low",
            Self::None => "none",
        }
    }
}

/// The assessment of one address and port of a network namespace.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PortAssessment {
    pub(super) netns: u32,
    /// `None`: any address of the host, without a listener. The unspecified address: a listener on all
    /// addresses.
    pub(super) addr: Option<IpAddr>,
    pub(super) ifindex: Option<u32>,
    pub(super) port: u16,
    pub(super) risk: Risk,
    pub(super) why: String,
    /// `why` in a few words, for the table that also shows the range and the listener.
    pub(super) brief: String,
    /// `None`: no listener.
    pub(super) listener: Option<ListenerProcess>,
    /// The mean number of connects until one connects to itself. High risk: of plain `connect()` calls. Low
    /// risk: of `bind()` to port 0 followed by `connect()`.
    pub(super) expected_dials: Option<u32>,
    /// True if the user named this port.
    pub(super) is_requested: bool,
}

impl PortAssessment {
    /// The address and port in the usual notation.
    pub(super) fn endpoint_text(&self) -> String {
        match (self.addr, self.ifindex) {
            (None, _) => format!("*:{}", self.port),
            (Some(addr), Some(ifindex)) => format!("[{addr}%{ifindex}]:{}", self.port),
            (Some(addr), None) => SocketAddr::new(addr, self.port).to_string(),
        }
    }

    /// The listening process, empty without a listener. The caller must escape it.
    pub(super) fn listener_text(&self) -> String {
        self.listener.as_ref().map_or_else(String::new, ListenerProcess::description)
    }
}

/// Assesses each port of a namespace. The ports at risk come first.
pub(super) fn assess(info: &NamespaceInfo) -> Vec<PortAssessment> {
    let odds = Odds::of(&info.local_ports);
    let mut rows: Vec<_> = info
        .audited_ports
        .iter()
        .map(|audited| {
            let Assessment { risk, why, brief, expected_dials } =
                assess_port(&info.local_ports, &odds, audited);
            PortAssessment {
                netns: info.namespace.id.inode,
                addr: audited.addr,
                ifindex: audited.ifindex,
                port: audited.port,
                risk,
                why,
                brief,
                listener: audited.listener.clone(),
                expected_dials,
                is_requested: audited.is_requested,
            }
        })
        .collect();
    // The user named a port without an address, and the port has a listener of at least the same risk: show
    // only the row of the listener.
    let mut risk_of_listeners: HashMap<u16, Risk> = HashMap::new();
    for row in rows.iter().filter(|row| row.listener.is_some()) {
        let risk = risk_of_listeners.entry(row.port).or_insert(row.risk);
        *risk = row.risk.min(*risk);
    }
    let mut covered_ports = HashSet::new();
    rows.retain(|row| {
        let is_covered =
            row.addr.is_none() && risk_of_listeners.get(&row.port).is_some_and(|risk| *risk <= row.risk);
        if is_covered {
            covered_ports.insert(row.port);
        }
        !is_covered
    });
    for row in &mut rows {
        row.is_requested |= covered_ports.contains(&row.port);
    }
    rows.sort_by(|one, other| {
        let key = |row: &PortAssessment| (row.risk, row.port, row.addr, row.ifindex);
        key(one).cmp(&key(other))
    });
    rows
}

struct Assessment {
    risk: Risk,
    why: String,
    brief: String,
    expected_dials: Option<u32>,
}

fn assess_port(ports: &LocalPorts, odds: &Odds, audited: &AuditedPort) -> Assessment {
    let AuditedPort { port, ref route_source, .. } = *audited;
    let range = ports.range;
    let none = |why: String, brief: &str| Assessment {
        risk: Risk::None,
        why,
        brief: brief.to_owned(),
        expected_dials: None,
    };
    if *route_source == RouteSource::NotLocal {
        let why = "not an address of this network namespace: a connect to it has another source address";
        return none(why.to_owned(), "not an address of this namespace");
    }
    let parity = |port: u16| if port.is_multiple_of(2) { "even" } else { "odd" };
    let port_parity = parity(port);
    // Clients reach a listener on all addresses at any of them. Each address of the host can self-connect,
    // except those of 127.0.0.0/8 for which the kernel chooses another source address.
    let destinations = match audited.addr {
        Some(addr) if !addr.is_unspecified() => "",
        Some(IpAddr::V4(_)) => ", to 127.0.0.1 or another address of this host,",
        _ => ", to ::1, 127.0.0.1 or another address of this host,",
    };
    let count = |expected: Option<u32>| {
        expected.map(|count| format!("one attempt in {}", group_thousands(count.into())))
    };
    let has_listener = audited.listener.is_some();
    let when = if has_listener { "while nobody listens" } else { "nobody listens now" };
    match (ports.reach(port), route_source) {
        (Reach::Outside, _) => {
            none(format!("outside {range}, from which the kernel takes source ports"), "outside the range")
        }
        (Reach::Reserved, _) => {
            none(format!("in {range}, but reserved in ip_local_reserved_ports"), "reserved")
        }
        (reach, RouteSource::Other(source)) => Assessment {
            risk: Risk::Low,
            why: format!(
                "{port_parity} port in {range}, but a connect to this address has the source address {source}: only a \
                 client that binds this address before it connects can connect to itself"
            ),
            brief: format!("source address is {source}: only for a client that binds this address first"),
            expected_dials: if reach == Reach::First {
                odds.expected_connects(port)
            } else {
                odds.expected_connects_after_bind(port)
            },
        },
        (Reach::First, route_source) => {
            let expected_dials = odds.expected_connects(port);
            let count = count(expected_dials).unwrap_or_default();
            let mut why = format!(
                "connect() takes {port_parity} ports of {range} first; {when}: {count}{destinations} connects to itself"
            );
            if let RouteSource::Unroutable(reason) = route_source {
                why = format!("{why}; currently there is no route to it: {reason}");
            }
            let condition = if has_listener { " while it is down" } else { "" };
            Assessment {
                risk: Risk::High,
                why,
                brief: format!("{port_parity}: {count} connects to itself{condition}"),
                expected_dials,
            }
        }
        (Reach::Last, _) => {
            let expected_dials = odds.expected_connects_after_bind(port);
            let (how, brief) = match count(expected_dials) {
                Some(count) => (
                    format!("for a client that binds port 0 first, {count}{destinations} connects to itself"),
                    format!("{port_parity}: {count}, only for a client that binds port 0 first"),
                ),
                None => (
                    "the kernel tries this port last".to_owned(),
                    "the kernel tries this port last".to_owned(),
                ),
            };
            let first_parity = parity(range.low);
            let why = match port_parity == first_parity {
                true => format!("connect() takes other ports of {range} while any is free; {when}: {how}"),
                false => format!(
                    "connect() takes {port_parity} ports of {range} only if no {first_parity} port is free; {when}: {how}"
                ),
            };
            Assessment { risk: Risk::Low, why, brief, expected_dials }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::sockets::{Namespace, NetnsId};

    pub(in crate::commands::audit) fn audited(
        addr: Option<&str>,
        port: u16,
        route_source: RouteSource,
        listener: Option<ListenerProcess>,
    ) -> AuditedPort {
        let addr = addr.map(|addr| addr.parse().unwrap());
        AuditedPort {
            addr,
            ifindex: None,
            port,
            route_source,
            inode: 0,
            listener,
            is_requested: addr.is_none(),
        }
    }

    pub(in crate::commands::audit) fn namespace(
        range: &str,
        reserved: &str,
        audited_ports: Vec<AuditedPort>,
    ) -> NamespaceInfo {
        NamespaceInfo {
            namespace: Namespace {
                id: NetnsId { inode: 7, cookie: 0 },
                path: "/run/netns/blue".into(),
                is_current: false,
            },
            local_ports: LocalPorts::parse(range, reserved).unwrap(),
            persistence: None,
            guard: None,
            audited_ports,
        }
    }

    pub(in crate::commands::audit) fn java() -> Option<ListenerProcess> {
        Some(ListenerProcess { pid: Some(812), comm: Some("java".to_owned()), ..ListenerProcess::default() })
    }

    #[test]
    fn the_risk_depends_on_range_parity_reservation_and_address() {
        let other = RouteSource::Other("127.0.0.1".parse().unwrap());
        let lo_is_down = RouteSource::Unroutable("Network is unreachable".to_owned());
        let rows = [
            // Range, reserved ports, port, source address, risk, expected connects, a part of `why`.
            (
                "32768 60999",
                "",
                44446,
                RouteSource::Same,
                Risk::High,
                Some(14_116),
                "even ports of 32768-60999 first",
            ),
            (
                "32768 60999",
                "",
                44445,
                RouteSource::Same,
                Risk::Low,
                Some(14_116),
                "odd ports of 32768-60999 only if",
            ),
            ("32769 60999", "", 44445, RouteSource::Same, Risk::High, Some(14_115), "odd ports"),
            ("32768 60999", "44446", 44446, RouteSource::Same, Risk::None, None, "but reserved"),
            ("32768 60999", "", 8080, RouteSource::Same, Risk::None, None, "outside 32768-60999"),
            ("32768 60999", "", 44446, other.clone(), Risk::Low, Some(14_116), "source address 127.0.0.1"),
            ("32768 60999", "", 8080, other, Risk::None, None, "outside"),
            ("32768 60999", "", 44446, RouteSource::NotLocal, Risk::None, None, "not an address"),
            ("32768 60999", "", 44446, lo_is_down, Risk::High, Some(14_116), "Network is unreachable"),
            ("40000 40004", "", 40004, RouteSource::Same, Risk::Low, None, "tries this port last"),
        ];
        for (range, reserved, port, source, risk, expected_connects, why) in rows {
            let info = namespace(range, reserved, vec![audited(Some("127.0.0.53"), port, source, java())]);
            let rows = assess(&info);
            let case = format!("{range} without {reserved:?}: {port}: {rows:?}");
            assert_eq!((rows[0].risk, rows[0].expected_dials), (risk, expected_connects), "{case}");
            assert!(rows[0].why.contains(why), "{case}");
        }
    }

    #[test]
    fn a_port_with_a_listener_is_at_risk_while_the_listener_is_down() {
        let info = namespace(
            "40000 40199",
            "",
            vec![
                audited(Some("0.0.0.0"), 40_100, RouteSource::Same, java()),
                audited(None, 40_102, RouteSource::Same, None),
            ],
        );
        let rows = assess(&info);
        assert!(
            rows[0].why.contains("while nobody listens: one attempt in 100, to 127.0.0.1 or another"),
            "{rows:?}"
        );
        assert!(
            rows[1].why.contains("nobody listens now: one attempt in 100, to ::1, 127.0.0.1 or another"),
            "{rows:?}"
        );
        assert_eq!(
            (rows[0].endpoint_text().as_str(), rows[1].endpoint_text().as_str()),
            ("0.0.0.0:40100", "*:40102")
        );
        assert_eq!((rows[0].listener_text().as_str(), rows[1].listener_text().as_str()), ("java[812]", ""));
    }

    #[test]
    fn a_port_without_an_address_is_covered_by_the_row_of_its_listener() {
        let any_address = |port| audited(None, port, RouteSource::Same, None);
        let other_source = RouteSource::Other("127.0.0.1".parse().unwrap());
        let info = namespace(
            "40000 40199",
            "",
            vec![
                any_address(40_100),
                audited(Some("127.0.0.1"), 40_100, RouteSource::Same, java()),
                // A plain connect to this listener's address cannot connect to itself; to other addresses it
                // can.
                any_address(40_102),
                audited(Some("127.0.0.53"), 40_102, other_source, java()),
                any_address(80),
            ],
        );
        let rows = assess(&info);
        let shown: Vec<_> =
            rows.iter().map(|row| (row.endpoint_text(), row.risk, row.is_requested)).collect();
        assert_eq!(
            shown,
            [
                ("127.0.0.1:40100".to_owned(), Risk::High, true),
                ("*:40102".to_owned(), Risk::High, true),
                ("127.0.0.53:40102".to_owned(), Risk::Low, false),
                ("*:80".to_owned(), Risk::None, true),
            ]
        );
    }
}
