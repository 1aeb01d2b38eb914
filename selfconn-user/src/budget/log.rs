//! The log's budget: which events an owner may have in the log. Pure: the caller has the clock.
//!
//! `log_shares` has the rates. A connection is admitted or suppressed as a whole, at its first event. So is a port at
//! risk, which takes from the rate of warnings only: no storm of connections suppresses a warning. A reserve beside the
//! rate is for the first connection of each program and port, and half of it for what the remedy did and for events
//! about no connection.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
};

use selfconn_ebpf::Owner;

use super::{Payer, RateLimiter, log_shares::LogShares};

pub use super::log_shares::LogRate;

/// Events that a connection certainly has: `established` and `closed`; and a port at risk: `at_risk` and
/// `at_risk_over`.
const CONNECTION_EVENTS: u64 = 2;

/// Bytes of a line that one event of the rate stands for. A longer line takes more of them: an executable's path alone
/// may have 24 KiB as JSON.
const EVENT_BYTES: usize = 2 << 10;

/// Maximum number of owners in one report.
const REPORTED_OWNERS: usize = 64;

/// What an event is to its connection, or to its port at risk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Established,
    /// A change of state. `ends`: the socket is closed.
    State {
        ends: bool,
    },
    Closed,
    /// What the remedy did. `is_final`: it will do nothing else.
    Remedied {
        is_final: bool,
    },
    /// It has no other event.
    Alone,
    AtRisk,
    AtRiskOver,
}

/// An event of a connection, of a port at risk, or of a process.
#[derive(Clone, Debug)]
pub struct LogRequest<'a> {
    pub id: &'a str,
    /// Whose share it takes.
    pub owner: Owner,
    /// Of `at_risk`: whose share it takes if the first one has no room.
    pub other_owner: Option<Owner>,
    /// Who is named if it is suppressed.
    pub payer: Payer,
    pub program: Option<&'a str>,
    pub port: u16,
    pub phase: Phase,
}

/// The events of an owner that were suppressed since the last report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuppressedEvents {
    /// The default owner, without a user: several owners.
    pub owner: Payer,
    pub count: u64,
    /// `None`: several programs, or an unknown one.
    pub program: Option<String>,
    pub first_port: u16,
    pub last_port: u16,
}

#[derive(Clone, Copy, Debug)]
struct Decision {
    is_admitted: bool,
    is_established: bool,
}

#[derive(Debug)]
pub struct LogBudget {
    shares: LogShares,
    /// By the id of each open connection, and of each port at risk whose risk is in the log.
    decisions: HashMap<Box<str>, Decision>,
    suppressed: u64,
    unreported: HashMap<Payer, SuppressedEvents>,
    hasher: RandomState,
}

impl LogBudget {
    /// `rate`: that of an owner.
    #[must_use]
    pub fn new(rate: LogRate) -> Self {
        Self {
            shares: LogShares::new(rate),
            decisions: HashMap::new(),
            suppressed: 0,
            unreported: HashMap::new(),
            hasher: RandomState::new(),
        }
    }

    /// Number of suppressed events.
    #[must_use]
    pub fn suppressed(&self) -> u64 {
        self.suppressed
    }

    /// The suppressed events since the last call, by owner.
    pub fn take_unreported(&mut self) -> Vec<SuppressedEvents> {
        let mut events: Vec<_> = std::mem::take(&mut self.unreported).into_values().collect();
        events.sort_by(|a, b| a.owner.cmp(&b.owner));
        events
    }

    /// The connection with this id has ended without an event of its end.
    pub fn forget(&mut self, id: &str) {
        self.decisions.remove(id);
    }

    /// True if the event may be written. A suppressed one is counted.
    pub fn admits(&mut self, request: &LogRequest<'_>, now_ns: u64) -> bool {
        let decision = self.decisions.get(request.id).copied();
        let is_admitted = match (request.phase, decision) {
            (Phase::Established | Phase::State { .. }, None) => {
                self.admits_first(request, request.owner, CONNECTION_EVENTS, now_ns)
            }
            (Phase::Alone, _) => self.admits_alone(request, now_ns),
            (Phase::AtRisk, decision) => {
                // The end of a risk is paid with its first event.
                let events = if decision.is_none() { CONNECTION_EVENTS } else { 1 };
                let mut owners = [request.owner].into_iter().chain(request.other_owner);
                owners.any(|owner| self.take_warnings(owner, events, now_ns))
            }
            (Phase::AtRiskOver, decision) => decision.is_some(),
            (Phase::Closed, Some(decision)) => decision.is_admitted,
            (_, Some(Decision { is_admitted: true, .. })) => {
                // Paid with the connection.
                if request.phase != Phase::Established {
                    self.shares.each(request.owner, now_ns, |share| share.events.take(1, now_ns));
                }
                true
            }
            (Phase::Remedied { is_final: true }, _) | (Phase::Closed | Phase::Remedied { .. }, None) => {
                self.take_reserve(request.owner, 1, now_ns, |reserve| reserve.has(1, now_ns))
            }
            (_, Some(_)) => false,
        };
        self.track(request, decision, is_admitted);
        if !is_admitted {
            self.count(request);
        }
        is_admitted
    }

