//! Unit tests of the log's budget.

use super::*;
use crate::budget::log_shares::{BURST_SECONDS, PARTY_FACTOR, SHARES};

const SECOND_NS: u64 = 1_000_000_000;
const RATE: u32 = 20;
/// Connections of a burst.
const BURST: usize = (RATE * BURST_SECONDS) as usize / 2;

fn owner(uid: u32, cgroup: Option<&str>) -> Payer {
    Payer { uid: Some(uid), cgroup: cgroup.map(Into::into) }
}

fn admits(budget: &mut LogBudget, id: usize, owner: &Payer, port: u16, phase: Phase, now_ns: u64) -> bool {
    let (id, payer) = (id.to_string(), owner.clone());
    let owner = payer.owner(0);
    let request = LogRequest { id: &id, owner, other_owner: None, payer, program: Some("curl"), port, phase };
    budget.admits(&request, now_ns)
}

/// Numbers of the connections to port 80 that are admitted, of those with these ids.
fn open(budget: &mut LogBudget, owner: &Payer, ids: std::ops::Range<usize>, now_ns: u64) -> Vec<usize> {
    ids.filter(|id| admits(budget, *id, owner, 80, Phase::Established, now_ns)).collect()
}

#[test]
fn a_storm_is_suppressed_as_whole_connections_and_counted_by_owner() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let flooder = owner(65_534, None);
    let admitted = open(&mut budget, &flooder, 0..1_000, SECOND_NS);
    assert_eq!(admitted, (0..BURST).collect::<Vec<_>>());
    // Another owner loses nothing.
    let victim = owner(0, None);
    assert_eq!(open(&mut budget, &victim, 5_000..5_010, SECOND_NS).len(), 10);
    for id in 0..1_000 {
        for phase in [Phase::State { ends: false }, Phase::Closed] {
            let is_admitted = admits(&mut budget, id, &flooder, 81, phase, SECOND_NS);
            assert_eq!(is_admitted, id < BURST, "{phase:?} of {id}");
        }
    }
    let suppressed = 3 * (1_000 - BURST as u64);
    assert_eq!(budget.suppressed(), suppressed);
    let report = SuppressedEvents {
        owner: flooder.clone(),
        count: suppressed,
        program: Some("curl".to_owned()),
        first_port: 80,
        last_port: 81,
    };
    assert_eq!(budget.take_unreported(), [report]);
    assert_eq!(budget.take_unreported(), []);
    assert_eq!(budget.decisions.len(), 10, "only the victim's are open");
    // The states were beyond the rate, and later connections pay for them.
    assert!(open(&mut budget, &flooder, 2_000..2_001, SECOND_NS * 5).is_empty());
    assert_eq!(open(&mut budget, &flooder, 3_000..3_001, SECOND_NS * 30).len(), 1);
}

#[test]
fn the_first_of_each_program_and_port_and_the_remedy_have_a_reserve() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let flooder = owner(1, None);
    open(&mut budget, &flooder, 0..BURST + 1, 0);
    assert!(admits(&mut budget, 700, &flooder, 443, Phase::Established, 0), "another port");
    assert!(!admits(&mut budget, 701, &flooder, 443, Phase::Established, 0), "the same port");
    // New ports take half of the reserve at most, so that the remedy has the other.
    for port in 1_000..1_100 {
        admits(&mut budget, 1_000 + usize::from(port), &flooder, port, Phase::Established, 0);
    }
    assert!(!admits(&mut budget, 800, &flooder, 444, Phase::Established, 0));
    let remedied = |is_final| Phase::Remedied { is_final };
    assert!(!admits(&mut budget, 701, &flooder, 443, remedied(false), 0));
    assert!(admits(&mut budget, 701, &flooder, 443, remedied(true), 0));
    assert!(!admits(&mut budget, 701, &flooder, 443, Phase::Closed, 0), "it stays suppressed");
    assert!(admits(&mut budget, 701, &flooder, 443, remedied(true), 0), "also after its end");
    let more = (0..100).filter(|_| admits(&mut budget, 800, &flooder, 444, remedied(true), 0)).count();
    assert!(more < 20, "{more}: the reserve has an end");
}

