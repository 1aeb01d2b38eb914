//! The policy of `--remedy`: decides which self-connections to destroy, when, and at what rate. `queue` keeps
//! those that wait. Pure: no clock, no kernel. The owner executes the steps and reports their results back.
//!
//! A self-connection is first looked up, and then destroyed by the cookie that the lookup returned. The
//! cookie certainly belongs to that connection, because every transition until the lookup has been applied
//! and the connection was still open.

use std::collections::HashMap;

use super::filter::{Exclusion, Selection};
use crate::{
    budget::RateLimiter,
    event::{ConnectionFields, Remedied},
    sockets::{Cookie, TargetSocket},
};

mod queue;
#[cfg(test)]
mod tests;

use queue::{RemedyQueue, WaitingConnection};

/// What `--remedy` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemedyMode {
    /// Everything except SOCK_DESTROY itself.
    DryRun,
    /// Destroy the sockets with SOCK_DESTROY.
    Destroy,
}

impl RemedyMode {
    /// Name in the option and in events.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DryRun => "dry-run",
            Self::Destroy => "destroy",
        }
    }
}

/// The requested policy.
#[derive(Clone, Debug)]
pub struct RemedyPolicy {
    /// What to do.
    pub mode: RemedyMode,
    /// Which self-connections may be destroyed.
    pub selection: Selection,
    /// How long a self-connection is left alone after it is established.
    pub grace_ns: u64,
    /// Maximum number per second. A burst may have the same number.
    pub rate: u32,
}

/// Maximum number of connections that the worker has. It does one after another, the search for a network namespace may
/// visit every process of the host, and owners take turns only in what the worker does not have yet.
const MAX_IN_PROGRESS: usize = 2;

/// Why a connection has no other result at the end of a run.
const LEFT_AT_END: &str = "the run ended before its socket was destroyed";
const UNKNOWN_AT_END: &str =
    "the run ended before the kernel answered: whether its socket is destroyed is unknown";

/// Result for one self-connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemedyOutcome {
    /// The socket was destroyed.
    Destroyed,
    /// The socket would have been destroyed without dry-run.
    WouldDestroy,
    /// The selection of the policy excludes it.
    Excepted,
    /// It has to wait because of the rate limit.
    RateLimited,
    /// It was already closed.
    Gone,
    /// The lookup or SOCK_DESTROY failed, or the run ended before its result.
    Failed,
}

impl RemedyOutcome {
    /// All outcomes, in the order of the counters.
    pub const ALL: [Self; 6] =
        [Self::Destroyed, Self::WouldDestroy, Self::Excepted, Self::RateLimited, Self::Gone, Self::Failed];

    /// Name in events and metrics.
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

/// A step that the owner must execute.
#[derive(Debug)]
pub enum RemedyStep {
    /// Look up the socket's cookie.
    LookUp(RemedyRequest),
    /// Destroy the socket with this cookie.
    Destroy(RemedyRequest, Cookie),
    /// Emit this event.
    Emit(Box<Remedied>),
}

/// The socket that a step is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemedyRequest {
    /// Number of the connection.
    pub number: u64,
    pub target: TargetSocket,
}

/// The policy, and the self-connections that wait for a step.
#[derive(Debug)]
pub struct Remedy {
    policy: RemedyPolicy,
    waiting: RemedyQueue,
    /// Connections that are being looked up or destroyed now.
    in_progress: HashMap<u64, ConnectionInProgress>,
    limiter: RateLimiter,
    counts: [u64; RemedyOutcome::ALL.len()],
}

#[derive(Debug)]
struct ConnectionInProgress {
    is_destroying: bool,
    has_closed: bool,
    fields: ConnectionFields,
    request: RemedyRequest,
}

impl Remedy {
    /// Starts with no connections.
    #[must_use]
    pub fn new(policy: RemedyPolicy) -> Self {
        let limiter = RateLimiter::new(policy.rate, 1);
        Self {
            policy,
            waiting: RemedyQueue::default(),
            in_progress: HashMap::new(),
            limiter,
            counts: Default::default(),
        }
    }

