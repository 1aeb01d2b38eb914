//! Table tests of the remedy: which connections are destroyed, when, and with which results.

use super::*;
use crate::detect::samples;

const SECOND_NS: u64 = 1_000_000_000;

fn remedy(mode: RemedyMode, grace_ns: u64, rate: u32) -> Remedy {
    Remedy::new(RemedyPolicy { mode, selection: Selection::default(), grace_ns, rate })
}

fn cookie(number: u64) -> Cookie {
    Cookie::new(number).unwrap()
}

pub(super) fn request(number: u64) -> RemedyRequest {
    let endpoint = samples::endpoint("127.0.0.1", 40_000);
    let target = TargetSocket { endpoint, cookie: None, inode: None, uid: None, netns_hints: vec![8, 7] };
    RemedyRequest { number, target }
}

/// As [`due`], and the look-ups end at once.
fn due_and_gone(remedy: &mut Remedy, now_ns: u64) -> (Vec<u64>, Vec<&'static str>) {
    let (mut numbers, mut results) = (Vec::new(), Vec::new());
    loop {
        let (begun, reported) = due(remedy, now_ns);
        results.extend(reported);
        if begun.is_empty() {
            return (numbers, results);
        }
        for number in begun {
            assert!(remedy.on_looked_up(number, Ok(None)).is_some());
            numbers.push(number);
        }
    }
}

/// The due steps: numbers of the connections to look up, and results of the events.
fn due(remedy: &mut Remedy, now_ns: u64) -> (Vec<u64>, Vec<&'static str>) {
    let (mut numbers, mut results) = (Vec::new(), Vec::new());
    for step in remedy.due(now_ns) {
        match step {
            RemedyStep::LookUp(request) => numbers.push(request.number),
            RemedyStep::Emit(remedied) => results.push(remedied.result),
            RemedyStep::Destroy(..) => panic!("destroyed before the lookup"),
        }
    }
    (numbers, results)
}

#[test]
fn a_connection_is_destroyed_by_the_cookie_of_its_lookup() {
    let mut remedy = remedy(RemedyMode::Destroy, 0, 10);
    assert!(remedy.on_established(ConnectionFields::sample(), request(1), 5).is_none());
    assert_eq!(remedy.next_ns(), Some(5));
    assert_eq!(due(&mut remedy, 5), (vec![1], vec![]));
    assert!(!remedy.is_destroying() && remedy.next_ns().is_none());
    let step = remedy.on_looked_up(1, Ok(Some(cookie(9))));
    assert!(matches!(step, Some(RemedyStep::Destroy(which, by)) if which == request(1) && by == cookie(9)));
    assert!(remedy.is_destroying());
    // The close is reported before the result of SOCK_DESTROY.
    remedy.on_closed(1);
    let remedied = remedy.on_destroyed(1, Ok(true)).unwrap();
    assert_eq!((remedied.mode, remedied.result, remedied.port_freed), ("destroy", "destroyed", Some(true)));
    assert_eq!(remedied.connection.cookie, Some(9));
    assert!(!remedy.is_destroying());
    assert!(remedy.on_destroyed(1, Ok(true)).is_none(), "reported only once");
}

#[test]
fn a_socket_of_the_kernel_is_left_alone() {
    for (kernel_socket, result) in [(Some(true), "excepted"), (None, "failed")] {
        let mut remedy = remedy(RemedyMode::Destroy, 0, 10);
        let fields = ConnectionFields { kernel_socket, ..ConnectionFields::sample() };
        let remedied = remedy.on_established(fields, request(1), 5).unwrap();
        assert_eq!(remedied.result, result);
        assert_eq!(due(&mut remedy, u64::MAX), (vec![], vec![]));
    }
}

#[test]
fn a_dry_run_looks_up_and_destroys_nothing() {
    let mut remedy = remedy(RemedyMode::DryRun, 0, 10);
    remedy.on_established(ConnectionFields::sample(), request(1), 5);
    due(&mut remedy, 5);
    let Some(RemedyStep::Emit(remedied)) = remedy.on_looked_up(1, Ok(Some(cookie(9)))) else { panic!() };
    assert_eq!((remedied.mode, remedied.result), ("dry-run", "would_destroy"));
    assert!(!remedy.is_destroying());
}

