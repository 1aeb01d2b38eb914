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
mod tests;
