//! What each owner has lost, as the programs count it.

use anyhow::Result;
use aya::maps::{HashMap, Map, MapData};
use selfconn_ebpf::{Owner, owner::OwnerState};

use super::plain::Plain;

/// The map of the programs.
#[derive(Debug)]
pub(crate) struct Owners(HashMap<MapData, Plain<Owner>, Plain<OwnerState>>);

impl Owners {
    pub(crate) fn new(map: Map) -> Result<Self> {
        Ok(Self(HashMap::try_from(map)?))
    }

    /// The owners that have lost anything since the programs were loaded. The kernel may have dropped owners that were
    /// not counted for long.
    pub(crate) fn with_losses(&self) -> impl Iterator<Item = (Owner, OwnerState)> {
        let has_losses = |state: &OwnerState| {
            state.lost_openers > 0 || state.lost_refused_connects > 0 || state.lost_bind_failures > 0
        };
        let entries = self.0.iter().filter_map(Result::ok).map(|(owner, state)| (owner.0, state.0));
        entries.filter(move |(_, state)| has_losses(state))
    }
}