#[test]
fn a_closed_or_replaced_connection_is_gone_and_a_failure_has_a_reason() {
    let known = |cookie| ConnectionFields { cookie: Some(cookie), ..ConnectionFields::sample() };
    let refusal = || Err("refused".to_owned());
    for (fields, is_closed, looked_up, destroyed, result) in [
        (ConnectionFields::sample(), false, Ok(None), None, "gone"),
        (ConnectionFields::sample(), true, Ok(Some(cookie(9))), None, "gone"),
        (known(8), false, Ok(Some(cookie(9))), None, "gone"),
        (known(9), false, Ok(Some(cookie(9))), Some(Ok(true)), "destroyed"),
        (ConnectionFields::sample(), false, Ok(Some(cookie(9))), Some(Ok(false)), "gone"),
        (ConnectionFields::sample(), false, Ok(Some(cookie(9))), Some(refusal()), "failed"),
        (ConnectionFields::sample(), false, Err("refused".to_owned()), None, "failed"),
    ] {
        let mut remedy = remedy(RemedyMode::Destroy, 0, 10);
        remedy.on_established(fields, request(1), 5);
        due(&mut remedy, 5);
        if is_closed {
            remedy.on_closed(1);
        }
        let remedied = match (remedy.on_looked_up(1, looked_up), destroyed) {
            (Some(RemedyStep::Emit(remedied)), None) => *remedied,
            (Some(RemedyStep::Destroy(..)), Some(outcome)) => remedy.on_destroyed(1, outcome).unwrap(),
            (step, _) => panic!("{step:?}"),
        };
        assert_eq!(remedied.result, result);
        assert_eq!(remedied.why.as_deref(), (result == "failed").then_some("refused"));
        assert_eq!(remedied.port_freed.is_some(), result == "destroyed");
        let counts: Vec<_> = remedy.counts().filter(|(_, count)| *count > 0).collect();
        assert!(counts.len() == 1 && counts[0].0.name() == result, "{counts:?}");
    }
}

#[test]
fn a_connection_that_closes_within_its_grace_period_is_left_alone() {
    let mut remedy = remedy(RemedyMode::Destroy, 100, 10);
    remedy.on_established(ConnectionFields::sample(), request(1), 5);
    remedy.on_established(ConnectionFields::sample(), request(2), 6);
    assert_eq!(due(&mut remedy, 104), (vec![], vec![]));
    remedy.on_closed(1);
    assert_eq!(remedy.next_ns(), Some(106));
    assert_eq!(due(&mut remedy, 106), (vec![2], vec![]));
    assert!(remedy.counts().all(|(_, count)| count == 0));
}

#[test]
fn connections_over_the_rate_limit_are_reported_once_and_handled_later() {
    let mut remedy = remedy(RemedyMode::Destroy, 0, 2);
    for number in 1..=5 {
        remedy.on_established(ConnectionFields::sample(), request(number), SECOND_NS);
    }
    remedy.on_established(ConnectionFields::sample(), request(6), 3 * SECOND_NS);
    let limited = |count| vec!["rate_limited"; count];
    assert_eq!(due_and_gone(&mut remedy, SECOND_NS), (vec![1, 2], limited(3)));
    assert_eq!(remedy.next_ns(), Some(SECOND_NS + SECOND_NS / 2), "no wake-up before the next token");
    assert_eq!(due_and_gone(&mut remedy, SECOND_NS + 1), (vec![], vec![]));
    remedy.on_closed(3);
    assert_eq!(due_and_gone(&mut remedy, SECOND_NS + SECOND_NS / 2), (vec![4], vec![]));
    assert_eq!(due_and_gone(&mut remedy, 2 * SECOND_NS), (vec![5], vec![]));
    assert_eq!(remedy.next_ns(), Some(3 * SECOND_NS));
    assert_eq!(due_and_gone(&mut remedy, 3 * SECOND_NS), (vec![6], vec![]));
}

#[test]
fn the_worker_has_two_connections_at_most_and_the_others_are_not_over_the_rate() {
    let mut remedy = remedy(RemedyMode::Destroy, 0, 10);
    for number in 1..=4 {
        remedy.on_established(ConnectionFields::sample(), request(number), SECOND_NS);
    }
    assert_eq!(due(&mut remedy, SECOND_NS), (vec![1, 2], vec![]));
    assert_eq!((due(&mut remedy, 9 * SECOND_NS), remedy.next_ns()), ((vec![], vec![]), None));
    assert!(remedy.on_looked_up(1, Err("no process leads there".into())).is_some());
    assert_eq!(remedy.next_ns(), Some(SECOND_NS));
    assert_eq!(due(&mut remedy, 9 * SECOND_NS), (vec![3], vec![]));
}

#[test]
fn a_connection_that_arrives_while_others_wait_is_reported_as_rate_limited_too() {
    let mut remedy = remedy(RemedyMode::Destroy, 0, 1);
    for number in 1..=3 {
        remedy.on_established(ConnectionFields::sample(), request(number), SECOND_NS);
        due(&mut remedy, SECOND_NS + number);
    }
    let limited = remedy.counts().find(|(outcome, _)| *outcome == RemedyOutcome::RateLimited);
    assert_eq!(limited, Some((RemedyOutcome::RateLimited, 2)));
}

