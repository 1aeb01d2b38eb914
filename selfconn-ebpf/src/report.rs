//! What happened: the ring buffer to user space, and the counters that say what did not fit.

use core::arch::asm;

use aya_ebpf::{
    EbpfContext, Global,
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{PerCpuArray, RingBuf},
};
use aya_log_ebpf::warn;
use selfconn_ebpf::{Transition, Tuple, counter, reported};

use crate::{
    sock::{self, Memory, Sock},
    witness,
};

/// Whatever is in [`selfconn_ebpf::Record`]. The loader sets its size.
#[map]
static TRANSITIONS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// Slots of [`counter`].
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// One of [`reported`].
#[unsafe(no_mangle)]
static REPORTED: Global<u32> = Global::new(reported::STATES);

#[inline(always)]
pub(crate) fn count(slot: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: a slot of a per-CPU array lives as long as the program.
        unsafe { add_one(counter) };
    }
}

/// Adds in one instruction, for another program may interrupt this one, on the same CPU too, between load and store;
/// core has no atomic addition for this target.
///
/// # Safety
///
/// The counter must be in a map, and aligned.
#[inline(always)]
pub(crate) unsafe fn add_one(counter: *mut u64) {
    // SAFETY: the caller's promise; the instruction touches nothing else.
    unsafe { asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter, one = in(reg) 1_u64) };
}

/// Puts a record of another kind into the ring buffer. False: it had no room.
#[inline(always)]
pub(crate) fn tell<T>(record: &T) -> bool {
    count(counter::MATCHED);
    let is_told = TRANSITIONS.output::<T>(record, 0).is_ok();
    if !is_told {
        count(counter::RING_FULL);
    }
    is_told
}

/// An opener found no room in the table: its self-connection, if it becomes one, will have no name.
#[inline(always)]
pub(crate) fn count_not_remembered<C: EbpfContext>(ctx: &C) {
    count(counter::NOT_REMEMBERED);
    warn!(ctx, "the table of dials is full: an opener was not remembered");
}

/// A transition of a self-connection.
pub(crate) struct Step {
    /// Which program sees it.
    pub(crate) witness: u8,
    pub(crate) tuple: Tuple,
    pub(crate) old: u8,
    pub(crate) new: u8,
}

/// Tells user space of one transition of a self-connection. A function of its own, for a stack of its own.
#[inline(never)]
pub(crate) fn report<C: EbpfContext, M: Memory>(ctx: &C, sock: Sock<M>, step: &Step) {
    let Step { witness, ref tuple, old, new } = *step;
    if REPORTED.load() & 1 << (new & 31) == 0 {
        return;
    }
    // So that user space knows of each program that it sees.
    count(counter::SEEN + u32::from(witness));
    if witness::is_told(sock, tuple, new) {
        return;
    }
    count(counter::MATCHED);
    let Some(mut entry) = TRANSITIONS.reserve::<Transition>(0) else {
        count(counter::RING_FULL);
        warn!(ctx, "the ring buffer is full: {} -> {} of port {} is lost", old, new, tuple.dport);
        return;
    };
    // SAFETY: the ring buffer gave us room for a Transition, and every field is written before it is submitted.
    let out = unsafe { &mut *entry.as_mut_ptr() };
    // SAFETY: no arguments.
    out.at_ns = unsafe { bpf_ktime_get_boot_ns() };
    out.sock = sock.key();
    let [a, b, c, d] = tuple.addr.map(u32::to_ne_bytes);
    out.addr =
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]];
    out.port = tuple.dport;
    out.family = tuple.family as u8;
    out.old = old;
    out.new = new;
    out.witness = witness;
    sock.describe(out);
    out.current = sock::current().0;
    out.opener = witness::recall(sock, tuple);
    entry.submit(0);
}
