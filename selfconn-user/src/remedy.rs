//! What is to be done about self-connections, when, and how often: the policy of `--remedy`, and those that wait for it.
//! Pure: no clock, no kernel. Whoever owns it does what it says and tells it what came of that.
//!
//! A self-connection is looked up first, and destroyed by the cookie that this gives. That the cookie is that very
//! connection's is known because every transition until then has been taken in, and the connection was still open.

use std::collections::{BTreeMap, HashMap};

use crate::{
    event::{Remedied, Subject},
    filter::Selection,
    sockets::{Cookie, Target},
};

const SECOND_NS: u64 = 1_000_000_000;

/// What `--remedy` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All but the last step.
    DryRun,
    /// SOCK_DESTROY.
    Destroy,
}

impl Mode {
    /// As the option and events have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DryRun => "dry-run",
            Self::Destroy => "destroy",
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What to do.
    pub mode: Mode,
    /// About which.
    pub selection: Selection,
    /// How long one may live before.
    pub grace_ns: u64,
    /// How many a second; as many may come at once.
    pub rate: u32,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The socket is destroyed.
    Destroyed,
    /// It would be, without dry-run.
    WouldDestroy,
    /// The policy spares it.
    Excepted,
    /// It has to wait for its turn.
    RateLimited,
    /// It had ended by itself.
    Gone,
    /// It could not be done.
    Failed,
}

impl Outcome {
    /// Every one, in the order in which they count.
    pub const ALL: [Self; 6] =
        [Self::Destroyed, Self::WouldDestroy, Self::Excepted, Self::RateLimited, Self::Gone, Self::Failed];

    /// As events and metrics have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Destroyed => "destroyed",
            Self::WouldDestroy => "would_destroy",
            Self::Excepted => "excepted",
            Self::RateLimited => "rate_limited",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

/// A self-connection that something may be done about.
#[derive(Clone, Debug)]
pub struct Case {
    /// As its events have it.
    pub subject: Subject,
    /// Where it is. `None`: nobody knows its network namespace.
    pub target: Option<Target>,
    /// Processes and threads that may be in its network namespace.
    pub near: Vec<u32>,
}

/// What is to be done now.
#[derive(Debug)]
pub enum Step {
    /// Look it up.
    LookUp(Asked),
    /// Destroy it.
    Destroy(Asked, Cookie),
    /// Tell this.
    Tell(Box<Remedied>),
}

/// Which one a step is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The connection's.
    pub number: u64,
    /// Where it is.
    pub target: Target,
    /// Where to look first for its network namespace.
    pub near: Vec<u32>,
}

/// The self-connections that wait, and the one policy for them.
#[derive(Debug)]
pub struct Remedy {
    policy: Policy,
    /// By number. Those of one grace are due in the order in which they came.
    waiting: BTreeMap<u64, Waiting>,
    /// Looked up or destroyed just now.
    under_way: HashMap<u64, UnderWay>,
    limiter: Limiter,
    counts: [u64; Outcome::ALL.len()],
}

#[derive(Debug)]
struct Waiting {
    due_ns: u64,
    /// Whether it is told that it has to wait for its turn.
    is_told: bool,
    subject: Subject,
    asked: Asked,
}

#[derive(Debug)]
struct UnderWay {
    is_destroyed: bool,
    has_ended: bool,
    subject: Subject,
    asked: Asked,
}