#[test]
fn the_connections_of_one_owner_do_not_delay_those_of_another() {
    let of_uid = |owner_uid| ConnectionFields { owner_uid, ..ConnectionFields::sample() };
    let mut remedy = remedy(RemedyMode::Destroy, 0, 10);
    for number in 1..=150 {
        remedy.on_established(of_uid(Some(65_534)), request(number), SECOND_NS);
    }
    remedy.on_established(of_uid(None), request(151), SECOND_NS);
    remedy.on_established(of_uid(None), request(152), SECOND_NS);
    let first = due_and_gone(&mut remedy, SECOND_NS).0;
    assert_eq!(first, [1, 151, 2, 152, 3, 4, 5, 6, 7, 8], "an unknown opener is an owner of its own");
    remedy.on_established(of_uid(Some(0)), request(153), SECOND_NS + 1);
    let tick_ns = SECOND_NS / 10;
    let later: Vec<_> =
        (1..=3).flat_map(|tick| due_and_gone(&mut remedy, SECOND_NS + tick * tick_ns).0).collect();
    assert_eq!(later, [9, 153, 10]);
}

#[test]
fn a_connection_for_which_the_queue_has_no_room_is_reported_as_failed() {
    let mut remedy = remedy(RemedyMode::Destroy, u64::MAX, 10);
    let limit = crate::budget::memory::MAX_REMEDIES as u64 * 3 / 4;
    for number in 1..=limit {
        assert!(remedy.on_established(ConnectionFields::sample(), request(number), SECOND_NS).is_none());
    }
    let remedied = remedy.on_established(ConnectionFields::sample(), request(limit + 1), SECOND_NS).unwrap();
    assert_eq!(remedied.result, "failed");
    let why = remedied.why.unwrap();
    assert!(
        why.ends_with("3072 connections wait already, 3072 of them of its user or its control group"),
        "{why}"
    );
    assert_eq!(remedy.next_ns(), Some(u64::MAX), "the due time saturates");
    // Others fill the rest, until there is no room for one who has nothing.
    let of = |number: u64| {
        let owner_uid = Some(10_000 + number as u32);
        ConnectionFields { owner_uid, ..ConnectionFields::sample() }
    };
    let mut others = (limit + 1..2 * limit).map(|number| (number, of(number)));
    let why = others.find_map(|(number, fields)| {
        remedy.on_established(fields, request(number), SECOND_NS).map(|remedied| remedied.why.unwrap())
    });
    assert_eq!(
        why.unwrap(),
        "no room to wait: 4095 connections wait already, 0 of them of its user or its control group"
    );
}

#[test]
fn an_excluded_connection_is_reported_at_once_and_never_looked_up() {
    let selection = Selection { except: vec!["comm=java".parse().unwrap()], ..Selection::default() };
    let mut remedy = Remedy::new(RemedyPolicy { mode: RemedyMode::DryRun, selection, grace_ns: 7, rate: 1 });
    let remedied = remedy.on_established(ConnectionFields::sample(), request(1), 5).unwrap();
    assert_eq!((remedied.result, remedied.why.as_deref()), ("excepted", Some("except comm=java")));
    assert_eq!(remedy.next_ns(), None);
}

#[test]
fn a_connection_that_only_an_uncertain_process_excludes_is_reported_as_failed_and_left_alone() {
    for (is_process_certain, result) in [(true, "excepted"), (false, "failed")] {
        let selection = Selection { except: vec!["exe=*java".parse().unwrap()], ..Selection::default() };
        let policy = RemedyPolicy { mode: RemedyMode::Destroy, selection, grace_ns: 0, rate: 1 };
        let mut remedy = Remedy::new(policy);
        let fields = ConnectionFields { is_process_certain, ..ConnectionFields::sample() };
        let remedied = remedy.on_established(fields, request(1), 5).unwrap();
        assert_eq!(remedied.result, result);
        assert!(remedied.why.unwrap().starts_with("except exe=*java"));
        assert_eq!(remedy.next_ns(), None);
    }
}

#[test]
fn without_its_network_namespace_a_connection_cannot_be_looked_up() {
    let mut nowhere = request(1);
    nowhere.target.endpoint.netns = 0;
    let remedied =
        remedy(RemedyMode::Destroy, 0, 1).on_established(ConnectionFields::sample(), nowhere, 5).unwrap();
    assert_eq!(remedied.result, "failed");
    assert!(remedied.why.unwrap().contains("BTF"));
}
