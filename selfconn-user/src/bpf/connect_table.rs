//! The connect table of the programs: connection attempts in progress and self-connections, keyed by the
//! address of the socket.
//!
//! It is read through mmap(2), not through `bpf()`. During a map operation of `bpf()`, programs with a
//! per-CPU recursion guard do not run on that CPU (`bpf_disable_instrumentation`, kernel/bpf/syscall.c at
//! v5.10). If the kernel preempts the caller during the operation, these programs miss transitions on that
//! CPU until the caller runs again. A walk over the table needs thousands of such operations, so this would
//! happen often.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData};
use selfconn_ebpf::{ConnectEntry, ConnectSet, WAYS};

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

    /// Calls `each` for each valid entry, with the address of its socket. Walks the whole table, and copies one set at
    /// a time, because the table has megabytes.
    pub(crate) fn for_each(&self, mut each: impl FnMut(u64, &ConnectEntry)) -> Result<()> {
        self.retain(|sock, entry| {
            each(sock, entry);
            true
        })
    }

    /// As [`Self::for_each`], and removes the entries for which `keep` returns false.
    pub(crate) fn retain(&self, mut keep: impl FnMut(u64, &ConnectEntry) -> bool) -> Result<()> {
        let view = self.map_sets(0..self.sets)?;
        for set in view.words().as_chunks::<{ ConnectSet::WORDS }>().0 {
            if set.iter().take(WAYS).all(|sock| sock.load(Relaxed) == 0) {
                continue;
            }
            let ConnectSet { socks, entries } = read(set);
            for (at, (sock, entry)) in socks.iter().zip(&entries).enumerate() {
                if *sock != 0 && entry.is_valid_for(*sock as u32) && !keep(*sock, entry) {
                    remove(set, at, *sock, entry.opener.at_ns);
                }
            }
        }
        Ok(())
    }

    fn map_sets(&self, sets: Range<u32>) -> Result<MappedWords> {
        let [from, to] = [sets.start, sets.end].map(|set| set as usize * ConnectSet::WORDS);
        MappedWords::of(&self.map, from..to).context("the connect table cannot be mapped")
    }
}

fn read(set: &[AtomicU64; ConnectSet::WORDS]) -> ConnectSet {
    ConnectSet::from_words(set.each_ref().map(|word| word.load(Relaxed)))
}

/// Removes the entry of a socket whose connect was at this time. An entry of a later socket at the same kernel address
/// stays.
fn remove(set: &[AtomicU64; ConnectSet::WORDS], at: usize, sock: u64, at_ns: u64) {
    let now = read(set);
    if now.entries[at].opener.at_ns == at_ns {
        // If a program has reused the slot for another socket in the meantime, the slot does not change.
        let _ = set[at].compare_exchange(sock, 0, Relaxed, Relaxed);
    }
}
