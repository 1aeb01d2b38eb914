//! What each owner has used and lost.

use aya_ebpf::{macros::map, maps::LruHashMap};
use selfconn_ebpf::{
    Owner,
    owner::{CGROUP_RATE_FACTOR, OwnerState, USER_RATE_FACTOR},
};

use super::counters::add_one;

/// An LRU, because the totals are in the counters: an evicted entry only leaves a part of a total without an owner.
#[map]
static OWNERS: LruHashMap<Owner, OwnerState> = LruHashMap::with_max_entries(1_024, 0);

/// The initial value of an entry.
static ZERO: OwnerState = OwnerState::ZERO;

/// The state of an owner. `None`: the kernel has no memory for it.
#[inline(always)]
pub(crate) fn state(owner: &Owner) -> Option<*mut OwnerState> {
    OWNERS.get_ptr_mut(owner).or_else(|| {
        /// Do not overwrite an entry that another CPU has just inserted: `include/uapi/linux/bpf.h`.
        const BPF_NOEXIST: u64 = 1;
        let _ = OWNERS.insert(owner, &ZERO, BPF_NOEXIST);
        OWNERS.get_ptr_mut(owner)
    })
}

/// Adds one to a count of this owner.
#[inline(always)]
pub(crate) fn count_loss(owner: &Owner, select: impl Fn(*mut OwnerState) -> *mut u64) {
    if let Some(state) = state(owner) {
        // SAFETY: the memory belongs to the map, also if the entry is evicted at the same time.
        unsafe { add_one(select(state)) };
    }
}

/// True if `admit` takes one more of this owner, of its user in all control groups, and of all users of its control
/// group, which have the rates of [`USER_RATE_FACTOR`] and [`CGROUP_RATE_FACTOR`] owners.
#[inline(always)]
pub(crate) fn admits(owner: &Owner, admit: impl Fn(&mut OwnerState, u64) -> bool) -> bool {
    let is_admitted = |owner: &Owner, users| {
        // SAFETY: the pointer is to a value of the map, whose memory belongs to the map if the entry is evicted.
        state(owner).is_none_or(|state| admit(unsafe { &mut *state }, users))
    };
    is_admitted(owner, 1)
        && owner.everywhere().is_none_or(|user| is_admitted(&user, USER_RATE_FACTOR))
        && is_admitted(&owner.everybody(), CGROUP_RATE_FACTOR)
}
