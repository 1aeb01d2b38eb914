//! Which ports are about to be hit: somebody keeps dialling them, nobody listens, and `connect()` can choose them as a
//! source. Pure: what the programs counted and what a namespace may choose go in, what is to be told comes out.
//!
//! A port that can't be hit is looked at again, for a range and what is reserved of it can change: so often that few
//! dials pass between two looks, measured by how many a hit takes.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
};

use selfconn_ebpf::{
    Opener,
    risk::{FIRST, Tally, Target, WINDOW_NS},
};

use crate::ports::{LocalPorts, Odds, Reach};

const SECOND_NS: u64 = 1_000_000_000;

/// As often as a port is looked at while it is dialled, whatever the pace.
const SOONEST_NS: u64 = SECOND_NS / 10;

/// How many looks there are, on the mean, in as many dials as a hit takes.
const LOOKS: u64 = 50;

/// Dials of a port that nobody listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dials {
    /// Source and destination address; a v4-mapped one as IPv4.
    pub addr: IpAddr,
    /// Destination port.
    pub port: u16,
    /// Inode of the network namespace. 0: this kernel has no namespaces.
    pub netns: u32,
    /// Who made the newest.
    pub newest: Opener,
    /// When that was: `CLOCK_BOOTTIME`, nanoseconds.
    pub last_ns: u64,
    /// How many pids made them, at least.
    pub dialers: u32,
    /// How many there were.
    pub refused: u64,
    /// From the first of them to the newest.
    pub window_ns: u64,
}

/// What is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It can hit itself any time.
    AtRisk(Dials, Chance),
    /// It can't any more.
    Over(Dials, Why),
}

/// How likely a hit is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chance {
    /// One dial in so many hits.
    OneIn(u32),
    /// The port range can't be read, for this reason.
    Unknown(String),
}

/// Why a risk is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nobody dialled for a minute.
    Silence,
    /// `connect()` can't choose the port any more.
    Unreachable,
}

/// The ports that are dialled often.
#[derive(Debug, Default)]
pub struct Risks(HashMap<Target, Port>);

#[derive(Debug)]
struct Port {
    /// When to look at it: `CLOCK_BOOTTIME`, nanoseconds.
    look_ns: u64,
    /// At how many dials it is told, again.
    next: u64,
    is_told: bool,
    /// What the last look saw.
    last: Option<Dials>,
}

impl Risks {
    /// The programs counted many dials, or ten times as many as before: it is to be looked at now.
    pub fn heed(&mut self, target: Target) {
        let new = Port { look_ns: 0, next: FIRST, is_told: false, last: None };
        self.0.entry(target).or_insert(new).look_ns = 0;
    }

    /// When the next port is to be looked at: `CLOCK_BOOTTIME`, nanoseconds. `None`: none is dialled.
    #[must_use]
    pub fn next_look_ns(&self) -> Option<u64> {
        self.0.values().map(|port| port.look_ns).min()
    }

    /// Which ports are to be looked at now.
    #[must_use]
    pub fn due(&self, now_ns: u64) -> Vec<Target> {
        self.0.iter().filter(|(_, port)| port.look_ns <= now_ns).map(|(target, _)| *target).collect()
    }

    /// Whether somebody dials this port often.
    #[must_use]
    pub fn knows(&self, target: &Target) -> bool {
        self.0.contains_key(target)
    }

    /// How many ports are at risk now.
    #[must_use]
    pub fn at_risk(&self) -> usize {
        self.0.values().filter(|port| port.is_told).count()
    }

    /// Whether nobody dials the port any more, and so its count is to be ended; and what is to be told of that.
    pub fn end(&mut self, target: &Target, tally: Option<&Tally>, now_ns: u64) -> Option<Option<Happening>> {
        if tally.is_some_and(|tally| now_ns.saturating_sub(tally.last_ns) <= WINDOW_NS) {
            return None;
        }
        let port = self.0.remove(target)?;
        let dials = tally.map(|tally| Dials::new(target, tally)).or(port.last);
        Some(dials.filter(|_| port.is_told).map(|dials| Happening::Over(dials, Why::Silence)))
    }

