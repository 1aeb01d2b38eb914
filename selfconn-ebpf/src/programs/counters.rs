//! The counters that user space reads.

use core::arch::asm;

use aya_ebpf::{macros::map, maps::PerCpuArray};
use selfconn_ebpf::counter;

/// One slot per constant of [`counter`].
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// Adds one to a slot.
#[inline(always)]
pub(crate) fn count(slot: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: a slot of a per-CPU array stays valid as long as the program is loaded, and is aligned.
        unsafe { add_one(counter) };
    }
}

/// Adds one in a single instruction, because another program can run between a load and a store, even on the
/// same CPU. It is inline assembly because core has no atomic addition for this target.
///
/// # Safety
///
/// The counter must be in a map value, and aligned.
#[inline(always)]
pub(crate) unsafe fn add_one(counter: *mut u64) {
    // SAFETY: the caller guarantees that the counter is valid and aligned; the instruction writes nothing
    // else.
    unsafe { asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter, one = in(reg) 1_u64) };
}
