//! The refused-connect table of the programs: counts of refused connects by destination.

use anyhow::Result;
use aya::maps::{HashMap, Map, MapData};
use selfconn_ebpf::{
    Endpoint,
    refused_connects::{RefusedCount, WINDOW_NS},
};

use super::plain::Plain;

/// The refused-connect table.
#[derive(Debug)]
pub struct RefusedCounts(HashMap<MapData, Plain<Endpoint>, Plain<RefusedCount>>);

impl RefusedCounts {
    pub(crate) fn new(map: Map) -> Result<Self> {
        Ok(Self(HashMap::try_from(map)?))
    }

    /// The refused connects to one destination. `None`: there is no entry.
    #[must_use]
    pub fn get(&self, destination: &Endpoint) -> Option<RefusedCount> {
        self.0.get(&Plain(*destination), 0).ok().map(|value| value.0)
    }

    /// All counts with their destinations. Walks the whole table.
    pub fn entries(&self) -> impl Iterator<Item = (Endpoint, RefusedCount)> {
        self.0.iter().filter_map(Result::ok).map(|(key, value)| (key.0, value.0))
    }

    /// Removes the count of a destination to which no further connects are attempted.
    pub fn remove(&mut self, destination: &Endpoint) {
        if let Err(error) = self.0.remove(&Plain(*destination)) {
            log::debug!("cannot remove the count of a destination: {error}");
        }
    }

    /// Removes the counts of all destinations without a refused connect within the window, except those for
    /// which `is_watched` is true. Walks the whole table.
    pub fn remove_expired(&mut self, now_ns: u64, is_watched: impl Fn(&Endpoint) -> bool) {
        let is_expired = |(destination, refused): &(Endpoint, RefusedCount)| {
            now_ns.saturating_sub(refused.last_ns) > WINDOW_NS && !is_watched(destination)
        };
        let expired: Vec<_> = self.entries().filter(is_expired).map(|(destination, _)| destination).collect();
        for destination in expired {
            self.remove(&destination);
        }
    }
}
