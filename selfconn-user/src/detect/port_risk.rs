//! Finds the ports at risk of a self-connection: a program keeps connecting to the port, nothing listens on
//! it, and `connect()` can choose it as source port. Pure: the input is the probes' counts and the local port
//! range of a network namespace, the output is the events to emit.
//!
//! A port that `connect()` can't choose is checked again, because the port range and the reserved ports can
//! change. The interval depends on the rate of the attempts: few attempts pass between two checks, compared
//! with the number of attempts that a self-connection takes on average.

use std::collections::HashMap;

use selfconn_ebpf::{
    Endpoint, Opener,
    refused_connects::{REPORT_THRESHOLD, RefusedCount, WINDOW_NS},
};

use crate::{
    ports::{LocalPorts, Odds, Reach},
    sockets::PortUse,
};

const SECOND_NS: u64 = 1_000_000_000;

/// Minimum interval between two checks of a port, at any rate of attempts.
const MIN_CHECK_INTERVAL_NS: u64 = SECOND_NS / 10;

/// Minimum interval between two checks of a port that is not at risk because somebody has bound it.
const MIN_BOUND_CHECK_INTERVAL_NS: u64 = SECOND_NS;

/// Interval between the checks after the end of a listener, and their number. The kernel closes the connections that
/// nobody has accepted before it gives the port back. No two checks follow each other sooner, whatever the programs
/// report: anybody can open and close a listener in a loop.
const RELEASE_CHECK_INTERVAL_NS: u64 = SECOND_NS / 50;
const RELEASE_CHECKS: u8 = 4;

/// Mean number of checks during the number of attempts that a self-connection takes on average.
const CHECKS_PER_EXPECTED_HIT: u64 = 50;

/// Refused connection attempts to one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedConnects {
    /// The destination, for sockets of either family. Namespace 0: this kernel has no namespaces.
    pub endpoint: Endpoint,
    /// The task that made the newest attempt.
    pub newest: Opener,
    /// Time of the newest attempt: `CLOCK_BOOTTIME`, nanoseconds.
    pub last_ns: u64,
    /// The number of the risk in this run, from the first report until the risk is over. 0: not reported.
    pub risk: u64,
    /// Number of distinct pids that made the attempts (a lower bound).
    pub dialers: u32,
    /// Number of attempts.
    pub refused: u64,
    /// Time from the first attempt to the newest.
    pub window_ns: u64,
}

/// An event about a port at risk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortRiskEvent {
    /// The next attempt can connect to itself. True: unless a socket that can't be seen is bound to the port.
    AtRisk(RefusedConnects, Chance, bool),
    /// The port is not at risk any more.
    Over(RefusedConnects, RiskEndReason),
}

/// What is known of a port now.
#[derive(Clone, Copy, Debug)]
pub struct PortLook<'a> {
    /// The local port range of its namespace, or the reason why that is unknown.
    pub ports: Result<&'a LocalPorts, &'a str>,
    /// What has the port. `None`: unknown.
    pub port_use: Option<PortUse>,
    /// True if the kernel shows sockets that are bound and idle.
    pub shows_idle: bool,
}

/// Probability that one attempt connects to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chance {
    /// One in this number of attempts.
    OneIn(u32),
    /// The port range can't be read. The text is the reason.
    Unknown(String),
}

/// Why a port is not at risk any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RiskEndReason {
    /// There was no attempt for a minute.
    Silence,
    /// `connect()` can't choose the port any more.
    Unreachable,
    /// Its network namespace has ended.
    NetnsEnded,
}

/// The ports with many refused connection attempts.
#[derive(Debug, Default)]
pub struct PortRisks {
    ports: HashMap<Endpoint, PortState>,
    /// Number of risks that were reported so far.
    risks: u64,
    /// Time of the last check of any port: `CLOCK_BOOTTIME`, nanoseconds.
    last_check_ns: u64,
    /// True if the programs do not wait for the ends of exactly the listeners at [`Self::tracked`].
    is_watch_stale: bool,
}