    /// True unless it is a dry run.
    #[must_use]
    pub fn destroys(&self) -> bool {
        self.policy.mode == RemedyMode::Destroy
    }

    /// Number of reports of each outcome.
    pub fn counts(&self) -> impl Iterator<Item = (RemedyOutcome, u64)> {
        RemedyOutcome::ALL.into_iter().zip(self.counts)
    }

    /// A self-connection was established at `at_ns`. `fields` are its fields in events. Returns the event to
    /// emit at once, if any.
    pub fn on_established(
        &mut self,
        fields: ConnectionFields,
        request: RemedyRequest,
        at_ns: u64,
    ) -> Option<Remedied> {
        if let Some(Exclusion { why, is_certain, .. }) = self.policy.selection.exclusion(&fields) {
            return Some(self.finish(fields, outcome_of_exclusion(is_certain), Some(why)));
        }
        if request.target.endpoint.known_netns().is_none() {
            let why = "its network namespace is unknown: the kernel has no usable BTF".to_owned();
            return Some(self.finish(fields, RemedyOutcome::Failed, Some(why)));
        }
        if let Some(why) = self.policy.selection.kernel_socket_reason(&fields) {
            let outcome = outcome_of_exclusion(fields.kernel_socket.is_some());
            return Some(self.finish(fields, outcome, Some(why.to_owned())));
        }
        let due_ns = at_ns.saturating_add(self.policy.grace_ns);
        let owner = fields.share_owner();
        let refused = self.waiting.insert(owner, due_ns, WaitingConnection { fields, request })?;
        let why = self.waiting.refusal(owner);
        Some(self.finish(refused.fields, RemedyOutcome::Failed, Some(why)))
    }

    /// The connection is closed, by itself or by the remedy.
    pub fn on_closed(&mut self, number: u64) {
        self.waiting.remove(number);
        if let Some(in_progress) = self.in_progress.get_mut(&number) {
            in_progress.has_closed = true;
        }
    }

