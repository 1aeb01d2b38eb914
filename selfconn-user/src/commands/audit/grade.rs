//! How much of a risk a port is, and why: decided of what was read, without a look at anything.

use std::net::{IpAddr, SocketAddr};

use super::look::{Leaves, Seen, Target, Who};
use crate::{
    commands::repro::grouped,
    ports::{LocalPorts, Odds, Reach},
};

/// The ways of a client to a source port: `connect()` chooses one, `bind()` to port 0 does, or the client names one.
/// The last is no accident, and nothing prevents it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Risk {
    /// `connect()` chooses it.
    High,
    /// Only a client that does something beforehand gets it, or one that finds the better ones taken.
    Low,
    /// Nothing chooses it.
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

/// A port of a namespace, judged.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) netns: u32,
    /// `None`: any of the host's, and nobody listens. The unspecified one: somebody listens at all of them.
    pub(super) addr: Option<IpAddr>,
    pub(super) ifindex: Option<u32>,
    pub(super) port: u16,
    pub(super) risk: Risk,
    pub(super) why: String,
    /// The same in a few words, beside the range and who listens.
    pub(super) brief: String,
    /// `None`: nobody listens.
    pub(super) listener: Option<Who>,
    /// Of `connect()` where the risk is high, of `bind()` to port 0 and `connect()` where it is low.
    pub(super) expected_dials: Option<u32>,
    /// Whether the user named it.
    pub(super) is_asked: bool,
}

impl Row {
    /// The address and port as people write them.
    pub(super) fn end(&self) -> String {
        match (self.addr, self.ifindex) {
            (None, _) => format!("*:{}", self.port),
            (Some(addr), Some(ifindex)) => format!("[{addr}%{ifindex}]:{}", self.port),
            (Some(addr), None) => SocketAddr::new(addr, self.port).to_string(),
        }
    }

    /// Who listens, not yet escaped; empty: nobody does.
    pub(super) fn who(&self) -> String {
        self.listener.as_ref().map_or_else(String::new, Who::text)
    }
}

/// Judges each port of a namespace; those at risk come first.
pub(super) fn grade(seen: &Seen) -> Vec<Row> {
    let odds = Odds::of(&seen.ports);
    let mut rows: Vec<_> = seen
        .targets
        .iter()
        .map(|target| {
            let Grade { risk, why, brief, expected_dials } = judge(&seen.ports, &odds, target);
            Row {
                netns: seen.namespace.inode,
                addr: target.addr,
                ifindex: target.ifindex,
                port: target.port,
                risk,
                why,
                brief,
                listener: target.listener.clone(),
                expected_dials,
                is_asked: target.is_asked,
            }
        })
        .collect();
    // A port that was named without an address, and that somebody listens on: one row tells both.
    let covers = |row: &Row, port, risk| row.listener.is_some() && row.port == port && row.risk <= risk;
    let is_told: Vec<_> = rows
        .iter()
        .map(|row| row.addr.is_none() && rows.iter().any(|other| covers(other, row.port, row.risk)))
        .collect();
    let ports: Vec<_> =
        rows.iter().zip(&is_told).filter(|(_, told)| **told).map(|(row, _)| row.port).collect();
    for row in &mut rows {
        row.is_asked |= ports.contains(&row.port);
    }
    let mut told = is_told.into_iter();
    rows.retain(|_| !told.next().unwrap_or(false));
    rows.sort_by(|one, other| {
        let key = |row: &Row| (row.risk, row.port, row.addr, row.ifindex);
        key(one).cmp(&key(other))
    });
    rows
}

struct Grade {
    risk: Risk,
    why: String,
    brief: String,
    expected_dials: Option<u32>,
}

