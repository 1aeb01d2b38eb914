//! An array map of the programs, mapped into this process: words that the programs write to at the same time.
//!
//! Why not `bpf()`: see `connect_table.rs`.

use std::{ffi::c_void, io, ops::Range, os::fd::AsFd as _, ptr, slice, sync::atomic::AtomicU64};

use aya::maps::MapData;
use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    param::page_size,
};

/// A range of words. One of a large table is mapped only while it is used, because it would add its size to the
/// memory of the daemon.
#[derive(Debug)]
pub(super) struct MappedWords {
    pages: *mut c_void,
    len: usize,
    /// The offset of the first word in `pages`.
    skip: usize,
}

impl MappedWords {
    pub(super) fn of(map: &MapData, words: Range<usize>) -> io::Result<Self> {
        let [from, to] = [words.start, words.end].map(|word| word * size_of::<AtomicU64>());
        let skip = from % page_size();
        let (first, len) = (from - skip, to - from + skip);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so the mapping does not replace any existing one.
        let pages = unsafe {
            mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, map.fd().as_fd(), first as u64)
        };
        Ok(Self { pages: pages?, len, skip })
    }

    /// The words. The programs write to them at the same time.
    pub(super) fn words(&self) -> &[AtomicU64] {
        let words = (self.len - self.skip) / size_of::<AtomicU64>();
        // SAFETY: this many words are mapped until `self` is dropped, they begin at a multiple of eight, and
        // any other writer is another thread or the kernel, which writes whole words.
        unsafe { slice::from_raw_parts(self.pages.byte_add(self.skip).cast(), words) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: `self` owns this mapping of this length, and no reference to it outlives `self`.
        let unmapped = unsafe { munmap(self.pages, self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
