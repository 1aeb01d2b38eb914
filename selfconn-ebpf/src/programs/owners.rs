//! What each owner lost because its share of a table was full.

use aya_ebpf::{macros::map, maps::LruHashMap};
use selfconn_ebpf::{Owner, owner::OwnerLosses};

use super::counters::add_one;

/// An LRU, because the totals are in the counters: an evicted entry only leaves a part of a total without an owner.
#[map]
static OWNERS: LruHashMap<Owner, OwnerLosses> = LruHashMap::with_max_entries(1_024, 0);

/// The initial value of an entry.
static ZERO: OwnerLosses = OwnerLosses::ZERO;

/// Adds one to a count of this owner.
#[inline(always)]
pub(crate) fn count_loss(owner: &Owner, select: impl Fn(*mut OwnerLosses) -> *mut u64) {
    let losses = OWNERS.get_ptr_mut(owner).or_else(|| {
        /// Do not overwrite an entry that another CPU has just inserted: `include/uapi/linux/bpf.h`.
        const BPF_NOEXIST: u64 = 1;
        let _ = OWNERS.insert(owner, &ZERO, BPF_NOEXIST);
        OWNERS.get_ptr_mut(owner)
    });
    if let Some(losses) = losses {
        // SAFETY: the memory belongs to the map, also if the entry is evicted at the same time.
        unsafe { add_one(select(losses)) };
    }
}
