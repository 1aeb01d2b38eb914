//! Refused dials of an address to itself, counted by namespace, address and port.

use aya_ebpf::{EbpfContext, helpers::generated::bpf_ktime_get_boot_ns, macros::map, maps::HashMap};
use aya_log_ebpf::warn;
use selfconn_ebpf::{
    Opener, Tuple, counter,
    risk::{Tally, Target},
};

use crate::report;

/// A plain hash, not an LRU: user space ends an entry after a minute of silence. What finds no room is counted. The
/// loader may set its size.
#[map]
static REFUSALS: HashMap<Target, Tally> = HashMap::with_max_entries(4_096, 0);

/// In `.rodata`, for it would not fit on the stack.
static NONE: Tally = Tally::NONE;

/// Counts one, and tells user space if there were many.
#[inline(always)]
pub(crate) fn count<C: EbpfContext>(ctx: &C, tuple: &Tuple, dialler: &Opener) {
    report::count(counter::REFUSED);
    let target = Target::of(tuple);
    let found = REFUSALS.get_ptr_mut(&target).or_else(|| {
        /// Not if another CPU was faster: `include/uapi/linux/bpf.h`.
        const BPF_NOEXIST: u64 = 1;
        let _ = REFUSALS.insert(&target, &NONE, BPF_NOEXIST);
        REFUSALS.get_ptr_mut(&target)
    });
    let Some(tally) = found else {
        report::count(counter::NOT_TALLIED);
        warn!(ctx, "the table of refused dials is full: one to port {} was not tallied", target.port);
        return;
    };
    // SAFETY: a value of a map, which stays memory of the map even if user space ends the entry meanwhile.
    unsafe { report::add_one(&raw mut (*tally).total) };
    // SAFETY: as above; what another CPU may write meanwhile is said at `Tally`.
    let tally = unsafe { &mut *tally };
    // SAFETY: no arguments.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    // Volatile, for the compiler doesn't know what the instruction above added to.
    // SAFETY: a live reference.
    let total = unsafe { core::ptr::read_volatile(&raw const tally.total) };
    if tally.take(total, now_ns, dialler) {
        if report::tell(&target) {
            tally.told();
        } else {
            tally.not_told(now_ns);
        }
    }
}
