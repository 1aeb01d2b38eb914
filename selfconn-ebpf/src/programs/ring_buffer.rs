//! The ring buffer to user space, and the counters, which also say how many records and entries did not fit.

use core::arch::asm;

use aya_ebpf::{
    EbpfContext, Global,
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{PerCpuArray, RingBuf},
};
use aya_log_ebpf::warn;
use selfconn_ebpf::{Endpoint, Transition, counter, reported};

use super::{
    connect_table,
    sock::{self, KernelRead, Sock},
};

/// Records of all kinds: see [`selfconn_ebpf::Record`]. The loader sets its size.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// One slot per constant of [`counter`].
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// One of [`reported`].
#[unsafe(no_mangle)]
static REPORTED: Global<u32> = Global::new(reported::STATES);

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

/// Submits a record that is not a transition to the ring buffer. Returns false if the ring buffer is full.
#[inline(always)]
pub(crate) fn submit<T>(record: &T) -> bool {
    count(counter::MATCHED);
    let is_submitted = RECORDS.output::<T>(record, 0).is_ok();
    if !is_submitted {
        count(counter::RING_FULL);
    }
    is_submitted
}

/// Counts an opener that did not fit into the connect table. If its attempt becomes a self-connection, the
/// connecting task will be unknown.
#[inline(always)]
pub(crate) fn count_connect_table_full<C: EbpfContext>(ctx: &C) {
    count(counter::CONNECT_TABLE_FULL);
    warn!(ctx, "the connect table is full: an opener is not stored");
}

/// A transition of a self-connection to report.
pub(crate) struct ReportedTransition {
    /// The program that observes it.
    pub(crate) probe_id: u8,
    pub(crate) endpoint: Endpoint,
    pub(crate) old: u8,
    pub(crate) new: u8,
}

/// Reports one transition of a self-connection to user space. This function is not inlined, so that it has
/// its own stack frame.
#[inline(never)]
pub(crate) fn report<C: EbpfContext, M: KernelRead>(ctx: &C, sock: Sock<M>, transition: &ReportedTransition) {
    let ReportedTransition { probe_id, ref endpoint, old, new } = *transition;
    if REPORTED.load() & 1 << (new & 31) == 0 {
        return;
    }
    // User space uses these counters to check that each program observes transitions.
    count(counter::SEEN_BY_PROBE + u32::from(probe_id));
    if connect_table::already_reported(sock, endpoint, new) {
        return;
    }
    count(counter::MATCHED);
    let Some(mut entry) = RECORDS.reserve::<Transition>(0) else {
        count(counter::RING_FULL);
        warn!(ctx, "ring buffer full: transition {} -> {} of port {} is lost", old, new, endpoint.port);
        return;
    };
    // SAFETY: the ring buffer reserved memory for a Transition, and every field is written before the submit.
    let out = unsafe { &mut *entry.as_mut_ptr() };
    // SAFETY: the helper takes no arguments.
    out.at_ns = unsafe { bpf_ktime_get_boot_ns() };
    out.sock = sock.key();
    let [a, b, c, d] = endpoint.addr.map(u32::to_ne_bytes);
    out.addr =
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]];
    out.port = endpoint.port;
    out.family = endpoint.family as u8;
    out.old = old;
    out.new = new;
    out.probe_id = probe_id;
    sock.fill(out);
    out.current = sock::current_task().0;
    out.opener = connect_table::lookup(sock, endpoint);
    entry.submit(0);
}