    /// An admitted event of this owner has a line of this length.
    pub fn on_line(&mut self, owner: Owner, phase: Phase, bytes: usize, now_ns: u64) {
        let more = (bytes.saturating_sub(1) / EVENT_BYTES) as u64;
        if more > 0 {
            self.shares.each(owner, now_ns, |share| match phase {
                Phase::AtRisk | Phase::AtRiskOver => share.warnings.take(more, now_ns),
                _ => share.events.take(more, now_ns),
            });
        }
    }

    /// Remembers the decision while the connection is open.
    fn track(&mut self, request: &LogRequest<'_>, decision: Option<Decision>, is_admitted: bool) {
        let is_established = decision.is_some_and(|decision| decision.is_established);
        match request.phase {
            Phase::Closed => _ = self.decisions.remove(request.id),
            // `closed` follows only if `established` was emitted.
            Phase::State { ends: true } if !is_established => _ = self.decisions.remove(request.id),
            Phase::Established | Phase::State { .. } => {
                let is_established = is_established || request.phase == Phase::Established;
                let is_admitted = decision.map_or(is_admitted, |decision| decision.is_admitted);
                self.decisions.insert(request.id.into(), Decision { is_admitted, is_established });
            }
            Phase::AtRisk if is_admitted => {
                self.decisions.insert(request.id.into(), Decision { is_admitted, is_established: false });
            }
            Phase::AtRiskOver => _ = self.decisions.remove(request.id),
            Phase::Remedied { .. } | Phase::Alone | Phase::AtRisk => {}
        }
    }

    /// The first event of a connection, with this number of events to pay for.
    fn admits_first(&mut self, request: &LogRequest<'_>, owner: Owner, events: u64, now_ns: u64) -> bool {
        let what = self.hasher.hash_one((request.program, request.port));
        let is_first = self.shares.is_first(owner, what);
        self.take_events(owner, events, now_ns)
            || is_first && self.take_reserve(owner, events, now_ns, |reserve| reserve.is_half_full(now_ns))
    }

    fn admits_alone(&mut self, request: &LogRequest<'_>, now_ns: u64) -> bool {
        let owner = request.owner;
        self.take_events(owner, 1, now_ns)
            || self.take_reserve(owner, 1, now_ns, |reserve| reserve.has(1, now_ns))
    }

    /// Takes from the rates of the owner, of its user and of its control group, if each has as much.
    fn take_events(&mut self, owner: Owner, count: u64, now_ns: u64) -> bool {
        let is_available = self.shares.all(owner, now_ns, |share| share.events.has(count, now_ns));
        if is_available {
            self.shares.each(owner, now_ns, |share| share.events.take(count, now_ns));
        }
        is_available
    }

    /// The same for warnings about ports at risk.
    fn take_warnings(&mut self, owner: Owner, count: u64, now_ns: u64) -> bool {
        let is_available = self.shares.all(owner, now_ns, |share| share.warnings.has(count, now_ns));
        if is_available {
            self.shares.each(owner, now_ns, |share| share.warnings.take(count, now_ns));
        }
        is_available
    }

    /// Takes from the reserves of the owner, of its user and of its control group, if this holds for each of them.
    fn take_reserve(
        &mut self,
        owner: Owner,
        count: u64,
        now_ns: u64,
        can_take: impl Fn(&RateLimiter) -> bool,
    ) -> bool {
        let is_available = self.shares.all(owner, now_ns, |share| can_take(&share.reserve));
        if is_available {
            self.shares.each(owner, now_ns, |share| share.reserve.take(count, now_ns));
        }
        is_available
    }

    fn count(&mut self, request: &LogRequest<'_>) {
        self.suppressed += 1;
        let is_known = self.unreported.contains_key(&request.payer);
        let owner = if is_known || self.unreported.len() < REPORTED_OWNERS {
            request.payer.clone()
        } else {
            Payer::default()
        };
        let program = request.program.map(str::to_owned);
        let port = request.port;
        self.unreported
            .entry(owner.clone())
            .and_modify(|events| {
                events.count += 1;
                events.program = events.program.take().filter(|known| request.program == Some(known));
                events.first_port = events.first_port.min(port);
                events.last_port = events.last_port.max(port);
            })
            .or_insert(SuppressedEvents { owner, count: 1, program, first_port: port, last_port: port });
    }
}

#[cfg(test)]
mod tests;