    /// Looks at a port that is dialled: `ports` is what its namespace may choose from, or why that is unknown, and
    /// `is_taken` says whether a self-connection has it already.
    pub fn look(
        &mut self,
        target: &Target,
        tally: &Tally,
        ports: &Result<LocalPorts, String>,
        is_taken: bool,
        now_ns: u64,
    ) -> Option<Happening> {
        let port = self.0.get_mut(target)?;
        let dials = Dials::new(target, tally);
        let before = port.last.replace(dials);
        let silence_ns = dials.last_ns.saturating_add(WINDOW_NS + 1);
        port.look_ns = silence_ns;
        let chance = match ports {
            Err(why) => Some(Chance::Unknown(why.clone())),
            Ok(ports) => chance(ports, dials.port),
        };
        let Some(chance) = chance else {
            let expected = ports.as_ref().map_or(1, |ports| u64::from(ports.expected_dials()).max(1));
            let pause_ns = dials.gap_ns(before.as_ref()).saturating_mul(expected) / LOOKS;
            port.look_ns = silence_ns.min(now_ns.saturating_add(pause_ns.max(SOONEST_NS)));
            let was_told = std::mem::take(&mut port.is_told);
            return was_told.then_some(Happening::Over(dials, Why::Unreachable));
        };
        if is_taken || (port.is_told && dials.refused < port.next) {
            return None;
        }
        port.is_told = true;
        while port.next <= dials.refused {
            port.next = port.next.saturating_mul(10);
        }
        Some(Happening::AtRisk(dials, chance))
    }
}

/// How likely one dial is to come from the port that it goes to; `None`: `connect()` doesn't choose that one.
fn chance(ports: &LocalPorts, port: u16) -> Option<Chance> {
    let is_chosen = match ports.reach(port) {
        Reach::First => true,
        // Where every port of the first kind is reserved.
        Reach::Last => ports.expected_dials() == 0,
        Reach::Reserved | Reach::Outside => false,
    };
    is_chosen.then(|| Odds::of(ports).dials(port)).flatten().map(Chance::OneIn)
}

impl Dials {
    /// What the programs counted.
    #[must_use]
    pub fn new(target: &Target, tally: &Tally) -> Self {
        let mut octets = [0; 16];
        for (to, word) in octets.chunks_exact_mut(4).zip(target.addr) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        Self {
            addr: Ipv6Addr::from(octets).to_canonical(),
            port: target.port,
            netns: target.netns,
            newest: tally.newest,
            last_ns: tally.last_ns,
            dialers: tally.dialers(),
            refused: tally.refused(),
            window_ns: tally.last_ns.saturating_sub(tally.began_ns),
        }
    }

    /// From one dial to the next: the mean of all, or of those since `before` if that is less.
    fn gap_ns(&self, before: Option<&Self>) -> u64 {
        let mean = self.window_ns / (self.refused.saturating_sub(1)).max(1);
        let lately = before.and_then(|before| {
            let dials = self.refused.checked_sub(before.refused).filter(|dials| *dials > 0)?;
            Some(self.last_ns.saturating_sub(before.last_ns) / dials)
        });
        lately.map_or(mean, |lately| mean.min(lately))
    }

