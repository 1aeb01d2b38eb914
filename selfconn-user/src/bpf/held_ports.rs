//! The ports that self-connections hold, as the programs know them: they report a failed bind only of such a port.

use std::{collections::HashSet, io, sync::atomic::Ordering::Relaxed};

use anyhow::{Result, bail};
use aya::maps::{Map, MapData};
use selfconn_ebpf::{ANY_HELD_PORT_SLOT, Endpoint, held_port_slot};

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

    /// Sets the slots of these endpoints, and clears all others that were set before `before_ns`. Sockets of the
    /// endpoints exist, or are in TIME_WAIT. `are_all`: no other self-connection exists; else nothing is cleared.
    pub(crate) fn update<'a>(
        &self,
        held: impl Iterator<Item = &'a Endpoint>,
        before_ns: u64,
        are_all: bool,
    ) -> io::Result<()> {
        let mut held: HashSet<u32> = held.map(held_port_slot).collect();
        if !held.is_empty() {
            held.insert(ANY_HELD_PORT_SLOT);
        }
        let mapped = MappedWords::of(&self.0, 0..ANY_HELD_PORT_SLOT as usize + 1)?;
        for (slot, word) in (0..).zip(mapped.words()) {
            let since_ns = word.load(Relaxed);
            let value = match held.contains(&slot) {
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
