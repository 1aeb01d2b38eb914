//! Finds the ports at risk of a self-connection: a program keeps connecting to the port, nothing listens on
//! it, and `connect()` can choose it as source port. Pure: the input is the probes' counts and the local port
//! range of a network namespace, the output is the events to emit.
//!
//! A port that `connect()` can't choose is checked again, because the port range and the reserved ports can
//! change. The interval depends on the rate of the attempts: few attempts pass between two checks, compared
//! with the number of attempts that a self-connection takes on average.

use std::collections::HashMap;

use selfconn_ebpf::{
    Endpoint,
    refused_connects::{REPORT_THRESHOLD, RefusedCount, WINDOW_NS},
};

use crate::{guard::GuardMode, sockets::PortUse};

pub use attempts::RefusedConnects;
pub use reach::{OddsCache, PortChoices, PortReach};

mod attempts;
mod reach;
#[cfg(test)]
mod tests;

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

/// How long connections from a port are taken for those of a listener that has ended, at first. It halves with each
/// listener that follows such a time: anybody can connect from a port that nobody has, and listen there now and then.
const MAX_RELEASE_NS: u64 = 60 * SECOND_NS;

/// How soon a port is reported again after the end of its risk: at first, and at most. It doubles each time, because
/// anybody can open and close a listener in a loop.
const MIN_PAUSE_NS: u64 = SECOND_NS;
const MAX_PAUSE_NS: u64 = 300 * SECOND_NS;

/// Mean number of checks during the number of attempts that a self-connection takes on average.
const CHECKS_PER_EXPECTED_HIT: u64 = 50;

/// An event about a port at risk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortRiskEvent {
    /// The next attempt can connect to itself.
    AtRisk(PortAtRisk),
    /// The port is not at risk any more.
    Over(RefusedConnects, RiskEndReason),
}

impl PortRiskEvent {
    /// The attempts until then.
    #[must_use]
    pub fn connects(&self) -> &RefusedConnects {
        match self {
            Self::AtRisk(at_risk) => &at_risk.connects,
            Self::Over(connects, _) => connects,
        }
    }
}

/// A port at risk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortAtRisk {
    pub connects: RefusedConnects,
    pub chance: Chance,
    /// True if a socket that can't be seen may be bound to the port: then no attempt connects to itself.
    pub may_be_bound: bool,
    /// What the guard does in its network namespace.
    pub guard: GuardMode,
}