#[derive(Debug)]
struct PortState {
    /// Time of the next check: `CLOCK_BOOTTIME`, nanoseconds.
    next_check_ns: u64,
    /// Number of attempts at which the port is reported next.
    next_report_count: u64,
    /// The number of the risk that is reported and not over.
    risk: Option<u64>,
    /// True if somebody has bound the port, so that `connect()` does not choose it.
    is_bound: bool,
    /// Number of checks that follow each other because a listener has ended.
    release_checks: u8,
    /// The attempts at the last check.
    last_connects: Option<RefusedConnects>,
}

impl PortRisks {
    /// The probes reported that the count of this port crossed a threshold (the first, or the next tenfold).
    /// The port is due for a check now.
    pub fn on_threshold(&mut self, destination: Endpoint) {
        let new = PortState {
            next_check_ns: 0,
            next_report_count: REPORT_THRESHOLD,
            risk: None,
            is_bound: false,
            release_checks: 0,
            last_connects: None,
        };
        self.ports.entry(destination).or_insert(new).next_check_ns = 0;
    }

    /// A listener at this port, at any address, is closed: if somebody has bound the port, that may be over.
    pub fn on_listener_closed(&mut self, closed: &Endpoint) {
        // The report has ended the watch, maybe that of another port in the same slot.
        self.is_watch_stale = true;
        for (destination, port) in &mut self.ports {
            if destination.port == closed.port && destination.is_in_netns_of(closed) {
                (port.next_check_ns, port.release_checks) = (0, RELEASE_CHECKS);
            }
        }
    }

    /// The ports that are tracked.
    pub fn tracked(&self) -> impl Iterator<Item = &Endpoint> {
        self.ports.keys()
    }

    /// Time of the next check: `CLOCK_BOOTTIME`, nanoseconds. `None`: no port is tracked.
    #[must_use]
    pub fn next_check_ns(&self) -> Option<u64> {
        let due_ns = match self.is_watch_stale {
            true => Some(0),
            false => self.ports.values().map(|port| port.next_check_ns).min(),
        };
        due_ns.map(|due_ns| due_ns.max(self.last_check_ns + RELEASE_CHECK_INTERVAL_NS))
    }

    /// Begins a check. Returns the ports that are due; the caller must let the programs wait for the ends of the
    /// listeners at [`Self::tracked`].
    pub fn begin_check(&mut self, now_ns: u64) -> Vec<Endpoint> {
        (self.last_check_ns, self.is_watch_stale) = (now_ns, false);
        self.ports
            .iter()
            .filter(|(_, port)| port.next_check_ns <= now_ns)
            .map(|(destination, _)| *destination)
            .collect()
    }

    /// True if the count of this port has crossed a threshold and has not expired.
    #[must_use]
    pub fn is_tracked(&self, destination: &Endpoint) -> bool {
        self.ports.contains_key(destination)
    }

    /// Number of ports at risk now.
    #[must_use]
    pub fn at_risk(&self) -> usize {
        self.ports.values().filter(|port| port.risk.is_some()).count()
    }

    /// Stops tracking a port after a minute without attempts. `None`: attempts go on. `Some`: tracking has
    /// stopped; the caller must remove the port's count, and emit the event if there is one.
    pub fn expire(
        &mut self,
        destination: &Endpoint,
        count: Option<&RefusedCount>,
        now_ns: u64,
    ) -> Option<Option<PortRiskEvent>> {
        if count.is_some_and(|count| now_ns.saturating_sub(count.last_ns) <= WINDOW_NS) {
            return None;
        }
        let port = self.ports.remove(destination)?;
        let connects = count.map(|count| RefusedConnects::new(destination, count)).or(port.last_connects);
        let reported = port.risk.zip(connects).map(|(risk, connects)| RefusedConnects { risk, ..connects });
        Some(reported.map(|connects| PortRiskEvent::Over(connects, RiskEndReason::Silence)))
    }

