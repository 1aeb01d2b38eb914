//! How `connect()` comes to a port, in a network namespace with certain settings. A user can make that expensive in a
//! namespace of his own, by a wide range and many reserved ports. So the worker that reads the settings computes it, and
//! the event loop has the results only.

use selfconn_ebpf::refused_connects::{RefusedCount, WINDOW_NS};

use crate::{
    ports::{LocalPorts, Odds, PortRange, Reach},
    sockets::PortUse,
};

/// The ranges from which `connect()` chooses the source port of the attempts at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortChoices {
    /// The port range of the newest socket that had one of its own (`IP_LOCAL_PORT_RANGE`), if that was within the last
    /// minute before the newest attempt.
    pub own_range: Option<PortRange>,
    /// True if an attempt within that minute took its port from the range of its namespace.
    pub uses_netns_range: bool,
}

/// How `connect()` comes to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortReach {
    pub(super) choices: PortChoices,
    /// True if `connect()` can choose the port as source port.
    pub(super) can_be_chosen: bool,
    /// The mean number of attempts until `connect()` chooses a certain port that it could choose. At least 1.
    pub(super) expected_connects: u64,
    /// Mean number of attempts until `connect()` chooses the port: the least, if the attempts choose from different
    /// ranges. `None`: it never chooses that port, or a socket has it.
    pub(super) one_in: Option<u32>,
}

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
pub struct OddsCache(Option<(LocalPorts, Odds)>);

impl OddsCache {
    fn of(&mut self, ports: &LocalPorts) -> &Odds {
        if self.0.as_ref().is_some_and(|(known, _)| known != ports) {
            self.0 = None;
        }
        &self.0.get_or_insert_with(|| (ports.clone(), Odds::of(ports))).1
    }
}

impl PortChoices {
    /// Converts a count of the probes.
    #[must_use]
    pub fn of(count: &RefusedCount) -> Self {
        let is_recent = |at_ns: u64| at_ns != 0 && count.last_ns.saturating_sub(at_ns) <= WINDOW_NS;
        let own_range =
            PortRange { low: (count.own_range & 0xffff) as u16, high: (count.own_range >> 16) as u16 };
        Self {
            own_range: is_recent(count.own_range_ns).then_some(own_range),
            uses_netns_range: is_recent(count.netns_range_ns),
        }
    }

    /// The ports that `connect()` chooses from, in a namespace that has `ports`.
    fn among(self, ports: &LocalPorts) -> impl Iterator<Item = LocalPorts> {
        let shared = self.uses_netns_range.then(|| ports.clone());
        shared.into_iter().chain(self.own_range.map(|own| ports.for_socket(own)))
    }
}

impl PortReach {
    /// How `connect()` with these choices comes to `port`, in a namespace that has `ports`. `port_use`: what has the
    /// port there. `None`: unknown.
    #[must_use]
    pub fn of(
        choices: PortChoices,
        ports: &LocalPorts,
        port: u16,
        port_use: Option<PortUse>,
        odds: &mut OddsCache,
    ) -> Self {
        let among = || choices.among(ports);
        let least = among().map(|ports| ports.expected_connects()).min();
        let can_choose = |ports: &LocalPorts| can_choose(ports, port);
        let is_taken = port_use.is_some_and(|port_use| port_use.is_bound || port_use.is_self_connected);
        // The odds of a port that is not reported are not computed.
        let one_in = among()
            .filter(|ports| !is_taken && can_choose(ports))
            .filter_map(|ports| odds.of(&ports).expected_connects(port))
            .min();
        Self {
            choices,
            can_be_chosen: among().any(|ports| can_choose(&ports)),
            expected_connects: least.map_or(1, |least| u64::from(least).max(1)),
            one_in,
        }
    }
}
