//! The connect table of the programs: connection attempts in progress and self-connections, keyed by the
//! address of the socket.
//!
//! It is read through mmap(2), not through `bpf()`. During a map operation of `bpf()`, programs with a
//! per-CPU recursion guard do not run on that CPU (`bpf_disable_instrumentation`, kernel/bpf/syscall.c at
//! v5.10). If the kernel preempts the caller during the operation, these programs miss transitions on that
//! CPU until the caller runs again. A walk over the table needs thousands of such operations, so this would
//! happen often.

use std::{ops::Range, sync::atomic::Ordering::Relaxed};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData};
use selfconn_ebpf::{ConnectEntry, ConnectSet, WAYS, set_index};

use super::mapped::MappedWords;

/// The connect table: an array of `sets` values of the map, in the byte order of this machine.
pub(crate) struct ConnectTable {
    map: MapData,
    sets: u32,
}

impl ConnectTable {
    pub(crate) fn new(map: Map) -> Result<Self> {
        let Map::Array(map) = map else { bail!("the connect table is not an array") };
        let sets = map.info()?.max_entries();
        Ok(Self { map, sets })
    }

    /// All valid entries, each with the address of its socket. Walks the whole table.
    pub(crate) fn entries(&self) -> Result<Vec<(u64, ConnectEntry)>> {
        let view = self.map_sets(0..self.sets)?;
        let mut valid = Vec::new();
        for set in view.words().as_chunks::<{ ConnectSet::WORDS }>().0 {
            let (socks, _) = set.split_at(WAYS);
            if socks.iter().all(|sock| sock.load(Relaxed) == 0) {
                continue;
            }
            let ConnectSet { socks, entries } =
                ConnectSet::from_words(set.each_ref().map(|word| word.load(Relaxed)));
            let slots = socks.into_iter().zip(entries);
            valid.extend(slots.filter(|(sock, entry)| *sock != 0 && entry.is_valid_for(*sock as u32)));
        }
        Ok(valid)
    }

    /// Removes the entry of a socket whose connect was at this time. An entry of a later socket at the same kernel
    /// address stays.
    pub(crate) fn remove(&mut self, sock: u64, at_ns: u64) -> Result<()> {
        let index = set_index(sock as u32, self.sets);
        let view = self.map_sets(index..index + 1)?;
        let Some(set) = view.words().first_chunk::<{ ConnectSet::WORDS }>() else { return Ok(()) };
        let ConnectSet { socks, entries } =
            ConnectSet::from_words(set.each_ref().map(|word| word.load(Relaxed)));
        for ((slot, known), entry) in set.iter().zip(socks).zip(entries) {
            if known == sock && entry.opener.at_ns == at_ns {
                // If a program has reused the slot for another socket in the meantime, the slot does not change.
                let _ = slot.compare_exchange(sock, 0, Relaxed, Relaxed);
            }
        }
        Ok(())
    }

    fn map_sets(&self, sets: Range<u32>) -> Result<MappedWords> {
        let [from, to] = [sets.start, sets.end].map(|set| set as usize * ConnectSet::WORDS);
        MappedWords::of(&self.map, from..to).context("the connect table cannot be mapped")
    }
}