    /// Stops tracking a port whose network namespace has ended. The result is the event to emit.
    pub fn end(&mut self, destination: &Endpoint, count: &RefusedCount) -> Option<PortRiskEvent> {
        let port = self.ports.remove(destination)?;
        self.is_watch_stale = true;
        let risk = port.risk?;
        let connects = RefusedConnects { risk, ..RefusedConnects::new(destination, count) };
        Some(PortRiskEvent::Over(connects, RiskEndReason::NetnsEnded))
    }

    /// Checks a tracked port. `is_taken` is true if a self-connection already holds the port.
    ///
    /// `connect()` never chooses a port that a socket was bound to while any socket of that time has it
    /// (`tb->fastreuse >= 0` in `__inet_hash_connect`, net/ipv4/inet_hashtables.c at v6.12). So connections keep a
    /// port out of reach after the end of their listener. Connections whose port `connect()` chose don't.
    pub fn check(
        &mut self,
        destination: &Endpoint,
        count: &RefusedCount,
        look: &PortLook<'_>,
        is_taken: bool,
        now_ns: u64,
    ) -> Option<PortRiskEvent> {
        let port = self.ports.get_mut(destination)?;
        let connects =
            RefusedConnects { risk: port.risk.unwrap_or(0), ..RefusedConnects::new(destination, count) };
        let before = port.last_connects.replace(connects);
        let expiry_ns = connects.last_ns.saturating_add(WINDOW_NS + 1);
        port.next_check_ns = expiry_ns;
        let chance = match look.ports {
            Err(why) => Some(Chance::Unknown(why.to_owned())),
            Ok(ports) => chance(ports, connects.endpoint.port),
        };
        let port_use = look.port_use.unwrap_or_default();
        port.is_bound = port_use.is_bound || port.is_bound && port_use.is_connected;
        let min_interval_ns = if !port.is_bound || chance.is_none() {
            MIN_CHECK_INTERVAL_NS
        } else if port.release_checks > 0 {
            port.release_checks -= 1;
            RELEASE_CHECK_INTERVAL_NS
        } else {
            MIN_BOUND_CHECK_INTERVAL_NS
        };
        let Some(chance) = chance.filter(|_| !port.is_bound) else {
            let expected = look.ports.as_ref().map_or(1, |ports| u64::from(ports.expected_connects()).max(1));
            let interval_ns =
                connects.gap_ns(before.as_ref()).saturating_mul(expected) / CHECKS_PER_EXPECTED_HIT;
            let interval_ns = match min_interval_ns {
                RELEASE_CHECK_INTERVAL_NS => RELEASE_CHECK_INTERVAL_NS,
                min => interval_ns.max(min),
            };
            port.next_check_ns = expiry_ns.min(now_ns.saturating_add(interval_ns));
            return port.risk.take().map(|_| PortRiskEvent::Over(connects, RiskEndReason::Unreachable));
        };
        if is_taken
            || port_use.is_self_connected
            || (port.risk.is_some() && connects.refused < port.next_report_count)
        {
            return None;
        }
        let risk = *port.risk.get_or_insert_with(|| {
            self.risks += 1;
            self.risks
        });
        while port.next_report_count <= connects.refused {
            port.next_report_count = port.next_report_count.saturating_mul(10);
        }
        let may_be_bound = port_use.is_connected || look.port_use.is_none() || !look.shows_idle;
        Some(PortRiskEvent::AtRisk(RefusedConnects { risk, ..connects }, chance, may_be_bound))
    }
}

/// Probability that `connect()` chooses the destination port as source port. `None`: it never chooses that
/// port.
fn chance(ports: &LocalPorts, port: u16) -> Option<Chance> {
    let is_chosen = match ports.reach(port) {
        Reach::First => true,
        // `connect()` chooses these ports only if every port of the preferred parity is reserved.
        Reach::Last => ports.expected_connects() == 0,
        Reach::Reserved | Reach::Outside => false,
    };
    is_chosen.then(|| Odds::of(ports).expected_connects(port)).flatten().map(Chance::OneIn)
}

