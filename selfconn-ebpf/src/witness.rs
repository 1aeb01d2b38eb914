//! Who dialled: the table of dials in flight and of self-connections, by the socket's address.
//!
//! Only CLOSE -> SYN_SENT always runs in the connecting task, and there the source port may not be known yet. So every
//! dial of a socket to its own address is remembered, and forgotten as soon as its port turns out to be another one.
//! An entry counts only when its seal and the whole tuple match: a missed SYN_SENT gives nobody, not a wrong name.

use aya_ebpf::{
    EbpfContext, Global,
    helpers::generated::{bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns},
    macros::map,
    maps::Array,
};
use selfconn_ebpf::{Dial, DialSet, Opener, Tuple, WAYS, cause, set_of, state};

use crate::{
    report,
    sock::{self, Memory, Sock},
};

/// The loader sets its size.
#[map]
static DIALS: Array<DialSet> = Array::with_max_entries(SETS, 0);

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
    let way = match find(set, key) {
        Some(way) => {
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
            way
        }
        None => match find(set, 0).or_else(|| told(set)) {
            Some(way) => way,
            None => return report::count_not_remembered(ctx),
        },
    };
    let cause = match source_port {
        _ if !sock::knows_port() => 0,
        0 => cause::EPHEMERAL,
        _ => cause::BOUND,
    };
    let tuple = Tuple { addr, netns: sock.netns(), dport, family: family.into() };
    set.socks[way] = key;
    set.dials[way] = Dial::new(sock.low(), tuple, sock::opener(now_ns, cause), saw(witness));
}

/// What is remembered when a socket comes to another state.
pub(crate) enum Recalled {
    /// The other witness has reported it.
    Told,
    /// Nobody was seen dialling.
    Nobody,
    /// Who dialled is written here.
    By(&'static Dial),
}

/// Looks for who opened this socket, and notes that it comes to this state.
#[inline(always)]
pub(crate) fn recall<M: Memory>(sock: Sock<M>, tuple: &Tuple, new: u8) -> Recalled {
    let Some(set) = DIALS.get_ptr_mut(set_of(sock.low(), DIAL_SETS.load())) else { return Recalled::Nobody };
    // SAFETY: as in `remember`.
    let set = unsafe { &mut *set };
    let Some(way) = find(set, sock.key()) else { return Recalled::Nobody };
    let dial = &mut set.dials[way];
    if !same(&dial.tuple, tuple) || !dial.is_about(sock.low()) {
        return Recalled::Nobody;
    }
    let bit = 1 << (new & 15);
    if dial.is_done(bit) {
        return Recalled::Told;
    }
    dial.note(bit);
    Recalled::By(dial)
}

/// Copies who dialled to `to`; nobody, if another CPU has meanwhile written something else here.
#[inline(always)]
pub(crate) fn copy<M: Memory>(dial: &Dial, sock: Sock<M>, tuple: &Tuple, to: &mut Opener) {
    // What is proven must be what was taken, so it is read once.
    // SAFETY: a live reference.
    *to = unsafe { core::ptr::read_volatile(&raw const dial.opener) };
    if !dial.is_of(sock.low(), tuple, to) {
        *to = Opener::UNKNOWN;
    }
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
    (0..WAYS).find(|way| set.socks[*way] == sock)
}

/// An entry that user space has the opener of already: it was told that the socket is ESTABLISHED.
#[inline(always)]
fn told(set: &DialSet) -> Option<usize> {
    (0..WAYS).find(|way| set.dials[*way].is_done(1 << state::ESTABLISHED))
}

/// Ends a dial that came to nothing, and gives who made it. `None`: that was not seen, or the other witness has ended it.
#[inline(always)]
pub(crate) fn end<M: Memory>(sock: Sock<M>, tuple: &Tuple) -> Option<Opener> {
    let set = DIALS.get_ptr_mut(set_of(sock.low(), DIAL_SETS.load()))?;
    // SAFETY: as in `remember`.
    let set = unsafe { &mut *set };
    let way = find(set, sock.key())?;
    let mut dialler = Opener::UNKNOWN;
    copy(&set.dials[way], sock, tuple, &mut dialler);
    set.socks[way] = 0;
    (dialler.at_ns != 0).then_some(dialler)
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
