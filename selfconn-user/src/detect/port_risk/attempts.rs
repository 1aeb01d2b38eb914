//! The refused attempts to connect to one port: how many, how often, and when one is expected to connect to itself.

use selfconn_ebpf::{Endpoint, Opener, Owner, refused_connects::RefusedCount};

use super::{Chance, PortChoices, SECOND_NS};

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
    /// The ranges from which `connect()` chooses.
    pub choices: PortChoices,
}

impl RefusedConnects {
    /// Converts a count of the probes.
    #[must_use]
    pub fn new(destination: &Endpoint, count: &RefusedCount) -> Self {
        Self {
            endpoint: *destination,
            newest: count.last_opener,
            owner: count.owner,
            last_ns: count.last_ns,
            risk: 0,
            dialers: count.pid_count(),
            refused: count.refused(),
            window_ns: count.last_ns.saturating_sub(count.window_start_ns),
            choices: PortChoices::of(count),
        }
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
