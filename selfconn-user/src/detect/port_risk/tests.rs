//! Unit tests of the ports at risk.

use proptest::{collection::vec, option, prelude::*};

use super::*;
use crate::ports::{LocalPorts, Odds, PortRange, Reach};

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
    (count.total, count.last_ns, count.window_start_ns) = (refused, now_ns, now_ns - (refused - 1) * gap_ns);
    count.set_range(0, now_ns);
    count
}

fn ports(range: &str, reserved: &str) -> Result<LocalPorts, String> {
    LocalPorts::parse(range, reserved).map_err(|error| error.to_string())
}

/// Attempts that choose from the range of the namespace.
fn look(ports: &Result<LocalPorts, String>) -> PortLook<'_> {
    look_of(&count(20, SECOND_NS, NOW_NS), ports)
}

fn look_of<'a>(count: &RefusedCount, ports: &'a Result<LocalPorts, String>) -> PortLook<'a> {
    let port_use = Some(PortUse::default());
    let reach_in = |ports| {
        PortReach::of(PortChoices::of(count), ports, DESTINATION.port, port_use, &mut OddsCache::default())
    };
    let reach = ports.as_ref().map(reach_in).map_err(String::as_str);
    PortLook { reach, port_use, shows_idle: true, guard: GuardMode::Off }
}

fn check_now(
    risks: &mut PortRisks,
    refused: u64,
    ports: &Result<LocalPorts, String>,
) -> Option<PortRiskEvent> {
    check_at(risks, refused, ports, NOW_NS)
}

fn check_at(
    risks: &mut PortRisks,
    refused: u64,
    ports: &Result<LocalPorts, String>,
    now_ns: u64,
) -> Option<PortRiskEvent> {
    risks.on_threshold(DESTINATION);
    risks.check(&DESTINATION, &count(refused, SECOND_NS, now_ns), &look(ports), false, now_ns)
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
            (
                Some(PortRiskEvent::AtRisk(PortAtRisk { connects, chance, may_be_bound, .. })),
                Some(one_in),
            ) => {
                assert_eq!((chance, may_be_bound), (&Chance::OneIn(one_in), &false), "{what}");
                assert_eq!(
                    connects.endpoint,
                    Endpoint::new(7, [127, 0, 0, 1].into(), 40_000, false).any_family()
                );
                assert_eq!((connects.risk, connects.refused, connects.window_ns), (1, 20, 19 * SECOND_NS));
                assert_eq!(connects.eta_seconds(chance), Some(one_in.into()), "{what}");
            }
            (Some(PortRiskEvent::AtRisk(PortAtRisk { chance: Chance::OneIn(fewer), .. })), None)
                if what.contains("fewer") =>
            {
                assert!(*fewer < 100, "{what}: {fewer}");
            }
            (event, one_in) => assert!(event.is_none() && one_in.is_none(), "{what}: {event:?}"),
        }
    }
}

#[test]
fn a_range_of_the_sockets_own_decides_for_its_attempts() {
    const MINUTE_NS: u64 = 60 * SECOND_NS;
    let own_range = |low: u32, high: u32| high << 16 | low;
    let shared = ports("39900 40099", "");
    let other_parity = ports("39901 40100", "");
    // The range of the socket, how long ago, and how long ago there was an attempt without one.
    for (what, netns, own, own_age_ns, shared_age_ns, expected) in [
        ("the other parity", &other_parity, own_range(39_991, 40_010), 0, None, Some(20)),
        ("only this port", &other_parity, own_range(40_000, 40_000), 0, None, Some(1)),
        ("another port only", &shared, own_range(40_001, 40_001), 0, None, None),
        (
            "another port, and the namespace's range",
            &shared,
            own_range(40_001, 40_001),
            0,
            Some(0),
            Some(100),
        ),
        ("both reach it: the likelier", &shared, own_range(39_991, 40_010), 0, Some(0), Some(20)),
        (
            "both reach it, one long ago",
            &shared,
            own_range(39_991, 40_010),
            MINUTE_NS + 1,
            Some(0),
            Some(100),
        ),
        ("the namespace's range long ago", &shared, own_range(40_001, 40_001), 0, Some(MINUTE_NS + 1), None),
    ] {
        let mut count = count(20, SECOND_NS, NOW_NS);
        count.netns_range_ns = 0;
        if let Some(age_ns) = shared_age_ns {
            count.set_range(0, NOW_NS - age_ns);
        }
        count.set_range(own, NOW_NS - own_age_ns);
        let mut risks = PortRisks::default();
        risks.on_threshold(DESTINATION);
        let chance = match risks.check(&DESTINATION, &count, &look_of(&count, netns), false, NOW_NS) {
            Some(PortRiskEvent::AtRisk(PortAtRisk { connects, chance: Chance::OneIn(one_in), .. })) => {
                assert_eq!(connects.choices.own_range.is_some(), own_age_ns == 0, "{what}");
                Some(one_in)
            }
            event => {
                assert!(event.is_none(), "{what}: {event:?}");
                None
            }
        };
        assert_eq!(chance, expected, "{what}");
    }
}

