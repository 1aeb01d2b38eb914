//! The programs' table of dials in flight and of self-connections, by the socket.
//!
//! It is read through mmap(2), not through `bpf()`. In a call of `bpf()` about a map, programs with the shared guard do
//! not run on that CPU (`bpf_disable_instrumentation`, kernel/bpf/syscall.c at v5.10), and a kernel that preempts the
//! caller within one stays blind there for as long: thousands of calls for a walk over the table would do that often.

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
use selfconn_ebpf::{Dial, DialSet, WAYS, set_of};

/// The table: an array of `sets` values of [`selfconn_ebpf::names::DIALS`] in the byte order of this machine.
pub(super) struct Dials {
    map: MapData,
    sets: u32,
}

impl Dials {
    pub(super) fn of(map: Map) -> Result<Self> {
        let Map::Array(map) = map else { bail!("the table of dials is no array") };
        let sets = map.info()?.max_entries();
        Ok(Self { map, sets })
    }

    /// What is remembered now, by the socket. Walks the table.
    pub(super) fn all(&self) -> Result<Vec<(u64, Dial)>> {
        let view = View::of(&self.map, 0..self.sets)?;
        let mut remembered = Vec::new();
        for set in view.words().as_chunks::<{ DialSet::WORDS }>().0 {
            let (socks, _) = set.split_at(WAYS);
            if socks.iter().all(|sock| sock.load(Relaxed) == 0) {
                continue;
            }
            let DialSet { socks, dials } = DialSet::of_words(set.each_ref().map(|word| word.load(Relaxed)));
            let entries = socks.into_iter().zip(dials);
            remembered.extend(entries.filter(|(sock, dial)| *sock != 0 && dial.is_about(*sock as u32)));
        }
        Ok(remembered)
    }

    /// Forgets a socket.
    pub(super) fn forget(&mut self, sock: u64) -> Result<()> {
        let index = set_of(sock as u32, self.sets);
        let view = View::of(&self.map, index..index + 1)?;
        for other in &view.words()[..WAYS] {
            // Where a program has given the entry to a socket at another address in the meantime, it stays that one's.
            let _ = other.compare_exchange(sock, 0, Relaxed, Relaxed);
        }
        Ok(())
    }
}

/// A part of the table in this process's memory, for as long as it is looked at: all of it would be some 1.8 MiB more
/// that count as the daemon's.
struct View {
    pages: *mut c_void,
    len: usize,
    /// Where the part begins.
    skip: usize,
}

impl View {
    fn of(map: &MapData, sets: Range<u32>) -> Result<Self> {
        let [from, to] = [sets.start, sets.end].map(|set| set as usize * size_of::<DialSet>());
        let skip = from % page_size();
        let (first, len) = (from - skip, to - from + skip);
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: at an address that the kernel chooses, so over nothing of ours.
        let pages =
            unsafe { mmap(ptr::null_mut(), len, both, MapFlags::SHARED, map.fd().as_fd(), first as u64) };
        Ok(Self { pages: pages.context("the table of dials can't be mapped")?, len, skip })
    }

    /// Its words, which the programs write to at the same time.
    fn words(&self) -> &[AtomicU64] {
        let words = (self.len - self.skip) / size_of::<AtomicU64>();
        // SAFETY: as much is mapped until `self` is dropped, begins at a multiple of eight, and whoever else writes to it
        // is another thread or the kernel, word by word.
        unsafe { slice::from_raw_parts(self.pages.byte_add(self.skip).cast(), words) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: ours, mapped with this length, and no reference outlives it.
        let unmapped = unsafe { munmap(self.pages, self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
