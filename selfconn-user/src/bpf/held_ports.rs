//! The ports that self-connections hold, as the programs know them: they report a failed bind only of such a port.

use std::{io, sync::atomic::Ordering::Relaxed};

use anyhow::{Result, bail};
use aya::maps::{Map, MapData};
use selfconn_ebpf::ANY_HELD_PORT_SLOT;

use super::mapped::MappedWords;

/// The map of the programs. They set a slot when a self-connection is established.
pub(crate) struct HeldPorts(MapData);

impl HeldPorts {
    pub(crate) fn new(map: Map) -> Result<Self> {
        match map {
            Map::Array(map) => Ok(Self(map)),
            _ => bail!("the table of held ports is not an array"),
        }
    }

    /// Sets these slots, and clears all others that were set before `before_ns`: no self-connection, and none in
    /// TIME_WAIT, needs them. `are_all`: the slots are all that may be needed; else nothing is cleared.
    pub(crate) fn update(
        &self,
        needed: impl Iterator<Item = u32>,
        before_ns: u64,
        are_all: bool,
    ) -> io::Result<()> {
        let mut is_needed = vec![false; ANY_HELD_PORT_SLOT as usize + 1];
        for slot in needed {
            is_needed[slot as usize] = true;
            is_needed[ANY_HELD_PORT_SLOT as usize] = true;
        }
        let mapped = MappedWords::of(&self.0, 0..ANY_HELD_PORT_SLOT as usize + 1)?;
        for (is_needed, word) in is_needed.into_iter().zip(mapped.words()) {
            let since_ns = word.load(Relaxed);
            let value = match is_needed {
                true => before_ns.max(1),
                false if are_all => 0,
                false => continue,
            };
            // A slot that a program sets at the same time keeps its value.
            if since_ns < before_ns && since_ns != value {
                let _ = word.compare_exchange(since_ns, value, Relaxed, Relaxed);
            }
        }
        Ok(())
    }
}