impl Remedy {
    /// Nothing waits yet.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let limiter = Limiter::new(policy.rate);
        Self {
            policy,
            waiting: BTreeMap::new(),
            under_way: HashMap::new(),
            limiter,
            counts: Default::default(),
        }
    }

    /// How often each outcome was told.
    pub fn counts(&self) -> impl Iterator<Item = (Outcome, u64)> {
        Outcome::ALL.into_iter().zip(self.counts)
    }

    /// A self-connection is there since `at_ns`. Gives what there is to tell at once.
    pub fn opened(&mut self, number: u64, case: Case, at_ns: u64) -> Option<Remedied> {
        let Case { subject, target, near } = case;
        if let Some(why) = self.policy.selection.spares(&subject) {
            return Some(self.tell(subject, Outcome::Excepted, Some(why)));
        }
        let Some(target) = target else {
            let why = "its network namespace is unknown: the kernel has no usable BTF".to_owned();
            return Some(self.tell(subject, Outcome::Failed, Some(why)));
        };
        let due_ns = at_ns.saturating_add(self.policy.grace_ns);
        let asked = Asked { number, target, near };
        self.waiting.insert(number, Waiting { due_ns, is_told: false, subject, asked });
        None
    }

    /// It is gone, by itself or by us.
    pub fn ended(&mut self, number: u64) {
        self.waiting.remove(&number);
        if let Some(under_way) = self.under_way.get_mut(&number) {
            under_way.has_ended = true;
        }
    }

    /// When there is something to do next.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        let (_, first) = self.waiting.first_key_value()?;
        Some(if first.is_told { first.due_ns.max(self.limiter.free_ns()) } else { first.due_ns })
    }

    /// Whether one is being destroyed.
    #[must_use]
    pub fn is_destroying(&self) -> bool {
        self.under_way.values().any(|under_way| under_way.is_destroyed)
    }

    /// What is to be done now.
    pub fn due(&mut self, now_ns: u64) -> Vec<Step> {
        let mut steps = Vec::new();
        while let Some(first) = self.waiting.first_entry().filter(|first| first.get().due_ns <= now_ns) {
            if !self.limiter.take(now_ns) {
                break;
            }
            let (number, Waiting { subject, asked, .. }) = first.remove_entry();
            steps.push(Step::LookUp(asked.clone()));
            self.under_way.insert(number, UnderWay { is_destroyed: false, has_ended: false, subject, asked });
        }
        // The rest of those that are due; each is told once.
        let per_second = format!("{} a second", self.policy.rate);
        let late = self.waiting.values_mut().rev().skip_while(|waiting| waiting.due_ns > now_ns);
        let untold: Vec<_> = late
            .take_while(|waiting| !waiting.is_told)
            .map(|waiting| {
                waiting.is_told = true;
                waiting.subject.clone()
            })
            .collect();
        for subject in untold.into_iter().rev() {
            let told = self.tell(subject, Outcome::RateLimited, Some(per_second.clone()));
            steps.push(Step::Tell(Box::new(told)));
        }
        steps
    }

    /// What the lookup gave, when every transition until then is taken in.
    pub fn looked_up(&mut self, number: u64, outcome: Result<Option<Cookie>, String>) -> Option<Step> {
        let UnderWay { has_ended, mut subject, asked, .. } = self.under_way.remove(&number)?;
        let known = subject.cookie;
        let (outcome, why) = match outcome {
            // Another one may be at its place by now.
            Ok(Some(cookie)) if !has_ended && known.is_none_or(|known| known == cookie.get()) => {
                subject.cookie = Some(cookie.get());
                if self.policy.mode == Mode::Destroy {
                    let step = Step::Destroy(asked.clone(), cookie);
                    self.under_way.insert(number, UnderWay { is_destroyed: true, has_ended, subject, asked });
                    return Some(step);
                }
                (Outcome::WouldDestroy, None)
            }
            Ok(_) => (Outcome::Gone, None),
            Err(why) => (Outcome::Failed, Some(why)),
        };
        Some(Step::Tell(Box::new(self.tell(subject, outcome, why))))
    }

    /// Whether it was there to be destroyed.
    pub fn destroyed(&mut self, number: u64, outcome: Result<bool, String>) -> Option<Remedied> {
        let UnderWay { subject, .. } = self.under_way.remove(&number)?;
        let (outcome, why) = match outcome {
            Ok(true) => (Outcome::Destroyed, None),
            Ok(false) => (Outcome::Gone, None),
            Err(why) => (Outcome::Failed, Some(why)),
        };
        Some(self.tell(subject, outcome, why))
    }

    fn tell(&mut self, subject: Subject, outcome: Outcome, why: Option<String>) -> Remedied {
        self.counts[outcome as usize] += 1;
        let port_freed = match outcome {
            Outcome::Destroyed | Outcome::WouldDestroy => frees(&subject),
            _ => None,
        };
        Remedied { subject, mode: self.policy.mode.name(), result: outcome.name(), why, port_freed }
    }
}

/// A port that connect() chose is given back at the end, for it is not locked; one that the program had named stays
/// with the socket until that is closed (`tcp_set_state`, net/ipv4/tcp.c, and SOCK_BINDPORT_LOCK, include/net/sock.h
/// at v5.10). One from bind to port 0 is not locked either, but is told as bound.
fn frees(subject: &Subject) -> Option<bool> {
    match subject.cause {
        Some("ephemeral") => Some(true),
        _ => None,
    }
}

/// So many a second, and as many at once: each take moves `full_ns`, when nothing would be left to wait for, an interval
/// on, and it may be a second ahead.
#[derive(Debug)]
struct Limiter {
    interval_ns: u64,
    full_ns: u64,
}

impl Limiter {
    fn new(rate: u32) -> Self {
        Self { interval_ns: SECOND_NS / u64::from(rate.max(1)), full_ns: 0 }
    }

    /// From when on one may be taken.
    fn free_ns(&self) -> u64 {
        (self.full_ns + self.interval_ns).saturating_sub(SECOND_NS)
    }

    fn take(&mut self, now_ns: u64) -> bool {
        let is_free = self.free_ns() <= now_ns;
        if is_free {
            self.full_ns = self.full_ns.max(now_ns) + self.interval_ns;
        }
        is_free
    }
}

#[cfg(test)]
mod tests {
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
}