/// How `connect()` comes to a port, by a walk over all ports of the range: if it can choose it, the mean number of
/// attempts until a certain port is chosen, and until this one is.
fn walked_reach(choices: PortChoices, ports: &LocalPorts, port: u16) -> (bool, u64, Option<u32>) {
    let shared = choices.uses_netns_range.then(|| ports.clone());
    let among: Vec<_> =
        shared.into_iter().chain(choices.own_range.map(|own| ports.for_socket(own))).collect();
    let count = |ports: &LocalPorts| ports.first_ports().count();
    let can_choose = |ports: &&LocalPorts| match ports.reach(port) {
        Reach::First => true,
        Reach::Last => count(ports) == 0,
        Reach::Reserved | Reach::Outside => false,
    };
    let expected = among.iter().map(count).min().map_or(1, |least| least.max(1) as u64);
    let chosen = among.iter().filter(can_choose);
    let one_in = chosen.filter_map(|ports| Odds::of(ports).expected_connects(port)).min();
    (among.iter().any(|ports| can_choose(&ports)), expected, one_in)
}

/// A range of few ports, so that two of them overlap.
fn arbitrary_range() -> impl Strategy<Value = PortRange> {
    let port = || 40_000..40_060_u16;
    (port(), port()).prop_map(|(one, other)| PortRange { low: one.min(other), high: one.max(other) })
}

proptest! {
    #[test]
    fn the_reach_of_a_port_is_that_of_a_walk_over_all_ports(
        range in arbitrary_range(),
        reserved in vec((40_000..40_060_u16, 0..10_u16), 0..12),
        step_width in 0..2_u32,
        own_range in option::of(arbitrary_range()),
        uses_netns_range in any::<bool>(),
        other in 39_990..40_070_u16,
    ) {
        let spans: Vec<_> = reserved.iter().map(|(from, more)| format!("{from}-{}", from + more)).collect();
        let PortRange { low, high } = range;
        let ports = LocalPorts::parse(&format!("{low} {high}"), &spans.join(",")).unwrap();
        let ports = LocalPorts { step_width, ..ports };
        let choices = PortChoices { own_range, uses_netns_range };
        let mut odds = OddsCache::default();
        for port in [low, high, low + (high - low) / 2, other] {
            let reach = PortReach::of(choices, &ports, port, None, &mut odds);
            let actual = (reach.can_be_chosen, reach.expected_connects, reach.one_in);
            prop_assert_eq!(actual, walked_reach(choices, &ports, port), "{}", port);
            let bound = Some(PortUse { is_bound: true, ..PortUse::default() });
            let of_bound = PortReach::of(choices, &ports, port, bound, &mut odds);
            prop_assert_eq!(of_bound, PortReach { one_in: None, ..reach });
        }
    }
}