    /// Time of the next step: `CLOCK_BOOTTIME`, nanoseconds. `None`: none comes before the worker's next response.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        if self.in_progress.len() >= MAX_IN_PROGRESS {
            return None;
        }
        let first_ns = self.waiting.first_due_ns()?.max(self.limiter.available_ns());
        Some(self.waiting.first_unreported_ns().map_or(first_ns, |due_ns| due_ns.min(first_ns)))
    }

    /// True if a socket is being destroyed now.
    #[must_use]
    pub fn is_destroying(&self) -> bool {
        self.in_progress.values().any(|in_progress| in_progress.is_destroying)
    }

    /// The steps that are due now.
    pub fn due(&mut self, now_ns: u64) -> Vec<RemedyStep> {
        let mut steps = Vec::new();
        while self.in_progress.len() < MAX_IN_PROGRESS
            && self.waiting.first_due_ns().is_some_and(|due_ns| due_ns <= now_ns)
            && self.limiter.try_take(now_ns)
        {
            let Some(WaitingConnection { fields, request }) = self.waiting.take_due(now_ns) else { break };
            steps.push(RemedyStep::LookUp(request.clone()));
            self.in_progress.insert(
                request.number,
                ConnectionInProgress { is_destroying: false, has_closed: false, fields, request },
            );
        }
        if self.limiter.has(1, now_ns) {
            return steps;
        }
        // The others that are due are over the rate limit. Each is reported once.
        let per_second = format!("{} a second", self.policy.rate);
        let overdue = self.waiting.report_overdue(now_ns);
        let unreported: Vec<_> = overdue.into_iter().map(|waiting| waiting.fields.clone()).collect();
        for fields in unreported {
            let remedied = self.finish(fields, RemedyOutcome::RateLimited, Some(per_second.clone()));
            steps.push(RemedyStep::Emit(Box::new(remedied)));
        }
        steps
    }

    /// Result of a lookup. Every transition until the lookup must have been applied before.
    pub fn on_looked_up(
        &mut self,
        number: u64,
        outcome: Result<Option<Cookie>, String>,
    ) -> Option<RemedyStep> {
        let ConnectionInProgress { has_closed, mut fields, request, .. } =
            self.in_progress.remove(&number)?;
        let expected_cookie = fields.cookie;
        let (outcome, why) = match outcome {
            // Another socket may have the same endpoint by now.
            Ok(Some(cookie))
                if !has_closed
                    && expected_cookie.is_none_or(|expected_cookie| expected_cookie == cookie.get()) =>
            {
                fields.cookie = Some(cookie.get());
                if self.destroys() {
                    let step = RemedyStep::Destroy(request.clone(), cookie);
                    self.in_progress.insert(
                        number,
                        ConnectionInProgress { is_destroying: true, has_closed, fields, request },
                    );
                    return Some(step);
                }
                (RemedyOutcome::WouldDestroy, None)
            }
            Ok(_) => (RemedyOutcome::Gone, None),
            Err(why) => (RemedyOutcome::Failed, Some(why)),
        };
        Some(RemedyStep::Emit(Box::new(self.finish(fields, outcome, why))))
    }

    /// Result of SOCK_DESTROY. `Ok(false)`: the socket did not exist any more.
    pub fn on_destroyed(&mut self, number: u64, outcome: Result<bool, String>) -> Option<Remedied> {
        let ConnectionInProgress { fields, .. } = self.in_progress.remove(&number)?;
        let (outcome, why) = match outcome {
            Ok(true) => (RemedyOutcome::Destroyed, None),
            Ok(false) => (RemedyOutcome::Gone, None),
            Err(why) => (RemedyOutcome::Failed, Some(why)),
        };
        Some(self.finish(fields, outcome, why))
    }

    /// The run ends, and from now on nothing is destroyed. Returns the events of the connections whose socket was to be
    /// destroyed and of which no result has come. `begun`: the last one of which the kernel was asked to destroy the
    /// socket.
    pub fn end(&mut self, begun: Option<u64>) -> Vec<Remedied> {
        let destroying = self.in_progress.extract_if(|_, in_progress| in_progress.is_destroying);
        let mut destroying: Vec<_> = destroying.collect();
        destroying.sort_unstable_by_key(|(number, _)| *number);
        let finish = |(number, ConnectionInProgress { fields, .. })| {
            let why = if begun == Some(number) { UNKNOWN_AT_END } else { LEFT_AT_END };
            self.finish(fields, RemedyOutcome::Failed, Some(why.to_owned()))
        };
        destroying.into_iter().map(finish).collect()
    }

    fn finish(&mut self, fields: ConnectionFields, outcome: RemedyOutcome, why: Option<String>) -> Remedied {
        self.counts[outcome as usize] += 1;
        let port_freed = match outcome {
            RemedyOutcome::Destroyed | RemedyOutcome::WouldDestroy => frees_port(&fields),
            _ => None,
        };
        Remedied {
            connection: fields,
            mode: self.policy.mode.name(),
            result: outcome.name(),
            why,
            port_freed,
        }
    }
}

/// What an exclusion makes of a connection. One that is spared only because something is not certain is not excepted.
const fn outcome_of_exclusion(is_certain: bool) -> RemedyOutcome {
    if is_certain { RemedyOutcome::Excepted } else { RemedyOutcome::Failed }
}

/// True if SOCK_DESTROY frees the port at once. `None`: unknown. A port that connect() chose is released when
/// the connection is closed, because it is not locked. A port that the program named stays with the socket
/// until the socket is closed (`tcp_set_state`, net/ipv4/tcp.c, and SOCK_BINDPORT_LOCK, include/net/sock.h at
/// v5.10). A port from bind to port 0 is not locked either, but events report it as bound.
fn frees_port(fields: &ConnectionFields) -> Option<bool> {
    match fields.cause {
        Some("ephemeral") => Some(true),
        _ => None,
    }
}
