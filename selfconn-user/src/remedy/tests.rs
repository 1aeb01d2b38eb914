//! Tables of who is helped, when, and what is told of it.

use super::*;
use crate::filter::tests::subject;

const TARGET: Target = Target {
    netns: 1,
    addr: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    port: 40_000,
    is_ipv6: false,
    ifindex: None,
};

fn remedy(mode: Mode, grace_ns: u64, rate: u32) -> Remedy {
    Remedy::new(Policy { mode, selection: Selection::default(), grace_ns, rate })
}

fn case() -> Case {
    Case { subject: subject(), target: Some(TARGET), near: vec![8, 7] }
}

fn cookie(number: u64) -> Cookie {
    Cookie::new(number).unwrap()
}

fn asked(number: u64) -> Asked {
    Asked { number, target: TARGET, near: vec![8, 7] }
}

/// What is due, as the numbers that are looked up and how many results of which name.
fn due(remedy: &mut Remedy, now_ns: u64) -> (Vec<u64>, Vec<&'static str>) {
    let (mut numbers, mut told) = (Vec::new(), Vec::new());
    for step in remedy.due(now_ns) {
        match step {
            Step::LookUp(asked) => numbers.push(asked.number),
            Step::Tell(remedied) => told.push(remedied.result),
            Step::Destroy(..) => panic!("before it is looked up"),
        }
    }
    (numbers, told)
}

#[test]
fn what_is_looked_up_is_destroyed_by_the_cookie_that_gave() {
    let mut remedy = remedy(Mode::Destroy, 0, 10);
    assert!(remedy.opened(1, case(), 5).is_none());
    assert_eq!(remedy.next_ns(), Some(5));
    assert_eq!(due(&mut remedy, 5), (vec![1], vec![]));
    assert!(!remedy.is_destroying() && remedy.next_ns().is_none());
    let step = remedy.looked_up(1, Ok(Some(cookie(9))));
    assert!(matches!(step, Some(Step::Destroy(which, by)) if which == asked(1) && by == cookie(9)));
    assert!(remedy.is_destroying());
    // Its end is seen before the answer.
    remedy.ended(1);
    let told = remedy.destroyed(1, Ok(true)).unwrap();
    assert_eq!((told.mode, told.result, told.port_freed), ("destroy", "destroyed", Some(true)));
    assert_eq!(told.subject.cookie, Some(9));
    assert!(!remedy.is_destroying());
    assert!(remedy.destroyed(1, Ok(true)).is_none(), "once");
}

#[test]
fn a_dry_run_asks_and_destroys_nothing() {
    let mut remedy = remedy(Mode::DryRun, 0, 10);
    remedy.opened(1, case(), 5);
    due(&mut remedy, 5);
    let Some(Step::Tell(told)) = remedy.looked_up(1, Ok(Some(cookie(9)))) else { panic!() };
    assert_eq!((told.mode, told.result), ("dry-run", "would_destroy"));
    assert!(!remedy.is_destroying());
}

#[test]
fn what_has_ended_or_is_another_one_is_gone_and_what_fails_says_why() {
    let known = |cookie| Case { subject: Subject { cookie: Some(cookie), ..subject() }, ..case() };
    let no = || Err("no".to_owned());
    for (case, ends, looked_up, destroyed, result) in [
        (case(), false, Ok(None), None, "gone"),
        (case(), true, Ok(Some(cookie(9))), None, "gone"),
        (known(8), false, Ok(Some(cookie(9))), None, "gone"),
        (known(9), false, Ok(Some(cookie(9))), Some(Ok(true)), "destroyed"),
        (case(), false, Ok(Some(cookie(9))), Some(Ok(false)), "gone"),
        (case(), false, Ok(Some(cookie(9))), Some(no()), "failed"),
        (case(), false, Err("no".to_owned()), None, "failed"),
    ] {
        let mut remedy = remedy(Mode::Destroy, 0, 10);
        remedy.opened(1, case, 5);
        due(&mut remedy, 5);
        if ends {
            remedy.ended(1);
        }
        let told = match (remedy.looked_up(1, looked_up), destroyed) {
            (Some(Step::Tell(told)), None) => *told,
            (Some(Step::Destroy(..)), Some(outcome)) => remedy.destroyed(1, outcome).unwrap(),
            (step, _) => panic!("{step:?}"),
        };
        assert_eq!(told.result, result);
        assert_eq!(told.why.as_deref(), (result == "failed").then_some("no"));
        assert_eq!(told.port_freed.is_some(), result == "destroyed");
        let counts: Vec<_> = remedy.counts().filter(|(_, count)| *count > 0).collect();
        assert!(counts.len() == 1 && counts[0].0.name() == result, "{counts:?}");
    }
}

