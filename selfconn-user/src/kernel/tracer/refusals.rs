//! The programs' table of refused dials, by the port that is dialled.

use anyhow::Result;
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use selfconn_ebpf::risk::{Tally, Target, WINDOW_NS};

/// The table.
#[derive(Debug)]
pub struct Refusals(HashMap<MapData, Key, Value>);

/// A key of [`selfconn_ebpf::names::REFUSALS`].
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Key(Target);

// SAFETY: integers without padding, for which every bit pattern is a value.
unsafe impl Pod for Key {}

/// A value of it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Value(Tally);

// SAFETY: integers and byte arrays without padding, for which every bit pattern is a value.
unsafe impl Pod for Value {}

impl Refusals {
    pub(super) fn of(map: Map) -> Result<Self> {
        Ok(Self(HashMap::try_from(map)?))
    }

    /// The refused dials of one port. `None`: there were none lately.
    #[must_use]
    pub fn get(&self, target: &Target) -> Option<Tally> {
        self.0.get(&Key(*target), 0).ok().map(|value| value.0)
    }

    /// Ends the count of a port that nobody dials any more.
    pub fn forget(&mut self, target: &Target) {
        if let Err(error) = self.0.remove(&Key(*target)) {
            log::debug!("the count of a port could not be ended: {error}");
        }
    }

    /// Ends the counts of all ports that nobody dials any more, but for those that `is_watched`. Walks the table.
    pub fn sweep(&mut self, now_ns: u64, is_watched: impl Fn(&Target) -> bool) {
        let is_over = |(key, value): &(Key, Value)| {
            now_ns.saturating_sub(value.0.last_ns) > WINDOW_NS && !is_watched(&key.0)
        };
        let over: Vec<_> = self.0.iter().filter_map(Result::ok).filter(is_over).collect();
        for (key, _) in over {
            self.forget(&key.0);
        }
    }
}
