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
            if let Some(value) = new_value(since_ns, before_ns, is_needed, are_all) {
                // A slot that a program sets at the same time keeps its value.
                let _ = word.compare_exchange(since_ns, value, Relaxed, Relaxed);
            }
        }
        Ok(())
    }
}

/// What a slot that has this value gets. `None`: it stays.
fn new_value(since_ns: u64, before_ns: u64, is_needed: bool, are_all: bool) -> Option<u64> {
    let value = match is_needed {
        true => before_ns.max(1),
        false if are_all => 0,
        false => return None,
    };
    (since_ns < before_ns && since_ns != value).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_nothing_needs_is_cleared_unless_it_was_set_since_or_something_is_unknown() {
        // (set at, needed, all are known, new value), at 100.
        for (since_ns, is_needed, are_all, value) in [
            (50, false, true, Some(0)),
            (50, false, false, None),
            (100, false, true, None),
            (150, false, true, None),
            (0, false, true, None),
            (0, true, true, Some(100)),
            (0, true, false, Some(100)),
            (50, true, true, Some(100)),
            (150, true, true, None),
        ] {
            assert_eq!(
                new_value(since_ns, 100, is_needed, are_all),
                value,
                "{since_ns} {is_needed} {are_all}"
            );
        }
    }
}