#[test]
fn a_port_is_reported_again_at_each_tenfold_count() {
    let (mut risks, ports) = (PortRisks::default(), ports("40000 40199", ""));
    let reported: Vec<_> = [20, 21, 199, 200, 1_999, 2_001, 3_000, 20_000]
        .into_iter()
        .filter_map(|refused| match check_now(&mut risks, refused, &ports) {
            Some(PortRiskEvent::AtRisk(PortAtRisk { connects, .. })) => {
                Some((connects.risk, connects.refused))
            }
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
    let Some(PortRiskEvent::Over(connects, RiskEndReason::Unreachable)) = over else { panic!("{over:?}") };
    assert_eq!(connects.risk, 1);
    assert_eq!((risks.at_risk(), check_now(&mut risks, 241, &reserved)), (0, None));
    assert_eq!(check_at(&mut risks, 250, &free, NOW_NS + MIN_PAUSE_NS - 1), None, "not at once");
    assert_eq!(risks.next_check_ns(), Some(NOW_NS + MIN_PAUSE_NS));
    let next = check_at(&mut risks, 250, &free, NOW_NS + MIN_PAUSE_NS);
    assert!(
        matches!(next, Some(PortRiskEvent::AtRisk(PortAtRisk { connects, .. })) if connects.risk == 2),
        "{next:?}"
    );
}

#[test]
fn a_port_that_is_taken_and_given_back_again_and_again_is_reported_ever_less_often() {
    let (free, reserved) = (ports("40000 40199", ""), ports("40000 40199", "40000"));
    let mut risks = PortRisks::default();
    // Ten times a second, for an hour.
    let reports = (0..36_000).filter(|tick| {
        let now_ns = NOW_NS + tick * SECOND_NS / 10;
        let event = check_at(&mut risks, 250, &free, now_ns);
        let over = check_at(&mut risks, 250, &reserved, now_ns + SECOND_NS / 1_000);
        assert_eq!(event.is_some(), over.is_some());
        event.is_some()
    });
    let reports = reports.count();
    assert!((15..25).contains(&reports), "{reports}");
    // After a rest it is as new.
    let later_ns = NOW_NS + 10_000 * SECOND_NS;
    for now_ns in [later_ns, later_ns + MIN_PAUSE_NS] {
        assert!(check_at(&mut risks, 250, &free, now_ns).is_some());
        assert!(check_at(&mut risks, 250, &reserved, now_ns).is_some());
    }
}

#[test]
fn who_connects_from_a_port_keeps_it_from_being_reported_for_a_minute_at_most() {
    let ports = ports("40000 40199", "");
    let check = |risks: &mut PortRisks, is_bound, now_ns| {
        risks.on_threshold(DESTINATION);
        let port_use = PortUse { is_bound, is_connected: true, ..PortUse::default() };
        let look = PortLook { port_use: Some(port_use), ..look(&ports) };
        risks.check(&DESTINATION, &count(20, SECOND_NS, now_ns), &look, false, now_ns)
    };
    let mut risks = PortRisks::default();
    assert_eq!(check(&mut risks, true, NOW_NS), None);
    assert_eq!(check(&mut risks, false, NOW_NS + MAX_RELEASE_NS - 1), None);
    assert!(risks.next_check_ns().is_some_and(|check_ns| check_ns <= NOW_NS + MAX_RELEASE_NS));
    let event = check(&mut risks, false, NOW_NS + MAX_RELEASE_NS);
    assert!(matches!(event, Some(PortRiskEvent::AtRisk(PortAtRisk { may_be_bound: true, .. }))), "{event:?}");
}

#[test]
fn who_listens_now_and_then_and_connects_meanwhile_keeps_a_port_from_being_reported_ever_shorter() {
    let ports = ports("40000 40199", "");
    let mut risks = PortRisks::default();
    // Ten times a second for twenty minutes; in each minute somebody listens once, and is connected else.
    let reported = (0..12_000).find(|tick| {
        risks.on_threshold(DESTINATION);
        let port_use = PortUse { is_bound: tick % 590 == 0, is_connected: true, ..PortUse::default() };
        let look = PortLook { port_use: Some(port_use), ..look(&ports) };
        let now_ns = NOW_NS + tick * SECOND_NS / 10;
        risks.check(&DESTINATION, &count(20, SECOND_NS, now_ns), &look, false, now_ns).is_some()
    });
    // At first a minute, then half of it after the second listener.
    assert_eq!(reported, Some(590 + 300));
}

#[test]
fn an_unknown_port_range_is_reported_with_its_reason() {
    let event = {
        let (mut risks, why) = (PortRisks::default(), "no way in");
        risks.on_threshold(DESTINATION);
        let look = PortLook { reach: Err(why), port_use: None, shows_idle: false, guard: GuardMode::Off };
        risks.check(&DESTINATION, &count(20, SECOND_NS, NOW_NS), &look, false, NOW_NS)
    };
    let Some(PortRiskEvent::AtRisk(PortAtRisk { connects, chance, may_be_bound: true, .. })) = event else {
        panic!("{event:?}")
    };
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
                PortRiskEvent::AtRisk(at_risk) => at_risk.may_be_bound,
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
            for due in risks.begin_check(now_ns) {
                checks[1] += 1;
                risks.end_check(&due);
            }
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
    let Some(Some(PortRiskEvent::Over(connects, RiskEndReason::Silence))) = over else { panic!("{over:?}") };
    assert_eq!(connects.risk, 1);
    assert_eq!((risks.at_risk(), risks.next_check_ns(), risks.is_tracked(&DESTINATION)), (0, None, false));
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