#[test]
fn one_that_ends_in_its_grace_is_left_alone() {
    let mut remedy = remedy(Mode::Destroy, 100, 10);
    remedy.opened(1, case(), 5);
    remedy.opened(2, case(), 6);
    assert_eq!(due(&mut remedy, 104), (vec![], vec![]));
    remedy.ended(1);
    assert_eq!(remedy.next_ns(), Some(106));
    assert_eq!(due(&mut remedy, 106), (vec![2], vec![]));
    assert!(remedy.counts().all(|(_, count)| count == 0));
}

#[test]
fn those_beyond_the_rate_are_told_once_and_have_their_turn_later() {
    let mut remedy = remedy(Mode::Destroy, 0, 2);
    for number in 1..=5 {
        remedy.opened(number, case(), SECOND_NS);
    }
    remedy.opened(6, case(), 3 * SECOND_NS);
    let limited = |count| vec!["rate_limited"; count];
    assert_eq!(due(&mut remedy, SECOND_NS), (vec![1, 2], limited(3)));
    assert_eq!(remedy.next_ns(), Some(SECOND_NS + SECOND_NS / 2), "no wake-up for nothing");
    assert_eq!(due(&mut remedy, SECOND_NS + 1), (vec![], vec![]));
    remedy.ended(3);
    assert_eq!(due(&mut remedy, SECOND_NS + SECOND_NS / 2), (vec![4], vec![]));
    assert_eq!(due(&mut remedy, 2 * SECOND_NS), (vec![5], vec![]));
    assert_eq!(remedy.next_ns(), Some(3 * SECOND_NS));
    assert_eq!(due(&mut remedy, 3 * SECOND_NS), (vec![6], vec![]));
}

#[test]
fn one_that_comes_while_others_wait_for_their_turn_is_told_too() {
    let mut remedy = remedy(Mode::Destroy, 0, 1);
    for number in 1..=3 {
        remedy.opened(number, case(), SECOND_NS);
        due(&mut remedy, SECOND_NS + number);
    }
    let limited = remedy.counts().find(|(outcome, _)| *outcome == Outcome::RateLimited);
    assert_eq!(limited, Some((Outcome::RateLimited, 2)));
}

#[test]
fn what_the_policy_spares_is_told_at_once_and_never_asked_for() {
    let selection = Selection { except: vec!["comm=java".parse().unwrap()], ..Selection::default() };
    let mut remedy = Remedy::new(Policy { mode: Mode::DryRun, selection, grace_ns: 7, rate: 1 });
    let told = remedy.opened(1, case(), 5).unwrap();
    assert_eq!((told.result, told.why.as_deref()), ("excepted", Some("except comm=java")));
    assert_eq!(remedy.next_ns(), None);
}

#[test]
fn without_its_network_namespace_it_can_not_be_found() {
    let told = remedy(Mode::Destroy, 0, 1).opened(1, Case { target: None, ..case() }, 5).unwrap();
    assert_eq!(told.result, "failed");
    assert!(told.why.unwrap().contains("BTF"));
}

#[test]
fn a_second_lets_as_many_through_as_the_rate_says() {
    for rate in [1, 3, 10, 1_000_000] {
        let mut limiter = Limiter::new(rate);
        let start = 77 * SECOND_NS;
        let taken = |limiter: &mut Limiter, at| (0..20).filter(|_| limiter.take(at)).count();
        let burst = (rate as usize).min(20);
        assert_eq!(taken(&mut limiter, start), burst, "{rate}");
        if rate < 20 {
            assert_eq!(taken(&mut limiter, start), 0);
            assert!(!limiter.take(limiter.free_ns() - 1));
            assert!(limiter.take(limiter.free_ns()));
        }
    }
}