    /// In how many seconds a hit is to be expected at this pace, rounded up.
    #[must_use]
    pub fn eta_seconds(&self, chance: &Chance) -> Option<u64> {
        match chance {
            Chance::Unknown(_) => None,
            Chance::OneIn(dials) => {
                let ns = u128::from(self.window_ns) * u128::from(*dials)
                    / u128::from(self.refused.saturating_sub(1).max(1));
                u64::try_from(ns.div_ceil(u128::from(SECOND_NS))).ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_NS: u64 = 100_000 * SECOND_NS;
    /// ::ffff:127.0.0.1, port 40000.
    const TARGET: Target = Target {
        addr: [0, 0, 0xffff_u32.to_be(), 0x7f00_0001_u32.to_be()],
        netns: 7,
        port: 40_000,
        padding: 0,
    };

    /// So many dials, one each `gap_ns`, the newest now.
    fn tally(refused: u64, gap_ns: u64, now_ns: u64) -> Tally {
        let mut tally = Tally::NONE;
        (tally.total, tally.last_ns, tally.began_ns) = (refused, now_ns, now_ns - (refused - 1) * gap_ns);
        tally
    }

    fn ports(range: &str, reserved: &str) -> Result<LocalPorts, String> {
        LocalPorts::parse(range, reserved).map_err(|error| error.to_string())
    }

    fn looked(risks: &mut Risks, refused: u64, ports: &Result<LocalPorts, String>) -> Option<Happening> {
        risks.heed(TARGET);
        risks.look(&TARGET, &tally(refused, SECOND_NS, NOW_NS), ports, false, NOW_NS)
    }

    #[test]
    fn a_port_is_told_where_connect_can_choose_it() {
        for (what, range, reserved, one_in) in [
            ("first", "40000 40199", "", Some(100)),
            ("first, with fewer others", "40000 40199", "40002-40099", None),
            ("of the other parity", "40001 40199", "", None),
            ("of the other parity, and all others reserved", "39999 40000", "39999", Some(1)),
            ("reserved", "40000 40199", "40000", None),
            ("outside", "32768 39999", "", None),
        ] {
            let told = looked(&mut Risks::default(), 20, &ports(range, reserved));
            match (&told, one_in) {
                (Some(Happening::AtRisk(dials, chance)), Some(one_in)) => {
                    assert_eq!(*chance, Chance::OneIn(one_in), "{what}");
                    assert_eq!((dials.addr, dials.port), (IpAddr::from([127, 0, 0, 1]), 40_000));
                    assert_eq!((dials.refused, dials.window_ns), (20, 19 * SECOND_NS));
                    assert_eq!(dials.eta_seconds(chance), Some(one_in.into()), "{what}");
                }
                (Some(Happening::AtRisk(_, Chance::OneIn(fewer))), None) if what.contains("fewer") => {
                    assert!(*fewer < 100, "{what}: {fewer}");
                }
                (told, one_in) => assert!(told.is_none() && one_in.is_none(), "{what}: {told:?}"),
            }
        }
    }

    #[test]
    fn it_is_told_again_at_each_tenfold() {
        let (mut risks, ports) = (Risks::default(), ports("40000 40199", ""));
        let told: Vec<_> = [20, 21, 199, 200, 1_999, 2_001, 3_000, 20_000]
            .into_iter()
            .filter(|refused| looked(&mut risks, *refused, &ports).is_some())
            .collect();
        assert_eq!(told, [20, 200, 2_001, 20_000]);
        assert_eq!(risks.at_risk(), 1);
    }

    #[test]
    fn a_port_that_is_released_is_told_and_one_that_is_reserved_is_over() {
        let (free, reserved) = (ports("40000 40199", ""), ports("40000 40199", "40000"));
        let mut risks = Risks::default();
        assert_eq!(looked(&mut risks, 20, &reserved), None);
        assert_eq!(looked(&mut risks, 200, &reserved), None);
        assert_eq!(risks.at_risk(), 0);
        assert!(matches!(looked(&mut risks, 230, &free), Some(Happening::AtRisk(..))));
        assert_eq!(looked(&mut risks, 231, &free), None);
        let over = looked(&mut risks, 240, &reserved);
        assert!(matches!(over, Some(Happening::Over(_, Why::Unreachable))), "{over:?}");
        assert_eq!((risks.at_risk(), looked(&mut risks, 241, &reserved)), (0, None));
        assert!(matches!(looked(&mut risks, 250, &free), Some(Happening::AtRisk(..))));
    }

    #[test]
    fn an_unknown_range_is_told_as_that() {
        let told = looked(&mut Risks::default(), 20, &Err("no way in".to_owned()));
        let Some(Happening::AtRisk(dials, chance)) = told else { panic!("{told:?}") };
        assert_eq!(chance, Chance::Unknown("no way in".to_owned()));
        assert_eq!(dials.eta_seconds(&chance), None);
    }

    #[test]
    fn a_port_that_a_self_connection_has_can_not_be_hit_again() {
        let (mut risks, ports) = (Risks::default(), ports("40000 40199", ""));
        risks.heed(TARGET);
        let tally = tally(20, SECOND_NS, NOW_NS);
        assert_eq!(risks.look(&TARGET, &tally, &ports, true, NOW_NS), None);
        assert!(risks.look(&TARGET, &tally, &ports, false, NOW_NS).is_some());
    }

    #[test]
    fn it_is_over_after_a_minute_of_silence() {
        let (mut risks, ports) = (Risks::default(), ports("40000 40199", ""));
        assert!(looked(&mut risks, 20, &ports).is_some());
        let tally = tally(20, SECOND_NS, NOW_NS);
        assert_eq!(risks.end(&TARGET, Some(&tally), NOW_NS + WINDOW_NS), None);
        let look_ns = risks.next_look_ns().unwrap();
        assert_eq!(look_ns, NOW_NS + WINDOW_NS + 1, "no look before it can be over");
        assert_eq!((risks.due(look_ns - 1), risks.due(look_ns)), (vec![], vec![TARGET]));
        let over = risks.end(&TARGET, Some(&tally), look_ns);
        assert!(matches!(over, Some(Some(Happening::Over(_, Why::Silence)))), "{over:?}");
        assert_eq!((risks.at_risk(), risks.next_look_ns(), risks.knows(&TARGET)), (0, None, false));
    }

    #[test]
    fn what_was_not_told_ends_without_a_word() {
        let mut risks = Risks::default();
        assert_eq!(looked(&mut risks, 20, &ports("40000 40199", "40000")), None);
        let tally = tally(20, SECOND_NS, NOW_NS);
        assert_eq!(risks.end(&TARGET, Some(&tally), NOW_NS + WINDOW_NS + 1), Some(None));
    }

    #[test]
    fn looks_come_faster_the_nearer_a_hit_would_be() {
        const MS_NS: u64 = SECOND_NS / 1_000;
        for (what, range, gap_ns, pause_ns) in [
            ("a storm", "32769 60999", 1_000, SOONEST_NS),
            ("a small range", "40001 40199", 100 * MS_NS, 100 * MS_NS * 99 / LOOKS),
            ("ten a second", "32769 60999", 100 * MS_NS, 100 * MS_NS * 14_115 / LOOKS),
            ("one a second", "32769 60999", SECOND_NS, WINDOW_NS + 1),
        ] {
            let mut risks = Risks::default();
            risks.heed(TARGET);
            let tally = tally(20, gap_ns, NOW_NS);
            assert_eq!(risks.look(&TARGET, &tally, &ports(range, ""), false, NOW_NS), None, "{what}");
            assert_eq!(risks.next_look_ns(), Some(NOW_NS + pause_ns), "{what}");
        }
        // Slow for long, and a storm now.
        let mut risks = Risks::default();
        let unreachable = ports("32769 60999", "");
        risks.heed(TARGET);
        let slow = tally(10_000, SECOND_NS, NOW_NS);
        assert_eq!(risks.look(&TARGET, &slow, &unreachable, false, NOW_NS), None);
        let later_ns = NOW_NS + SECOND_NS;
        let mut fast = slow;
        (fast.total, fast.last_ns) = (slow.total + 10_000, later_ns);
        assert_eq!(risks.look(&TARGET, &fast, &unreachable, false, later_ns), None);
        assert_eq!(risks.next_look_ns(), Some(later_ns + SOONEST_NS));
    }
}