#[test]
fn who_changes_uids_in_one_control_group_gains_nothing() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let mut admitted = 0;
    for uid in 0..65_536 {
        let id = uid as usize;
        admitted += open(&mut budget, &owner(uid, Some("/docker/a")), 2 * id..2 * id + 2, 0).len();
    }
    let limit = BURST * PARTY_FACTOR as usize;
    assert!((limit..=limit + BURST).contains(&admitted), "{admitted}");
    assert_eq!(open(&mut budget, &owner(0, Some("/docker/b")), 900_000..900_010, 0).len(), 10);
    assert!(budget.shares.owner_count() <= 2 * SHARES && budget.unreported.len() <= REPORTED_OWNERS + 1);
    let reported: u64 = budget.take_unreported().iter().map(|events| events.count).sum();
    assert_eq!(reported, budget.suppressed());
    // What is idle makes room.
    open(&mut budget, &owner(7, Some("/docker/c")), 910_000..910_001, 1_000 * SECOND_NS);
    assert!(budget.shares.owner_count() < SHARES);
}

/// Connections that are admitted, if each of these owners in turn makes twice a burst of them, to another port
/// each.
fn admitted_of(budget: &mut LogBudget, owners: &[Payer]) -> usize {
    let mut admitted = 0;
    for ((at, owner), port) in owners.iter().enumerate().zip(80..) {
        let ids = 10_000 * at..10_000 * at + 2 * BURST;
        admitted += ids.filter(|id| admits(budget, *id, owner, port, Phase::Established, 0)).count();
    }
    admitted
}

#[test]
fn a_user_with_ten_sessions_has_the_rate_of_four() {
    let session = |number| owner(1_000, Some(&format!("/user.slice/user-1000.slice/session-{number}.scope")));
    let ended = owner(1_000, None);
    let sessions: Vec<_> = (0..10).map(session).chain([ended]).collect();
    let [one, ten] = [vec![session(0); 11], sessions].map(|owners| {
        let mut budget = LogBudget::new(LogRate::new(RATE));
        let admitted = admitted_of(&mut budget, &owners);
        let remedied = Phase::Remedied { is_final: true };
        let ids = 600_000..600_100;
        let results = ids.filter(|id| admits(&mut budget, *id, &owners[id % 11], 80, remedied, 0)).count();
        (admitted, results, budget.suppressed(), budget.take_unreported().len())
    });
    assert!((BURST..BURST + 10).contains(&one.0) && (1..20).contains(&one.1), "{one:?}");
    let four = BURST * PARTY_FACTOR as usize;
    assert!((four..four + 40).contains(&ten.0) && (20..=80).contains(&ten.1), "{ten:?}");
    assert_eq!((one.3, ten.3), (1, 11), "each session is reported");
}

#[test]
fn events_about_no_connection_take_from_the_rate_and_from_the_reserve() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let (flooder, other) = (owner(1, None), owner(2, None));
    let events = u64::from(RATE * BURST_SECONDS);
    let mut admits_alone = |owner, now_ns| {
        (0..1_000).filter(|id| admits(&mut budget, *id, owner, 80, Phase::Alone, now_ns)).count() as u64
    };
    // A tenth more, which is the reserve.
    assert_eq!(admits_alone(&flooder, 0), events + events / 10);
    assert_eq!(admits_alone(&flooder, SECOND_NS), u64::from(RATE + RATE / 10));
    assert_eq!(admits_alone(&other, SECOND_NS), events + events / 10);
    assert!(budget.decisions.is_empty(), "nothing is kept of them");
    let [of_flooder, _] = &budget.take_unreported()[..] else { panic!("two owners") };
    assert_eq!(of_flooder.owner, flooder);
}

#[test]
fn a_port_at_risk_is_paid_by_who_connected_last_or_first_and_its_end_follows_its_beginning() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let (flooder, other) = (owner(1, None), owner(2, None));
    for id in 1_000..1_000 + 2 * BURST {
        admits(&mut budget, id, &flooder, 80, Phase::AtRisk, 0);
    }
    let mut admits = |id: &str, last: &Payer, first: Option<&Payer>, phase| {
        let (owner, other_owner) = (last.owner(0), first.map(|owner| owner.owner(0)));
        let (payer, program) = (last.clone(), Some("curl"));
        budget.admits(&LogRequest { id, owner, other_owner, payer, program, port: 80, phase }, 0)
    };
    assert!(!admits("a", &flooder, None, Phase::AtRisk) && !admits("a", &flooder, None, Phase::AtRiskOver));
    for (id, last, first) in [("b", &flooder, &other), ("c", &other, &flooder)] {
        assert!(admits(id, last, Some(first), Phase::AtRisk), "{id}: the other one pays");
        assert!(admits(id, last, Some(first), Phase::AtRisk), "{id}: ten times as many connects");
        assert!(admits(id, &flooder, None, Phase::AtRiskOver), "{id}: paid at its beginning");
        assert!(!admits(id, &flooder, None, Phase::AtRiskOver), "{id}: only once");
    }
}