fn judge(ports: &LocalPorts, odds: &Odds, target: &Target) -> Grade {
    let Target { port, ref leaves, .. } = *target;
    let range = ports.range;
    let none = |why: String, brief: &str| Grade {
        risk: Risk::None,
        why,
        brief: brief.to_owned(),
        expected_dials: None,
    };
    if *leaves == Leaves::Foreign {
        let why = "not an address of this network namespace: a dial to it leaves from another";
        return none(why.to_owned(), "not an address of this namespace");
    }
    let parity = |port: u16| if port.is_multiple_of(2) { "even" } else { "odd" };
    let own = parity(port);
    // A listener at no address in particular is dialled at any; of the host's, all but some of 127.0.0.0/8 can be hit.
    let whereto = match target.addr {
        Some(addr) if !addr.is_unspecified() => "",
        Some(IpAddr::V4(_)) => ", to 127.0.0.1 or another address of this host,",
        _ => ", to ::1, 127.0.0.1 or another address of this host,",
    };
    let count =
        |expected: Option<u32>| expected.map(|count| format!("one dial in {}", grouped(count.into())));
    let is_up = target.listener.is_some();
    let when = if is_up { "once nobody listens" } else { "nobody listens now" };
    match (ports.reach(port), leaves) {
        (Reach::Outside, _) => {
            none(format!("outside {range}, from which the kernel takes source ports"), "outside the range")
        }
        (Reach::Reserved, _) => {
            none(format!("in {range}, but reserved in ip_local_reserved_ports"), "reserved")
        }
        (reach, Leaves::From(source)) => Grade {
            risk: Risk::Low,
            why: format!(
                "{own} port in {range}, but a dial to this address leaves from {source}: only a client that binds this \
                 address before it connects can hit itself"
            ),
            brief: format!("dials leave from {source}: only for a client that binds this address first"),
            expected_dials: if reach == Reach::First {
                odds.dials(port)
            } else {
                odds.dials_after_bind(port)
            },
        },
        (Reach::First, leaves) => {
            let expected_dials = odds.dials(port);
            let count = count(expected_dials).unwrap_or_default();
            let mut why =
                format!("connect() takes {own} ports of {range} first; {when}: {count}{whereto} hits itself");
            if let Leaves::Nowhere(reason) = leaves {
                why = format!("{why}; for the time being it can't be dialled: {reason}");
            }
            let once = if is_up { " once it is down" } else { "" };
            Grade {
                risk: Risk::High,
                why,
                brief: format!("{own}: {count} hits itself{once}"),
                expected_dials,
            }
        }
        (Reach::Last, _) => {
            let expected_dials = odds.dials_after_bind(port);
            let (how, brief) = match count(expected_dials) {
                Some(count) => (
                    format!("for a client that binds port 0 first {count}{whereto} hits itself"),
                    format!("{own}: {count}, only for a client that binds port 0 first"),
                ),
                None => ("it is the last to be tried".to_owned(), "the last port to be tried".to_owned()),
            };
            let first = parity(range.low);
            let why = match own == first {
                true => format!("connect() takes other ports of {range} while there are any; {when}: {how}"),
                false => format!(
                    "connect() takes {own} ports of {range} only when no {first} one is left; {when}: {how}"
                ),
            };
            Grade { risk: Risk::Low, why, brief, expected_dials }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{commands::audit::fix, sockets::Namespace};

    fn target(addr: Option<&str>, port: u16, leaves: Leaves, listener: Option<Who>) -> Target {
        let addr = addr.map(|addr| addr.parse().unwrap());
        Target { addr, ifindex: None, port, leaves, inode: 0, listener, is_asked: addr.is_none() }
    }

    fn seen(range: &str, reserved: &str, targets: Vec<Target>) -> Seen {
        Seen {
            namespace: Namespace { inode: 7, path: "/run/netns/blue".into(), is_own: false },
            ports: LocalPorts::parse(range, reserved).unwrap(),
            lasts: None,
            targets,
        }
    }

    fn java() -> Option<Who> {
        Some(Who { pid: Some(812), comm: Some("java".to_owned()), ..Who::default() })
    }

    #[test]
    fn the_risk_is_a_matter_of_range_parity_reservation_and_address() {
        let other = Leaves::From("127.0.0.1".parse().unwrap());
        let lo_is_down = Leaves::Nowhere("Network is unreachable".to_owned());
        let rows = [
            // Range, reserved, port, from where, risk, dials, a part of why.
            (
                "32768 60999",
                "",
                44446,
                Leaves::Itself,
                Risk::High,
                Some(14_116),
                "even ports of 32768-60999 first",
            ),
            (
                "32768 60999",
                "",
                44445,
                Leaves::Itself,
                Risk::Low,
                Some(14_116),
                "odd ports of 32768-60999 only when",
            ),
            ("32769 60999", "", 44445, Leaves::Itself, Risk::High, Some(14_115), "odd ports"),
            ("32768 60999", "44446", 44446, Leaves::Itself, Risk::None, None, "but reserved"),
            ("32768 60999", "", 8080, Leaves::Itself, Risk::None, None, "outside 32768-60999"),
            ("32768 60999", "", 44446, other.clone(), Risk::Low, Some(14_116), "leaves from 127.0.0.1"),
            ("32768 60999", "", 8080, other, Risk::None, None, "outside"),
            ("32768 60999", "", 44446, Leaves::Foreign, Risk::None, None, "not an address"),
            ("32768 60999", "", 44446, lo_is_down, Risk::High, Some(14_116), "Network is unreachable"),
            ("40000 40004", "", 40004, Leaves::Itself, Risk::Low, None, "the last to be tried"),
        ];
        for (range, reserved, port, leaves, risk, dials, why) in rows {
            let seen = seen(range, reserved, vec![target(Some("127.0.0.53"), port, leaves, java())]);
            let rows = grade(&seen);
            let what = format!("{range} less {reserved:?}: {port}: {rows:?}");
            assert_eq!((rows[0].risk, rows[0].expected_dials), (risk, dials), "{what}");
            assert!(rows[0].why.contains(why), "{what}");
            assert_eq!(fix::fix(&seen, &rows).is_some(), risk != Risk::None, "{what}");
        }
    }

    #[test]
    fn a_listener_is_told_as_at_risk_once_it_is_down() {
        let seen = seen(
            "40000 40199",
            "",
            vec![
                target(Some("0.0.0.0"), 40_100, Leaves::Itself, java()),
                target(None, 40_102, Leaves::Itself, None),
            ],
        );
        let rows = grade(&seen);
        assert!(
            rows[0].why.contains("once nobody listens: one dial in 100, to 127.0.0.1 or another"),
            "{rows:?}"
        );
        assert!(
            rows[1].why.contains("nobody listens now: one dial in 100, to ::1, 127.0.0.1 or another"),
            "{rows:?}"
        );
        assert_eq!((rows[0].end().as_str(), rows[1].end().as_str()), ("0.0.0.0:40100", "*:40102"));
        assert_eq!((rows[0].who().as_str(), rows[1].who().as_str()), ("java[812]", ""));
    }

    #[test]
    fn a_port_without_an_address_is_told_by_its_listener() {
        let any = |port| target(None, port, Leaves::Itself, None);
        let elsewhere = Leaves::From("127.0.0.1".parse().unwrap());
        let seen = seen(
            "40000 40199",
            "",
            vec![
                any(40_100),
                target(Some("127.0.0.1"), 40_100, Leaves::Itself, java()),
                // This one's listener can't be hit by a plain dial, while other addresses can.
                any(40_102),
                target(Some("127.0.0.53"), 40_102, elsewhere, java()),
                any(80),
            ],
        );
        let rows = grade(&seen);
        let told: Vec<_> = rows.iter().map(|row| (row.end(), row.risk, row.is_asked)).collect();
        assert_eq!(
            told,
            [
                ("127.0.0.1:40100".to_owned(), Risk::High, true),
                ("*:40102".to_owned(), Risk::High, true),
                ("127.0.0.53:40102".to_owned(), Risk::Low, false),
                ("*:80".to_owned(), Risk::None, true),
            ]
        );
    }

    #[test]
    fn the_fix_keeps_what_is_reserved_and_takes_all_at_risk() {
        let mut seen = seen(
            "40000 40199",
            "8080,40104",
            vec![
                target(Some("127.0.0.1"), 40_102, Leaves::Itself, java()),
                target(Some("127.0.0.1"), 40_103, Leaves::Itself, java()),
                target(Some("127.0.0.1"), 22, Leaves::Itself, java()),
            ],
        );
        let set = "sysctl -w net.ipv4.ip_local_reserved_ports=8080,40102-40104";
        let rows = grade(&seen);
        let fix = |seen: &Seen| fix::fix(seen, &rows).unwrap();
        assert_eq!(fix(&seen).now, format!("nsenter --net=/run/netns/blue {set}"));
        assert_eq!(fix(&seen).lasting, None);
        seen.lasts = Some(fix::Lasts::Pod);
        assert_eq!(
            fix(&seen).lasting.unwrap(),
            "securityContext: {sysctls: [{name: net.ipv4.ip_local_reserved_ports, value: \"8080,40102-40104\"}]}"
        );
        seen.lasts = Some(fix::Lasts::SysctlD);
        seen.namespace.is_own = true;
        assert_eq!(fix(&seen).now, set);
        assert!(
            fix(&seen).lasting.unwrap().starts_with("selfconn audit --netns self --sysctl > /etc/sysctl.d/")
        );
    }

    #[test]
    fn a_sysctl_d_file_has_one_setting_and_no_line_of_a_process() {
        let mut evil = java();
        evil.as_mut().unwrap().comm = Some("x\nkernel.panic = 1".to_owned());
        let seen = |targets| seen("40000 40199", "8080", targets);
        let at_risk = seen(vec![target(Some("127.0.0.1"), 40_102, Leaves::Itself, evil)]);
        let text = fix::sysctl_d(&at_risk, &grade(&at_risk));
        let settings: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(settings, ["net.ipv4.ip_local_reserved_ports = 8080,40102"], "{text}");
        assert!(text.contains("# Added, high risk: 127.0.0.1:40102, x\\nkernel.panic = 1[812]"), "{text}");
        let calm = seen(vec![]);
        assert!(fix::sysctl_d(&calm, &[]).ends_with("\nnet.ipv4.ip_local_reserved_ports = 8080\n"));
        let bare = Seen { ports: LocalPorts::parse("40000 40199", "").unwrap(), ..calm };
        assert!(fix::sysctl_d(&bare, &[]).lines().all(|line| line.starts_with('#')));
    }
}
