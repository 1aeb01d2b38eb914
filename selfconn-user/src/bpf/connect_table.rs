//! The connect table of the programs: connection attempts in progress and self-connections, keyed by the
//! address of the socket.
//!
//! It is read through mmap(2), not through `bpf()`. During a map operation of `bpf()`, programs with a
//! per-CPU recursion guard do not run on that CPU (`bpf_disable_instrumentation`, kernel/bpf/syscall.c at
//! v5.10). If the kernel preempts the caller during the operation, these programs miss transitions on that
//! CPU until the caller runs again. A walk over the table needs thousands of such operations, so this would
//! happen often.

use std::{
    ffi::c_void,
    ops::Range,
    os::fd::AsFd as _,
    ptr, slice,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData};
use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    param::page_size,
};
use selfconn_ebpf::{ConnectEntry, ConnectSet, WAYS, set_index};

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
        let view = MappedSets::of(&self.map, 0..self.sets)?;
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

    /// Removes the entry of a socket.
    pub(crate) fn remove(&mut self, sock: u64) -> Result<()> {
        let index = set_index(sock as u32, self.sets);
        let view = MappedSets::of(&self.map, index..index + 1)?;
        for slot in &view.words()[..WAYS] {
            // If a program has reused the slot for another socket in the meantime, the slot does not change.
            let _ = slot.compare_exchange(sock, 0, Relaxed, Relaxed);
        }
        Ok(())
    }
}

/// A range of sets mapped into this process. It is mapped only while it is read, because a mapping of the
/// whole table would add about 1.8 MiB to the memory of the daemon.
struct MappedSets {
    pages: *mut c_void,
    len: usize,
    /// The offset of the first set in `pages`.
    skip: usize,
}

impl MappedSets {
    fn of(map: &MapData, sets: Range<u32>) -> Result<Self> {
        let [from, to] = [sets.start, sets.end].map(|set| set as usize * size_of::<ConnectSet>());
        let skip = from % page_size();
        let (first, len) = (from - skip, to - from + skip);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so the mapping does not replace any existing one.
        let pages = unsafe {
            mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, map.fd().as_fd(), first as u64)
        };
        Ok(Self { pages: pages.context("the connect table cannot be mapped")?, len, skip })
    }

    /// The words of the sets. The programs write to them at the same time.
    fn words(&self) -> &[AtomicU64] {
        let words = (self.len - self.skip) / size_of::<AtomicU64>();
        // SAFETY: this many words are mapped until `self` is dropped, they begin at a multiple of eight, and
        // any other writer is another thread or the kernel, which writes whole words.
        unsafe { slice::from_raw_parts(self.pages.byte_add(self.skip).cast(), words) }
    }
}

impl Drop for MappedSets {
    fn drop(&mut self) {
        // SAFETY: `self` owns this mapping of this length, and no reference to it outlives `self`.
        let unmapped = unsafe { munmap(self.pages, self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