/// All that an owner's connections may have is taken, the reserve, too.
fn drain_by_connections(budget: &mut LogBudget, owner: &Payer, now_ns: u64) {
    let is_admitted = |id| {
        let port = (id % 60_000) as u16;
        admits(budget, id, owner, port, Phase::Established, now_ns)
    };
    let suppressed = (0..200_000).map(is_admitted).skip_while(|is_admitted| *is_admitted).count();
    assert!(suppressed > 1_000);
    assert!(!admits(budget, 300_000, owner, 80, Phase::Established, now_ns));
}

#[test]
fn a_storm_of_connections_suppresses_no_warning_about_a_port_at_risk() {
    let mut budget = LogBudget::new(LogRate::DEFAULT);
    let flooder = owner(1_000, Some("/user.slice/user-1000.slice/session-1.scope"));
    drain_by_connections(&mut budget, &flooder, 0);
    let suppressed = budget.suppressed();
    // He is the first and the last to connect to the port of another user.
    for (phase, is_admitted) in [(Phase::AtRisk, true), (Phase::AtRiskOver, true), (Phase::AtRiskOver, false)]
    {
        assert_eq!(admits(&mut budget, 400_000, &flooder, 80, phase, 0), is_admitted, "{phase:?}");
    }
    assert_eq!(budget.suppressed(), suppressed + 1);
    // Nor from another session.
    let session = owner(1_000, Some("/user.slice/user-1000.slice/session-2.scope"));
    drain_by_connections(&mut budget, &session, 0);
    assert!(admits(&mut budget, 400_001, &session, 80, Phase::AtRisk, 0));
}

#[test]
fn a_flood_of_warnings_is_bounded_and_counted_and_takes_nothing_else() {
    let mut budget = LogBudget::new(LogRate::DEFAULT);
    let (flooder, other) = (owner(1_000, None), owner(1_001, None));
    let flood = |budget: &mut LogBudget, now_ns| {
        let ids = 0..10_000;
        let admitted = |id: &usize| {
            let id = *id + now_ns as usize;
            let is_admitted = admits(budget, id, &flooder, 80, Phase::AtRisk, now_ns);
            if is_admitted {
                assert!(admits(budget, id, &flooder, 80, Phase::AtRiskOver, now_ns), "paid");
            }
            is_admitted
        };
        ids.filter(admitted).count()
    };
    assert_eq!([flood(&mut budget, 0), flood(&mut budget, SECOND_NS)], [2_048, 10]);
    assert_eq!(budget.suppressed(), 20_000 - 2_058);
    let [of_flooder] = &budget.take_unreported()[..] else { panic!("one owner") };
    assert_eq!(of_flooder.owner, flooder);
    assert!(admits(&mut budget, 1, &other, 80, Phase::AtRisk, SECOND_NS));
    assert_eq!(open(&mut budget, &flooder, 50_000..60_000, SECOND_NS).len(), 10_000, "connections");
    // A long line takes as much as several warnings.
    let mut budget = LogBudget::new(LogRate::DEFAULT);
    budget.on_line(flooder.owner(0), Phase::AtRisk, 4_000 * EVENT_BYTES, 0);
    assert!(flood(&mut budget, 0) < 60);
}

#[test]
fn the_ports_that_an_owner_may_have_at_risk_are_all_in_the_log() {
    /// Of an owner, and of a user in all sessions:
    /// `an_owner_a_user_and_a_control_group_take_a_part_of_what_is_free`.
    const PORTS: [(u32, usize); 2] = [(1, 455), (1_000, 2_048)];
    for (sessions, ports) in PORTS {
        let mut budget = LogBudget::new(LogRate::DEFAULT);
        let session = |port: usize| {
            let number = port as u32 % sessions;
            owner(1_000, Some(&format!("/user.slice/user-1000.slice/session-{number}.scope")))
        };
        // All at once, at 20 attempts and at each tenfold count up to 200 million.
        for _ in 0..8 {
            for id in 0..ports.min(455 * 4) {
                assert!(admits(&mut budget, id, &session(id), id as u16, Phase::AtRisk, 0), "{id}");
            }
        }
    }
    // And others in each minute after that.
    let mut budget = LogBudget::new(LogRate::DEFAULT);
    let owner = owner(1_000, None);
    for minute in 0..60 {
        for port in 0..455 {
            let id = 1_000 * (minute + 1) + port;
            for phase in [Phase::AtRisk, Phase::AtRiskOver] {
                let now_ns = 60 * SECOND_NS * minute as u64;
                assert!(admits(&mut budget, id, &owner, port as u16, phase, now_ns), "{minute}: {port}");
            }
        }
    }
    assert_eq!(budget.suppressed(), 0);
}