/// What is known of a port now.
#[derive(Clone, Copy, Debug)]
pub struct PortLook<'a> {
    /// How `connect()` comes to it, or the reason why that is unknown.
    pub reach: Result<PortReach, &'a str>,
    /// What has the port. `None`: unknown.
    pub port_use: Option<PortUse>,
    /// True if the kernel shows sockets that are bound and idle.
    pub shows_idle: bool,
    /// What the guard does in its namespace.
    pub guard: GuardMode,
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
    /// True from [`PortRisks::begin_check`] until [`PortRisks::check`] or [`PortRisks::end_check`].
    is_in_check: bool,
    /// Number of attempts at which the port is reported next.
    next_report_count: u64,
    /// The number of the risk that is reported and not over.
    risk: Option<u64>,
    /// True if somebody has bound the port, so that `connect()` does not choose it.
    is_bound: bool,
    /// When somebody was last seen to have bound it: `CLOCK_BOOTTIME`, nanoseconds.
    bound_ns: u64,
    /// True if it was taken for bound at the last check because of connections only.
    is_by_connections: bool,
    /// How long connections are taken for those of a listener that has ended: nanoseconds.
    release_ns: u64,
    /// When the last risk was over, and how soon it is reported again: nanoseconds.
    over_ns: u64,
    pause_ns: u64,
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
            is_in_check: false,
            next_report_count: REPORT_THRESHOLD,
            risk: None,
            is_bound: false,
            bound_ns: 0,
            is_by_connections: false,
            release_ns: MAX_RELEASE_NS,
            over_ns: 0,
            pause_ns: 0,
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
            false => {
                self.ports.values().filter(|port| !port.is_in_check).map(|port| port.next_check_ns).min()
            }
        };
        due_ns.map(|due_ns| due_ns.max(self.last_check_ns + RELEASE_CHECK_INTERVAL_NS))
    }

    /// Begins a check. Returns the ports that are due; the caller must let the programs wait for the ends of the
    /// listeners at [`Self::tracked`].
    pub fn begin_check(&mut self, now_ns: u64) -> Vec<Endpoint> {
        (self.last_check_ns, self.is_watch_stale) = (now_ns, false);
        let mut due = Vec::new();
        for (destination, port) in &mut self.ports {
            if !port.is_in_check && port.next_check_ns <= now_ns {
                port.is_in_check = true;
                due.push(*destination);
            }
        }
        due
    }

    /// Ends the check of a port of which nothing could be learned.
    pub fn end_check(&mut self, destination: &Endpoint) {
        if let Some(port) = self.ports.get_mut(destination) {
            port.is_in_check = false;
        }
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
        port.is_in_check = false;
        let mut connects =
            RefusedConnects { risk: port.risk.unwrap_or(0), ..RefusedConnects::new(destination, count) };
        if let Ok(reach) = &look.reach {
            // Of the moment in which the worker was asked.
            connects.choices = reach.choices;
        }
        let before = port.last_connects.replace(connects);
        let expiry_ns = connects.last_ns.saturating_add(WINDOW_NS + 1);
        port.next_check_ns = expiry_ns;
        let can_be_chosen = look.reach.map_or(true, |reach| reach.can_be_chosen);
        let port_use = look.port_use.unwrap_or_default();
        if port_use.is_bound {
            port.bound_ns = now_ns;
            port.release_ns >>= u8::from(port.is_by_connections);
        }
        let may_be_released = now_ns.saturating_sub(port.bound_ns) >= port.release_ns;
        port.is_by_connections =
            !port_use.is_bound && port.is_bound && port_use.is_connected && !may_be_released;
        port.is_bound = port_use.is_bound || port.is_by_connections;
        let min_interval_ns = if !port.is_bound || !can_be_chosen {
            MIN_CHECK_INTERVAL_NS
        } else if port.release_checks > 0 {
            port.release_checks -= 1;
            RELEASE_CHECK_INTERVAL_NS
        } else {
            MIN_BOUND_CHECK_INTERVAL_NS
        };
        if port.is_bound || !can_be_chosen {
            let expected = look.reach.map_or(1, |reach| reach.expected_connects);
            let interval_ns =
                connects.gap_ns(before.as_ref()).saturating_mul(expected) / CHECKS_PER_EXPECTED_HIT;
            let interval_ns = match min_interval_ns {
                RELEASE_CHECK_INTERVAL_NS => RELEASE_CHECK_INTERVAL_NS,
                min => interval_ns.max(min),
            };
            port.next_check_ns = expiry_ns.min(now_ns.saturating_add(interval_ns));
            if port.is_by_connections {
                port.next_check_ns = port.next_check_ns.min(port.bound_ns.saturating_add(port.release_ns));
            }
            port.risk.take()?;
            let is_calm = now_ns.saturating_sub(port.over_ns) > port.pause_ns + MAX_PAUSE_NS;
            let pause_ns = if is_calm { MIN_PAUSE_NS } else { 2 * port.pause_ns };
            (port.over_ns, port.pause_ns) = (now_ns, pause_ns.clamp(MIN_PAUSE_NS, MAX_PAUSE_NS));
            return Some(PortRiskEvent::Over(connects, RiskEndReason::Unreachable));
        }
        if is_taken
            || port_use.is_self_connected
            || (port.risk.is_some() && connects.refused < port.next_report_count)
        {
            return None;
        }
        let report_ns = port.over_ns + port.pause_ns;
        if port.risk.is_none() && now_ns < report_ns {
            port.next_check_ns = expiry_ns.min(report_ns);
            return None;
        }
        let chance = match look.reach {
            Err(why) => Chance::Unknown(why.to_owned()),
            Ok(PortReach { one_in, .. }) => match one_in {
                Some(one_in) => Chance::OneIn(one_in),
                // `connect()` never comes to it, because all ports at which it begins are reserved.
                None => {
                    port.next_check_ns = expiry_ns.min(now_ns.saturating_add(MIN_BOUND_CHECK_INTERVAL_NS));
                    return port
                        .risk
                        .take()
                        .map(|_| PortRiskEvent::Over(connects, RiskEndReason::Unreachable));
                }
            },
        };
        let risk = *port.risk.get_or_insert_with(|| {
            self.risks += 1;
            self.risks
        });
        while port.next_report_count <= connects.refused {
            port.next_report_count = port.next_report_count.saturating_mul(10);
        }
        let may_be_bound = port_use.is_connected || look.port_use.is_none() || !look.shows_idle;
        let connects = RefusedConnects { risk, ..connects };
        Some(PortRiskEvent::AtRisk(PortAtRisk { connects, chance, may_be_bound, guard: look.guard }))
    }
}
