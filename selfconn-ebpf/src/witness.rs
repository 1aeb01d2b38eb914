//! Who dialled: the table of dials in flight and of self-connections, by the socket's address.
//!
//! Only CLOSE -> SYN_SENT always runs in the connecting task, and there the source port may not be known yet. So every
//! dial of a socket to its own address is remembered, and forgotten as soon as its port turns out to be another one.
//! An entry counts only when its seal and the whole tuple match: a missed SYN_SENT gives nobody, not a wrong name.

use core::arch::asm;

use aya_ebpf::{
    EbpfContext, Global,
    bindings::BPF_F_MMAPABLE,
    helpers::generated::{bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns},
    macros::map,
    maps::Array,
};
use selfconn_ebpf::{Dial, DialSet, Opener, Tuple, WAYS, cause, set_of, state};

use crate::{
    report,
    sock::{self, Memory, Sock},
};

/// The loader sets its size, and reads it through mmap(2).
#[map]
static DIALS: Array<DialSet> = Array::with_max_entries(SETS, BPF_F_MMAPABLE);

/// The size of [`DIALS`]; the loader sets it to the same.
#[unsafe(no_mangle)]
static DIAL_SETS: Global<u32> = Global::new(SETS);

const SETS: u32 = 1 << 12;

/// Within how long after the first witness the second one sees the same dial.
const SAME_DIAL_NS: u64 = 100_000_000;

/// The bit in an entry of a witness that saw the dial; those of states are below.
const fn saw(witness: u8) -> u32 {
    1 << (16 + witness as u32)
}

/// What is known when somebody dials.
pub(crate) struct Dialling {
    pub(crate) witness: u8,
    /// [`Tuple::addr`], [`Tuple::dport`], [`Tuple::family`].
    pub(crate) addr: [u32; 4],
    pub(crate) dport: u16,
    pub(crate) family: u8,
    /// 0: none yet.
    pub(crate) source_port: u16,
}

/// Remembers the running task as the opener; overwrites whatever an earlier life of the socket left. What the other
/// witness has just written of the same dial stays. A function of its own, for a stack of its own.
#[inline(never)]
pub(crate) fn remember<C: EbpfContext, M: Memory>(ctx: &C, sock: Sock<M>, dialling: &Dialling) {
    let Dialling { witness, addr, dport, family, source_port } = *dialling;
    let key = sock.key();
    let Some(set) = DIALS.get_ptr_mut(set_of(sock.low(), DIAL_SETS.load())) else { return };
    // SAFETY: a value of an array lives as long as the program runs. Another CPU may write to it, too: see `Dial`.
    let set = unsafe { &mut *set };
    // SAFETY: no arguments.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    if let Some(way) = find(set, key) {
        let dial = &mut set.dials[way];
        let Opener { at_ns, ref task, .. } = dial.opener;
        // SAFETY: no arguments.
        let is_task =
            unsafe { bpf_get_current_pid_tgid() } == u64::from(task.pid) << 32 | u64::from(task.tid);
        let is_same_dial = is_task
            && dial.tuple.dport == dport
            && now_ns.wrapping_sub(at_ns) < SAME_DIAL_NS
            && !dial.is_done(saw(witness) | !(1 << state::SYN_SENT) & 0xffff);
        if is_same_dial {
            dial.note(saw(witness));
            return;
        }
    }
    let cause = match source_port {
        _ if !sock::knows_port() => 0,
        0 => cause::EPHEMERAL,
        _ => cause::BOUND,
    };
    let tuple = Tuple { addr, netns: sock.netns(), dport, family: family.into() };
    let dial = Dial::new(sock.low(), tuple, sock::opener(now_ns, cause), saw(witness));
    match find(set, key).or_else(|| find(set, 0)).or_else(|| told(set)) {
        Some(way) => {
            set.socks[way] = key;
            set.dials[way] = dial;
        }
        None => report::count_not_remembered(ctx),
    }
}

