//! The refused-connect table of the programs: counts of refused connects by destination.
//!
//! A look-up by `bpf()` can cost transitions (see `connect_table.rs`), so a connection asks for its count only if a
//! connect to its port was refused, which an array of the programs says without a system call.

use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Result, bail};
use aya::maps::{HashMap, Map, MapData};
use selfconn_ebpf::{
    Endpoint, Owner, PORT_SLOTS, port_slot,
    refused_connects::{RefusedCount, WINDOW_NS, payers},
};

use super::{mapped::MappedWords, plain::Plain};

/// The refused-connect table.
#[derive(Debug)]
pub struct RefusedCounts {
    counts: HashMap<MapData, Plain<Endpoint>, Plain<RefusedCount>>,
    /// Number of entries by [payer](payers).
    shares: HashMap<MapData, Plain<Owner>, u64>,
    /// When a connect was last refused at a port, by [`port_slot`].
    refused_at: MappedWords,
}

impl RefusedCounts {
    pub(crate) fn new(counts: Map, shares: Map, refused_at: Map) -> Result<Self> {
        let Map::Array(refused_at) = refused_at else { bail!("the table of refused ports is not an array") };
        Ok(Self {
            counts: HashMap::try_from(counts)?,
            shares: HashMap::try_from(shares)?,
            refused_at: MappedWords::of(&refused_at, 0..PORT_SLOTS as usize)?,
        })
    }

    /// The refused connects to one destination. `None`: there is no entry.
    #[must_use]
    pub fn get(&self, destination: &Endpoint) -> Option<RefusedCount> {
        self.counts.get(&Plain(*destination), 0).ok().map(|value| value.0)
    }

    /// How many connects to this destination, of either family, were refused since its entry was made.
    #[must_use]
    pub fn total(&self, destination: &Endpoint) -> u64 {
        self.get(&destination.any_family()).map_or(0, |refused| refused.total)
    }

    /// True if [`Self::total`] may not be 0. Without a system call. `now_ns`: `CLOCK_BOOTTIME`.
    #[must_use]
    pub fn may_have(&self, destination: &Endpoint, now_ns: u64) -> bool {
        let slot = port_slot(&destination.any_family()) as usize;
        let last_ns = self.refused_at.words()[slot].load(Relaxed);
        last_ns != 0 && now_ns.saturating_sub(last_ns) <= WINDOW_NS
    }

    /// All counts with their destinations. Walks the whole table.
    pub fn entries(&self) -> impl Iterator<Item = (Endpoint, RefusedCount)> {
        self.counts.iter().filter_map(Result::ok).map(|(key, value)| (key.0, value.0))
    }

    /// Removes the count of a destination to which no further connects are attempted.
    pub fn remove(&mut self, destination: &Endpoint) {
        if let Err(error) = self.counts.remove(&Plain(*destination)) {
            log::debug!("cannot remove the count of a destination: {error}");
        }
    }

    /// Removes the counts of all destinations without a refused connect within the window, except those for
    /// which `is_watched` is true. Walks the whole table.
    pub fn remove_expired(&mut self, now_ns: u64, is_watched: impl Fn(&Endpoint) -> bool) {
        self.remove_where(|destination, refused| {
            now_ns.saturating_sub(refused.last_ns) > WINDOW_NS && !is_watched(destination)
        });
        self.count_shares();
    }

    /// Removes the counts for which `matches` is true, and returns them. Walks the whole table.
    pub fn remove_where(
        &mut self,
        matches: impl Fn(&Endpoint, &RefusedCount) -> bool,
    ) -> Vec<(Endpoint, RefusedCount)> {
        let removed: Vec<_> = self.entries().filter(|(at, refused)| matches(at, refused)).collect();
        for (destination, _) in &removed {
            self.remove(destination);
        }
        removed
    }

    /// Counts the entries of each owner, because entries were removed. An entry that a program inserts at the same time
    /// may be missing until the next count.
    fn count_shares(&mut self) {
        let mut used: std::collections::HashMap<Owner, u64> =
            self.shares.keys().filter_map(Result::ok).map(|owner| (owner.0, 0)).collect();
        for (_, refused) in self.entries() {
            for owner in payers(refused.owner) {
                *used.entry(owner).or_default() += 1;
            }
        }
        for (owner, count) in used {
            let outcome = match count {
                0 => self.shares.remove(&Plain(owner)),
                _ => self.shares.insert(Plain(owner), count, 0),
            };
            if let Err(error) = outcome {
                log::debug!("cannot set the share of an owner: {error}");
            }
        }
    }
}