impl RefusedConnects {
    /// Converts a count of the probes.
    #[must_use]
    pub fn new(destination: &Endpoint, count: &RefusedCount) -> Self {
        Self {
            endpoint: *destination,
            newest: count.last_opener,
            last_ns: count.last_ns,
            risk: 0,
            dialers: count.pid_count(),
            refused: count.refused(),
            window_ns: count.last_ns.saturating_sub(count.window_start_ns),
        }
    }

    /// Mean time between two attempts: of all attempts, or of the attempts since `before` if that is less.
    fn gap_ns(&self, before: Option<&Self>) -> u64 {
        let mean = self.window_ns / (self.refused.saturating_sub(1)).max(1);
        let recent = before.and_then(|before| {
            let connects = self.refused.checked_sub(before.refused).filter(|connects| *connects > 0)?;
            Some(self.last_ns.saturating_sub(before.last_ns) / connects)
        });
        recent.map_or(mean, |recent| mean.min(recent))
    }

    /// Expected number of seconds until a self-connection at this rate of attempts, rounded up.
    #[must_use]
    pub fn eta_seconds(&self, chance: &Chance) -> Option<u64> {
        match chance {
            Chance::Unknown(_) => None,
            Chance::OneIn(connects) => {
                let ns = u128::from(self.window_ns) * u128::from(*connects)
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
    const DESTINATION: Endpoint = Endpoint {
        addr: [0, 0, 0xffff_u32.to_be(), 0x7f00_0001_u32.to_be()],
        netns: 7,
        port: 40_000,
        family: 0,
        ..Endpoint::UNKNOWN
    };

    /// `refused` attempts, one every `gap_ns`, the newest at `now_ns`.
    fn count(refused: u64, gap_ns: u64, now_ns: u64) -> RefusedCount {
        let mut count = RefusedCount::ZERO;
        (count.total, count.last_ns, count.window_start_ns) =
            (refused, now_ns, now_ns - (refused - 1) * gap_ns);
        count
    }

    fn ports(range: &str, reserved: &str) -> Result<LocalPorts, String> {
        LocalPorts::parse(range, reserved).map_err(|error| error.to_string())
    }

    fn look(ports: &Result<LocalPorts, String>) -> PortLook<'_> {
        let ports = ports.as_ref().map_err(String::as_str);
        PortLook { ports, port_use: Some(PortUse::default()), shows_idle: true }
    }

    fn check_now(
        risks: &mut PortRisks,
        refused: u64,
        ports: &Result<LocalPorts, String>,
    ) -> Option<PortRiskEvent> {
        risks.on_threshold(DESTINATION);
        risks.check(&DESTINATION, &count(refused, SECOND_NS, NOW_NS), &look(ports), false, NOW_NS)
    }

    #[test]
    fn a_port_is_reported_if_connect_can_choose_it() {
        for (what, range, reserved, one_in) in [
            ("first", "40000 40199", "", Some(100)),
            ("first, with fewer others", "40000 40199", "40002-40099", None),
            ("of the other parity", "40001 40199", "", None),
            ("of the other parity, and all others reserved", "39999 40000", "39999", Some(1)),
            ("reserved", "40000 40199", "40000", None),
            ("outside", "32768 39999", "", None),
        ] {
            let event = check_now(&mut PortRisks::default(), 20, &ports(range, reserved));
            match (&event, one_in) {
                (Some(PortRiskEvent::AtRisk(connects, chance, may_be_bound)), Some(one_in)) => {
                    assert_eq!((chance, may_be_bound), (&Chance::OneIn(one_in), &false), "{what}");
                    assert_eq!(
                        connects.endpoint,
                        Endpoint::new(7, [127, 0, 0, 1].into(), 40_000, false).any_family()
                    );
                    assert_eq!(
                        (connects.risk, connects.refused, connects.window_ns),
                        (1, 20, 19 * SECOND_NS)
                    );
                    assert_eq!(connects.eta_seconds(chance), Some(one_in.into()), "{what}");
                }
                (Some(PortRiskEvent::AtRisk(_, Chance::OneIn(fewer), _)), None) if what.contains("fewer") => {
                    assert!(*fewer < 100, "{what}: {fewer}");
                }
                (event, one_in) => assert!(event.is_none() && one_in.is_none(), "{what}: {event:?}"),
            }
        }
    }

    #[test]
    fn a_port_is_reported_again_at_each_tenfold_count() {
        let (mut risks, ports) = (PortRisks::default(), ports("40000 40199", ""));
        let reported: Vec<_> = [20, 21, 199, 200, 1_999, 2_001, 3_000, 20_000]
            .into_iter()
            .filter_map(|refused| match check_now(&mut risks, refused, &ports) {
                Some(PortRiskEvent::AtRisk(connects, ..)) => Some((connects.risk, connects.refused)),
                _ => None,
            })
            .collect();
        assert_eq!(reported, [(1, 20), (1, 200), (1, 2_001), (1, 20_000)]);
        assert_eq!(risks.at_risk(), 1);
    }

    #[test]
    fn a_port_is_reported_when_it_is_unreserved_and_over_when_it_is_reserved() {
        let (free, reserved) = (ports("40000 40199", ""), ports("40000 40199", "40000"));
        let mut risks = PortRisks::default();
        assert_eq!(check_now(&mut risks, 20, &reserved), None);
        assert_eq!(check_now(&mut risks, 200, &reserved), None);
        assert_eq!(risks.at_risk(), 0);
        assert!(matches!(check_now(&mut risks, 230, &free), Some(PortRiskEvent::AtRisk(..))));
        assert_eq!(check_now(&mut risks, 231, &free), None);
        let over = check_now(&mut risks, 240, &reserved);
        let Some(PortRiskEvent::Over(connects, RiskEndReason::Unreachable)) = over else {
            panic!("{over:?}")
        };
        assert_eq!(connects.risk, 1);
        assert_eq!((risks.at_risk(), check_now(&mut risks, 241, &reserved)), (0, None));
        let next = check_now(&mut risks, 250, &free);
        assert!(matches!(next, Some(PortRiskEvent::AtRisk(connects, ..)) if connects.risk == 2), "{next:?}");
    }

    #[test]
    fn an_unknown_port_range_is_reported_with_its_reason() {
        let event = {
            let (mut risks, why) = (PortRisks::default(), "no way in");
            risks.on_threshold(DESTINATION);
            let look = PortLook { ports: Err(why), port_use: None, shows_idle: false };
            risks.check(&DESTINATION, &count(20, SECOND_NS, NOW_NS), &look, false, NOW_NS)
        };
        let Some(PortRiskEvent::AtRisk(connects, chance, true)) = event else { panic!("{event:?}") };
        assert_eq!(chance, Chance::Unknown("no way in".to_owned()));
        assert_eq!(connects.eta_seconds(&chance), None);
    }

    #[test]
    fn a_port_that_a_self_connection_holds_is_not_reported() {
        let (mut risks, ports) = (PortRisks::default(), ports("40000 40199", ""));
        risks.on_threshold(DESTINATION);
        let count = count(20, SECOND_NS, NOW_NS);
        assert_eq!(risks.check(&DESTINATION, &count, &look(&ports), true, NOW_NS), None);
        assert!(risks.check(&DESTINATION, &count, &look(&ports), false, NOW_NS).is_some());
    }

    #[test]
    fn a_port_that_somebody_has_bound_is_at_risk_when_the_last_socket_of_that_time_is_gone() {
        const BOUND: PortUse = PortUse { is_bound: true, is_connected: false, is_self_connected: false };
        const CONNECTED: PortUse = PortUse { is_bound: false, is_connected: true, ..BOUND };
        const UNUSED: PortUse = PortUse { is_connected: false, ..CONNECTED };
        const SELF: PortUse = PortUse { is_self_connected: true, ..UNUSED };
        let ports = ports("40000 40199", "");
        // Each look: what has the port, and whether it is at risk then, and whether it may be bound nevertheless.
        for (what, shows_idle, looks) in [
            ("a listener elsewhere", true, vec![(BOUND, None), (BOUND, None), (UNUSED, Some(false))]),
            ("with connections", true, vec![(BOUND, None), (CONNECTED, None), (UNUSED, Some(false))]),
            ("connections of clients", true, vec![(CONNECTED, Some(true))]),
            ("idle sockets are not shown", false, vec![(BOUND, None), (UNUSED, Some(true))]),
            ("a self-connection", true, vec![(SELF, None), (UNUSED, Some(false))]),
        ] {
            let mut risks = PortRisks::default();
            risks.on_threshold(DESTINATION);
            let count = count(2_000, 1_000, NOW_NS);
            for (port_use, expected) in looks {
                let look = PortLook { port_use: Some(port_use), shows_idle, ..look(&ports) };
                let event = risks.check(&DESTINATION, &count, &look, false, NOW_NS);
                let may_be_bound = event.map(|event| match event {
                    PortRiskEvent::AtRisk(.., may_be_bound) => may_be_bound,
                    over @ PortRiskEvent::Over(..) => panic!("{what}: {over:?}"),
                });
                assert_eq!(may_be_bound, expected, "{what}: {port_use:?}");
            }
        }
    }

    #[test]
    fn a_bound_port_is_checked_once_a_second_and_at_once_after_the_end_of_a_listener() {
        let ports = ports("40000 40199", "");
        let bound = PortUse { is_bound: true, ..PortUse::default() };
        let mut risks = PortRisks::default();
        risks.on_threshold(DESTINATION);
        let count = count(2_000, 1_000, NOW_NS);
        let next_check_ns = |risks: &mut PortRisks| {
            let look = PortLook { port_use: Some(bound), ..look(&ports) };
            assert_eq!(risks.check(&DESTINATION, &count, &look, false, NOW_NS), None);
            risks.next_check_ns().unwrap() - NOW_NS
        };
        assert_eq!(next_check_ns(&mut risks), SECOND_NS);
        let elsewhere = Endpoint { port: DESTINATION.port + 2, ..DESTINATION };
        risks.on_listener_closed(&elsewhere);
        assert_eq!(risks.begin_check(NOW_NS - RELEASE_CHECK_INTERVAL_NS), []);
        risks.on_listener_closed(&Endpoint { addr: [0; 4], ..DESTINATION });
        assert_eq!(risks.next_check_ns(), Some(NOW_NS), "not sooner after the last check");
        assert_eq!(risks.begin_check(NOW_NS), [DESTINATION]);
        let intervals: Vec<u64> = (0..5).map(|_| next_check_ns(&mut risks)).collect();
        assert_eq!(intervals[..4], [RELEASE_CHECK_INTERVAL_NS; 4]);
        assert_eq!(intervals[4], SECOND_NS);
    }

    #[test]
    fn reports_of_the_programs_make_no_more_checks_than_one_each_twenty_milliseconds() {
        let mut risks = PortRisks::default();
        let mut checks = [0, 0];
        let in_same_slot = Endpoint { port: DESTINATION.port + 2, ..DESTINATION };
        for ms in 0..1_000 {
            risks.on_threshold(DESTINATION);
            risks.on_listener_closed(&DESTINATION);
            risks.on_listener_closed(&in_same_slot);
            let now_ns = NOW_NS + ms * SECOND_NS / 1_000;
            if risks.next_check_ns().is_some_and(|check_ns| check_ns <= now_ns) {
                checks[0] += 1;
                checks[1] += risks.begin_check(now_ns).len();
            }
        }
        assert_eq!(checks, [50, 50]);
    }

    #[test]
    fn a_watch_that_another_port_has_ended_begins_again() {
        let mut risks = PortRisks::default();
        assert_eq!(check_now(&mut risks, 20, &ports("40000 40199", "")).map(|_| ()), Some(()));
        assert_eq!(risks.begin_check(NOW_NS), []);
        risks.on_listener_closed(&Endpoint { port: DESTINATION.port + 2, ..DESTINATION });
        assert_eq!(risks.next_check_ns(), Some(NOW_NS + RELEASE_CHECK_INTERVAL_NS));
        assert_eq!(risks.begin_check(NOW_NS + RELEASE_CHECK_INTERVAL_NS), [], "only the watch");
        assert_eq!(risks.next_check_ns(), Some(NOW_NS + WINDOW_NS + 1));
        // A port whose namespace has ended is not watched any more.
        assert!(risks.end(&DESTINATION, &count(20, SECOND_NS, NOW_NS)).is_some());
        assert!(risks.next_check_ns().is_some());
        assert_eq!(risks.begin_check(NOW_NS + SECOND_NS), []);
        assert_eq!((risks.tracked().count(), risks.next_check_ns()), (0, None));
    }

    #[test]
    fn a_risk_is_over_after_a_minute_without_attempts() {
        let (mut risks, ports) = (PortRisks::default(), ports("40000 40199", ""));
        assert!(check_now(&mut risks, 20, &ports).is_some());
        let count = count(20, SECOND_NS, NOW_NS);
        assert_eq!(risks.expire(&DESTINATION, Some(&count), NOW_NS + WINDOW_NS), None);
        let next_check_ns = risks.next_check_ns().unwrap();
        assert_eq!(next_check_ns, NOW_NS + WINDOW_NS + 1, "no check before it can expire");
        let due = [next_check_ns - 1, next_check_ns].map(|now_ns| risks.begin_check(now_ns));
        assert_eq!(due, [vec![], vec![DESTINATION]]);
        let over = risks.expire(&DESTINATION, Some(&count), next_check_ns);
        let Some(Some(PortRiskEvent::Over(connects, RiskEndReason::Silence))) = over else {
            panic!("{over:?}")
        };
        assert_eq!(connects.risk, 1);
        assert_eq!(
            (risks.at_risk(), risks.next_check_ns(), risks.is_tracked(&DESTINATION)),
            (0, None, false)
        );
    }

    #[test]
    fn a_port_that_was_not_reported_expires_without_an_event() {
        let mut risks = PortRisks::default();
        assert_eq!(check_now(&mut risks, 20, &ports("40000 40199", "40000")), None);
        let count = count(20, SECOND_NS, NOW_NS);
        assert_eq!(risks.expire(&DESTINATION, Some(&count), NOW_NS + WINDOW_NS + 1), Some(None));
    }

    #[test]
    fn checks_are_more_frequent_the_sooner_a_self_connection_is_expected() {
        const MS_NS: u64 = SECOND_NS / 1_000;
        for (what, range, gap_ns, interval_ns) in [
            ("a storm", "32769 60999", 1_000, MIN_CHECK_INTERVAL_NS),
            ("a small range", "40001 40199", 100 * MS_NS, 100 * MS_NS * 99 / CHECKS_PER_EXPECTED_HIT),
            ("ten a second", "32769 60999", 100 * MS_NS, 100 * MS_NS * 14_115 / CHECKS_PER_EXPECTED_HIT),
            ("one a second", "32769 60999", SECOND_NS, WINDOW_NS + 1),
        ] {
            let mut risks = PortRisks::default();
            risks.on_threshold(DESTINATION);
            let count = count(20, gap_ns, NOW_NS);
            let ports = ports(range, "");
            assert_eq!(risks.check(&DESTINATION, &count, &look(&ports), false, NOW_NS), None, "{what}");
            assert_eq!(risks.next_check_ns(), Some(NOW_NS + interval_ns), "{what}");
        }
        // A slow rate for a long time, and now a storm.
        let mut risks = PortRisks::default();
        let unreachable = ports("32769 60999", "");
        risks.on_threshold(DESTINATION);
        let slow = count(10_000, SECOND_NS, NOW_NS);
        assert_eq!(risks.check(&DESTINATION, &slow, &look(&unreachable), false, NOW_NS), None);
        let later_ns = NOW_NS + SECOND_NS;
        let mut fast = slow;
        (fast.total, fast.last_ns) = (slow.total + 10_000, later_ns);
        assert_eq!(risks.check(&DESTINATION, &fast, &look(&unreachable), false, later_ns), None);
        assert_eq!(risks.next_check_ns(), Some(later_ns + MIN_CHECK_INTERVAL_NS));
    }
}