/// Whether the other witness has reported that this socket comes to this state; notes that it does.
#[inline(always)]
pub(crate) fn is_told<M: Memory>(sock: Sock<M>, tuple: &Tuple, new: u8) -> bool {
    let Some(set) = DIALS.get_ptr_mut(set_of(sock.low(), DIAL_SETS.load())) else { return false };
    // SAFETY: as in `remember`.
    let set = unsafe { &mut *set };
    let Some(way) = find(set, sock.key()) else { return false };
    let dial = &mut set.dials[way];
    if !same(&dial.tuple, tuple) || !dial.is_about(sock.low()) {
        return false;
    }
    let bit = 1 << (new & 15);
    let is_told = dial.is_done(bit);
    dial.note(bit);
    is_told
}

/// Who opened this socket; nobody, if that was not seen.
#[inline(always)]
pub(crate) fn recall<M: Memory>(sock: Sock<M>, tuple: &Tuple) -> Opener {
    let Some(set) = DIALS.get_ptr(set_of(sock.low(), DIAL_SETS.load())) else { return Opener::UNKNOWN };
    // SAFETY: as in `remember`.
    let set = unsafe { &*set };
    let Some(way) = find(set, sock.key()) else { return Opener::UNKNOWN };
    copy(&set.dials[way], sock, tuple).unwrap_or(Opener::UNKNOWN)
}

/// Copies who dialled. `None`: the entry is of another dial, or another CPU writes to it.
#[inline(always)]
fn copy<M: Memory>(dial: &Dial, sock: Sock<M>, tuple: &Tuple) -> Option<Opener> {
    // What is proven must be what was taken, so it is read once.
    // SAFETY: a live reference.
    let opener = unsafe { Opener::read(&raw const dial.opener) };
    dial.is_of(sock.low(), tuple, &opener).then_some(opener)
}

/// Ends what is known about this socket.
#[inline(always)]
pub(crate) fn forget<M: Memory>(sock: Sock<M>) {
    let Some(set) = DIALS.get_ptr_mut(set_of(sock.low(), DIAL_SETS.load())) else { return };
    // SAFETY: as in `remember`.
    let set = unsafe { &mut *set };
    if let Some(way) = find(set, sock.key()) {
        set.socks[way] = 0;
    }
}

/// Which entry is this socket's; with 0, which is free.
#[inline(always)]
fn find(set: &DialSet, sock: u64) -> Option<usize> {
    way(set, |way| set.socks[way] == sock)
}

/// An entry that user space has the opener of already: it was told that the socket is ESTABLISHED.
#[inline(always)]
fn told(set: &DialSet) -> Option<usize> {
    way(set, |way| set.dials[way].is_done(1 << state::ESTABLISHED))
}

/// The first entry that is one.
#[inline(always)]
fn way(set: &DialSet, is_one: impl Fn(usize) -> bool) -> Option<usize> {
    let way = (0..WAYS).find(|way| is_one(*way))?;
    // The verifier would follow what comes next once for each number that it knows this to be, and what comes after the
    // next choice as often again. So the number is mixed with a zero that it doesn't know for one.
    let mut way = way as u64;
    // SAFETY: computes with registers.
    unsafe {
        asm!("{zero} = {any}", "{zero} ^= -1", "{zero} &= {any}", "{way} ^= {zero}",
            any = in(reg) set.socks[0], zero = out(reg) _, way = inout(reg) way, options(nomem, preserves_flags));
    }
    Some(way as usize & (WAYS - 1))
}

/// Ends a dial that came to nothing, and gives who made it. `None`: that was not seen, or the other witness has ended it.
#[inline(always)]
pub(crate) fn end<M: Memory>(sock: Sock<M>, tuple: &Tuple) -> Option<Opener> {
    let set = DIALS.get_ptr_mut(set_of(sock.low(), DIAL_SETS.load()))?;
    // SAFETY: as in `remember`.
    let set = unsafe { &mut *set };
    let way = find(set, sock.key())?;
    let dialler = copy(&set.dials[way], sock, tuple);
    set.socks[way] = 0;
    dialler
}

/// Not `==`, which becomes a call to memcmp.
#[inline(always)]
fn same(a: &Tuple, b: &Tuple) -> bool {
    a.addr[0] == b.addr[0]
        && a.addr[1] == b.addr[1]
        && a.addr[2] == b.addr[2]
        && a.addr[3] == b.addr[3]
        && a.netns == b.netns
        && a.dport == b.dport
        && a.family == b.family
}
