//! The refused attempts to connect to one port: how many, how often, and when one is expected to connect to itself.

use selfconn_ebpf::{
    Endpoint, Opener, Owner,
    refused_connects::{RefusedCount, WINDOW_NS},
};

use super::{Chance, SECOND_NS};
use crate::ports::{LocalPorts, Odds, PortRange, Reach};

/// True if `connect()` chooses this port from these.
fn can_choose(ports: &LocalPorts, port: u16) -> bool {
    match ports.reach(port) {
        Reach::First => true,
        // `connect()` chooses these ports only if every port of the preferred parity is reserved.
        Reach::Last => ports.expected_connects() == 0,
        Reach::Reserved | Reach::Outside => false,
    }
}

/// The odds of the ports that were asked for last: most namespaces of a host have the same ports, and to compute the
/// odds simulates the kernel's walk over them.
#[derive(Debug, Default)]
pub(super) struct OddsCache(Option<(LocalPorts, Odds)>);

impl OddsCache {
    fn of(&mut self, ports: &LocalPorts) -> &Odds {
        if self.0.as_ref().is_some_and(|(known, _)| known != ports) {
            self.0 = None;
        }
        &self.0.get_or_insert_with(|| (ports.clone(), Odds::of(ports))).1
    }
}

/// Refused connection attempts to one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedConnects {
    /// The destination, for sockets of either family. Namespace 0: this kernel has no namespaces.
    pub endpoint: Endpoint,
    /// The task that made the newest attempt.
    pub newest: Opener,
    /// Whose entry of the programs' table it is: who made the first attempt.
    pub owner: Owner,
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
    /// The port range of the newest socket that had one of its own (`IP_LOCAL_PORT_RANGE`), if that was within the last
    /// minute before the newest attempt.
    pub own_range: Option<PortRange>,
    /// True if an attempt within that minute took its port from the range of its namespace.
    pub uses_netns_range: bool,
}

impl RefusedConnects {
    /// Converts a count of the probes.
    #[must_use]
    pub fn new(destination: &Endpoint, count: &RefusedCount) -> Self {
        let is_recent = |at_ns: u64| at_ns != 0 && count.last_ns.saturating_sub(at_ns) <= WINDOW_NS;
        let own_range =
            PortRange { low: (count.own_range & 0xffff) as u16, high: (count.own_range >> 16) as u16 };
        Self {
            endpoint: *destination,
            newest: count.last_opener,
            owner: count.owner,
            last_ns: count.last_ns,
            risk: 0,
            dialers: count.pid_count(),
            refused: count.refused(),
            window_ns: count.last_ns.saturating_sub(count.window_start_ns),
            own_range: is_recent(count.own_range_ns).then_some(own_range),
            uses_netns_range: is_recent(count.netns_range_ns),
        }
    }

    /// The ports that `connect()` chooses from for these attempts, in a namespace that has `ports`.
    fn choices(&self, ports: &LocalPorts) -> impl Iterator<Item = LocalPorts> {
        let shared = self.uses_netns_range.then(|| ports.clone());
        shared.into_iter().chain(self.own_range.map(|own| ports.for_socket(own)))
    }

    /// True if `connect()` can choose the destination port as source port.
    pub(super) fn can_be_chosen(&self, ports: &LocalPorts) -> bool {
        self.choices(ports).any(|ports| can_choose(&ports, self.endpoint.port))
    }

    /// Probability that `connect()` chooses the destination port as source port; the highest, if the attempts choose
    /// from different ranges. `None`: it never chooses that port.
    pub(super) fn chance(&self, ports: &LocalPorts, odds: &mut OddsCache) -> Option<Chance> {
        let port = self.endpoint.port;
        let choices = self.choices(ports).filter(|ports| can_choose(ports, port));
        choices.filter_map(|ports| odds.of(&ports).expected_connects(port)).min().map(Chance::OneIn)
    }

    /// The mean number of attempts until `connect()` chooses a certain port that it could choose. At least 1.
    pub(super) fn expected_connects(&self, ports: &LocalPorts) -> u64 {
        self.choices(ports)
            .map(|ports| ports.expected_connects())
            .min()
            .map_or(1, |least| u64::from(least).max(1))
    }

    /// Mean time between two attempts: of all attempts, or of the attempts since `before` if that is less.
    pub(super) fn gap_ns(&self, before: Option<&Self>) -> u64 {
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
