//! The refused-connect table of the programs: counts of refused connects by destination.

use anyhow::Result;
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use selfconn_ebpf::refused_connects::{Destination, RefusedCount, WINDOW_NS};

/// The refused-connect table.
#[derive(Debug)]
pub struct RefusedCounts(HashMap<MapData, DestinationKey, RefusedCountValue>);

/// A key of the map.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct DestinationKey(Destination);

// SAFETY: integers without padding; every bit pattern is a valid value.
unsafe impl Pod for DestinationKey {}

/// A value of the map.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct RefusedCountValue(RefusedCount);

// SAFETY: integers and byte arrays without padding; every bit pattern is a valid value.
unsafe impl Pod for RefusedCountValue {}

impl RefusedCounts {
    pub(crate) fn new(map: Map) -> Result<Self> {
        Ok(Self(HashMap::try_from(map)?))
    }

    /// The refused connects to one destination. `None`: there is no entry.
    #[must_use]
    pub fn get(&self, destination: &Destination) -> Option<RefusedCount> {
        self.0.get(&DestinationKey(*destination), 0).ok().map(|value| value.0)
    }

    /// Removes the count of a destination to which no further connects are attempted.
    pub fn remove(&mut self, destination: &Destination) {
        if let Err(error) = self.0.remove(&DestinationKey(*destination)) {
            log::debug!("cannot remove the count of a destination: {error}");
        }
    }

    /// Removes the counts of all destinations without a refused connect within the window, except those for
    /// which `is_watched` is true. Walks the whole table.
    pub fn remove_expired(&mut self, now_ns: u64, is_watched: impl Fn(&Destination) -> bool) {
        let is_expired = |(key, value): &(DestinationKey, RefusedCountValue)| {
            now_ns.saturating_sub(value.0.last_ns) > WINDOW_NS && !is_watched(&key.0)
        };
        let expired: Vec<_> = self.0.iter().filter_map(Result::ok).filter(is_expired).collect();
        for (key, _) in expired {
            self.remove(&key.0);
        }
    }
}