#[test]
fn an_owner_writes_a_burst_and_then_200_kib_in_a_second_however_long_its_lines_are() {
    const HOUR_S: u64 = 3_600;
    const MIB: usize = 1 << 20;
    for line in [1 << 10, EVENT_BYTES, 24 << 10] {
        let mut budget = LogBudget::new(LogRate::DEFAULT);
        let flooder = owner(1_000, None);
        let (mut id, mut bytes_in_hour) = (0, 0);
        for second in 0..HOUR_S {
            let now_ns = second * SECOND_NS;
            loop {
                id += 1;
                let mut is_admitted = false;
                for phase in [Phase::Established, Phase::Closed] {
                    is_admitted = admits(&mut budget, id, &flooder, 80, phase, now_ns);
                    if is_admitted {
                        bytes_in_hour += line;
                        budget.on_line(flooder.owner(0), phase, line, now_ns);
                    }
                }
                if !is_admitted {
                    break;
                }
            }
        }
        let events = (LogRate::DEFAULT.burst + LogRate::DEFAULT.rate * HOUR_S as u32) as usize;
        let expected = events * line.min(EVENT_BYTES);
        assert!((expected / 2..expected * 11 / 10).contains(&bytes_in_hour), "{line}: {bytes_in_hour}");
        assert!(bytes_in_hour < 900 * MIB, "{line}: {} MiB", bytes_in_hour / MIB);
    }
}

#[test]
fn a_rate_has_a_burst_of_ten_seconds_or_one_of_its_own() {
    for (text, rate) in [
        ("20", Some(LogRate { rate: 20, burst: 200 })),
        ("20/7", Some(LogRate { rate: 20, burst: 7 })),
        ("4294967295", Some(LogRate { rate: u32::MAX, burst: u32::MAX })),
        ("0", None),
        ("7/0", None),
        ("7/", None),
        ("/7", None),
        ("4294967296", None),
        ("-1", None),
    ] {
        assert_eq!(text.parse().ok(), rate, "{text}");
    }
    assert_eq!(LogRate::DEFAULT.to_string().parse(), Ok(LogRate::DEFAULT));
    let mut budget = LogBudget::new(LogRate::DEFAULT);
    let admitted = open(&mut budget, &owner(1, None), 0..30_000, 0).len();
    assert!(
        (25_000..=25_001).contains(&admitted),
        "{admitted}: half of the burst, and the first of its port"
    );
    assert_eq!(open(&mut budget, &owner(1, None), 40_000..40_100, SECOND_NS).len(), 50);
}

#[test]
fn the_services_of_root_have_a_rate_each() {
    let services: Vec<_> =
        (0..10).map(|number| owner(0, Some(&format!("/system.slice/{number}.service")))).collect();
    assert_eq!(admitted_of(&mut LogBudget::new(LogRate::new(RATE)), &services), 10 * BURST);
}

#[test]
fn uids_of_a_group_whose_processes_have_ended_have_its_rate() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let mut admits = |uid: u32, cgroup_id| {
        let payer = Payer { uid: Some(uid), cgroup: None };
        let (id, owner) = (format!("{uid} {cgroup_id}"), payer.owner(cgroup_id));
        let phase = Phase::Established;
        let request = LogRequest { id: &id, owner, other_owner: None, payer, program: None, port: 80, phase };
        budget.admits(&request, 0)
    };
    let admitted = (0..10_000).filter(|uid| admits(*uid, 7)).count();
    // With the reserve.
    assert!(admitted <= BURST * PARTY_FACTOR as usize + BURST, "{admitted}");
    assert!(admits(0, 8), "root in another group");
}

#[test]
fn a_connection_that_was_never_established_is_forgotten_at_its_end() {
    let mut budget = LogBudget::new(LogRate::new(RATE));
    let owner = owner(1, None);
    let state = |ends| Phase::State { ends };
    assert!(admits(&mut budget, 1, &owner, 80, state(false), 0));
    assert!(admits(&mut budget, 1, &owner, 80, state(true), 0));
    assert!(budget.decisions.is_empty());
    for phase in [state(false), Phase::Established, state(true)] {
        assert!(admits(&mut budget, 2, &owner, 80, phase, 0));
    }
    assert_eq!(budget.decisions.len(), 1, "its `closed` follows");
    budget.forget("2");
    assert!(budget.decisions.is_empty());
    assert!(admits(&mut budget, 2, &owner, 80, Phase::Closed, 0));
    assert!(budget.decisions.is_empty());
}
