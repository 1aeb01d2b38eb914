//! The ports whose listeners the daemon waits for, as the programs know them.

use std::{collections::HashSet, io, sync::atomic::Ordering::Relaxed};

use anyhow::{Result, bail};
use aya::maps::{Map, MapData};
use selfconn_ebpf::{Endpoint, PORT_SLOTS, port_slot};

use super::mapped::MappedWords;

/// The map of the programs.
pub(crate) struct WatchedPorts(MapData);

impl WatchedPorts {
    pub(crate) fn new(map: Map) -> Result<Self> {
        match map {
            Map::Array(map) => Ok(Self(map)),
            _ => bail!("the table of watched ports is not an array"),
        }
    }

    /// Sets the slots of these ports, and clears all others.
    pub(crate) fn update<'a>(&self, watched: impl Iterator<Item = &'a Endpoint>) -> io::Result<()> {
        let watched: HashSet<u32> = watched.map(port_slot).collect();
        let mapped = MappedWords::of(&self.0, 0..PORT_SLOTS as usize)?;
        for (slot, word) in (0..).zip(mapped.words()) {
            word.store(watched.contains(&slot).into(), Relaxed);
        }
        Ok(())
    }
}
