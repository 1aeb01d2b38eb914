//! The connect table: it maps the kernel address of a socket to the task that called `connect()` on it, for
//! connection attempts in flight and for self-connections. The layout of its entries is in
//! `abi/connect_table.rs`.
//!
//! Only the transition CLOSE -> SYN_SENT always runs in the connecting task, and at that point the source
//! port may not be known yet. So every connection attempt of a socket to its own address is inserted, and
//! removed as soon as its source port is known and differs from the destination port. An entry is used only
//! if its checksum and the whole endpoint match: after a missed SYN_SENT the connecting task is unknown, never
//! wrong.

use core::arch::asm;

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    helpers::generated::{bpf_get_current_pid_tgid, bpf_get_smp_processor_id, bpf_ktime_get_boot_ns},
    macros::map,
    maps::Array,
};
use selfconn_ebpf::{
    ConnectEntry, ConnectSet, Endpoint, Opener, Owner, WAYS, cause, counter, owner::evicted, set_index, state,
};

use super::{
    counters::count,
    kernel_read::KernelRead,
    owners,
    sock::{SelfAddr, Sock, can_read_port},
    task::{current_image_and_owner, opener},
};

/// The connect table. The loader sets its size, and reads it through mmap(2).
#[map]
static CONNECT_TABLE: Array<ConnectSet> = Array::with_max_entries(SETS, BPF_F_MMAPABLE);

/// Number of sets in [`CONNECT_TABLE`]. The loader sets it together with the size of the map.
#[unsafe(no_mangle)]
static CONNECT_SETS: Global<u32> = Global::new(SETS);

/// Default number of sets.
const SETS: u32 = 1 << 11;

/// Maximum time between the first and the second probe's observation of the same connection attempt.
const SAME_ATTEMPT_NS: u64 = 100_000_000;

/// The flag for "this probe has observed the attempt". The lower 16 bits are the flags of states.
const fn seen_by(probe_id: u8) -> u32 {
    1 << (16 + probe_id as u32)
}

/// Inserts the running task as the opener. It overwrites an entry of an earlier connection of the same
/// socket, but keeps the entry that the other probe has just written for the same attempt. A source port of 0:
/// the socket has none yet. The caller has [ensured room](ensure_room). False: another CPU has taken it.
#[inline(always)]
pub(crate) fn insert<M: KernelRead>(
    sock: Sock<M>,
    probe_id: u8,
    self_addr: SelfAddr,
    source_port: u16,
    dport: u16,
) -> bool {
    let key = sock.key();
    let Some(set) = set_of(sock) else { return false };
    // SAFETY: the helper takes no arguments.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    if let Some(way) = find(set, key) {
        let entry = &mut set.entries[way];
        let Opener { at_ns, ref task, .. } = entry.opener;
        // SAFETY: the helper takes no arguments.
        let is_same_task =
            unsafe { bpf_get_current_pid_tgid() } == u64::from(task.pid) << 32 | u64::from(task.tid);
        let is_same_attempt = is_same_task
            && entry.endpoint.port == dport
            && now_ns.wrapping_sub(at_ns) < SAME_ATTEMPT_NS
            && !entry.has_flag(seen_by(probe_id) | !(1 << state::SYN_SENT) & 0xffff);
        if is_same_attempt {
            entry.set_flags(seen_by(probe_id));
            return true;
        }
    }
    let cause = match source_port {
        _ if !can_read_port() => 0,
        0 => cause::EPHEMERAL,
        _ => cause::BOUND,
    };
    let (endpoint, opener) = (self_addr.endpoint(sock, dport), opener(now_ns, cause));
    let entry = ConnectEntry::new(sock.low_half(), endpoint, opener, seen_by(probe_id));
    let Some(way) = find(set, key) else { return false };
    set.entries[way] = entry;
    // Two CPUs can claim the same entry in the same moment.
    // SAFETY: the pointer comes from a live reference.
    unsafe { (&raw const set.socks[way]).read_volatile() == key }
}

/// Claims an entry for the running task in the set of this socket. If the set is full, one is evicted, and the loss
/// counted for its owner. False: there is no room, or another CPU has changed the set.
///
/// The parts are called one after the other, because each needs much of the stack, of which the programs of a chain of
/// calls have 512 bytes together (`check_max_stack_depth`, kernel/bpf/verifier.c at v5.10).
#[inline(always)]
pub(crate) fn ensure_room<M: KernelRead>(sock: Sock<M>) -> bool {
    match choose(sock) {
        choice::HAS_ROOM => true,
        choice::NO_ROOM => false,
        chosen => evict(sock, chosen),
    }
}

/// What [`choose`] returns: one of these, or an index, [`choice::IS_LOSS`], and [the sockets](socks_of) of the full set
/// in the other bits.
mod choice {
    /// An entry is claimed.
    pub(super) const HAS_ROOM: u64 = 0;
    /// No entry may be evicted.
    pub(super) const NO_ROOM: u64 = 1;
    /// User space still needs the entry.
    pub(super) const IS_LOSS: u64 = 8;
    /// Set in each choice of an entry, so that it is none of the numbers above.
    pub(super) const IS_ENTRY: u64 = 16;
    /// The bits of the sockets.
    pub(super) const SOCKS: u64 = !31;
}

/// Claims an entry of this socket or a free one, or else chooses one that makes room for one of the running task.
#[inline(never)]
fn choose<M: KernelRead>(sock: Sock<M>) -> u64 {
    let Some(set) = set_of(sock) else { return choice::NO_ROOM };
    if find(set, sock.key()).is_some() {
        return choice::HAS_ROOM;
    }
    // Each CPU begins at another entry, so that two of them rarely choose the same one in the same moment.
    // SAFETY: the helper takes no arguments.
    let first = unsafe { bpf_get_smp_processor_id() } as usize;
    if let Some(way) = position(set, |way| set.socks[(way + first) & (WAYS - 1)] == 0) {
        claim(set, (way + first) & (WAYS - 1), sock.key());
        return choice::HAS_ROOM;
    }
    // Before the choice, so that it is a choice from these.
    let socks = socks_of(set);
    if let Some(way) = reported(set) {
        return socks | choice::IS_ENTRY | way as u64;
    }
    let (_, pusher) = current_image_and_owner();
    let opener = |way: usize| &raw const set.entries[way].opener;
    // The reads are volatile, because the compiler would keep all of them on the stack.
    // SAFETY: the pointers come from a live reference.
    let owner = |way| unsafe { (&raw const (*opener(way)).owner).read_volatile() };
    // SAFETY: as above.
    let inserted_ns = |way| unsafe { (&raw const (*opener(way)).at_ns).read_volatile() };
    evicted::<WAYS>(owner, inserted_ns, &pusher)
        .map_or(choice::NO_ROOM, |way| socks | choice::IS_ENTRY | choice::IS_LOSS | way as u64)
}

/// Claims the chosen entry of a full set. False: another CPU has changed the set since the choice.
#[inline(never)]
fn evict<M: KernelRead>(sock: Sock<M>, chosen: u64) -> bool {
    let Some(set) = set_of(sock) else { return false };
    if socks_of(set) != chosen & choice::SOCKS {
        return false;
    }
    let way = chosen as usize & (WAYS - 1);
    claim(set, way, sock.key());
    if chosen & choice::IS_LOSS != 0 {
        let loser = set.entries[way].opener.owner;
        count_loss(&loser);
    }
    true
}

/// Takes an entry for this socket, until [`insert`] writes it: another CPU neither finds it free nor evicts it.
#[inline(always)]
fn claim(set: &mut ConnectSet, way: usize, key: u64) {
    set.entries[way].claim();
    // SAFETY: the pointer comes from a live reference.
    unsafe { (&raw mut set.socks[way]).write_volatile(key) };
}

/// The sockets of a set as a number, which differs as soon as another CPU has changed one of them.
#[inline(always)]
fn socks_of(set: &ConnectSet) -> u64 {
    // SAFETY: the pointer comes from a live reference.
    let sock = |way: usize| unsafe { (&raw const set.socks[way]).read_volatile() };
    let sum = (0..WAYS).fold(0_u64, |sum, way| sum.rotate_left(9) ^ sock(way));
    // The product has what the mask drops in its other bits, too.
    sum.wrapping_mul(0x9e37_79b9_7f4a_7c15) & choice::SOCKS
}

/// Counts an opener that is not stored, or no longer, for its owner.
#[inline(always)]
pub(crate) fn count_loss(loser: &Owner) {
    count(counter::CONNECT_TABLE_FULL);
    // SAFETY: the pointer is to a value of the map.
    owners::count_loss(loser, |losses| unsafe { &raw mut (*losses).lost_openers });
}

/// Marks this state of the socket as reported. Returns whether the other probe has already reported it, and the
/// opener of the socket, or [`Opener::UNKNOWN`] if the attempt was not observed. `removes`: also removes the
/// entry.
#[inline(always)]
pub(crate) fn mark_reported<M: KernelRead>(
    sock: Sock<M>,
    endpoint: &Endpoint,
    new: u8,
    removes: bool,
) -> (bool, Opener) {
    let Some((set, way)) = entry_of(sock) else { return (false, Opener::UNKNOWN) };
    let entry = &mut set.entries[way];
    let (already_reported, opener) = match read_opener(entry, sock, endpoint) {
        Some(opener) => {
            let state = 1 << (new & 15);
            let already_reported = entry.has_flag(state);
            entry.set_flags(state);
            (already_reported, opener)
        }
        None => (false, Opener::UNKNOWN),
    };
    if removes {
        set.socks[way] = 0;
    }
    (already_reported, opener)
}

/// The connecting task of a socket, or [`Opener::UNKNOWN`].
#[inline(always)]
pub(crate) fn opener_of<M: KernelRead>(sock: Sock<M>, endpoint: &Endpoint) -> Opener {
    entry_of(sock)
        .and_then(|(set, way)| read_opener(&set.entries[way], sock, endpoint))
        .unwrap_or(Opener::UNKNOWN)
}

/// Marks this state of the socket as not reported, because the ring buffer did not take the record: the other probe may
/// report it.
#[inline(always)]
pub(crate) fn mark_not_reported<M: KernelRead>(sock: Sock<M>, new: u8) {
    if let Some((set, way)) = entry_of(sock) {
        set.entries[way].clear_flags(1 << (new & 15));
    }
}

/// Copies the opener. `None`: the entry belongs to another attempt, or another CPU is writing to it.
#[inline(always)]
fn read_opener<M: KernelRead>(entry: &ConnectEntry, sock: Sock<M>, endpoint: &Endpoint) -> Option<Opener> {
    // The checksum must be verified over the copy that is returned, so the opener is read exactly once.
    // SAFETY: the pointer comes from a live reference.
    let opener = unsafe { Opener::read(&raw const entry.opener) };
    entry.matches(sock.low_half(), endpoint, &opener).then_some(opener)
}

/// Removes the entry of this socket.
#[inline(always)]
pub(crate) fn remove<M: KernelRead>(sock: Sock<M>) {
    if let Some((set, way)) = entry_of(sock) {
        set.socks[way] = 0;
    }
}

/// Removes the entry of a failed attempt, and returns its opener. `None`: the attempt was not observed, or
/// the other probe has already removed the entry.
#[inline(always)]
pub(crate) fn take<M: KernelRead>(sock: Sock<M>, endpoint: &Endpoint) -> Option<Opener> {
    let (set, way) = entry_of(sock)?;
    let opener = read_opener(&set.entries[way], sock, endpoint);
    set.socks[way] = 0;
    opener
}

/// The set of this socket.
#[inline(always)]
fn set_of<M: KernelRead>(sock: Sock<M>) -> Option<&'static mut ConnectSet> {
    let set = CONNECT_TABLE.get_ptr_mut(set_index(sock.low_half(), CONNECT_SETS.load()))?;
    // SAFETY: a value of an array stays valid as long as the program is loaded. Another CPU can write to it
    // at the same time; the checksum in `ConnectEntry` detects that.
    Some(unsafe { &mut *set })
}

/// The set of this socket, and the index of its entry there.
#[inline(always)]
fn entry_of<M: KernelRead>(sock: Sock<M>) -> Option<(&'static mut ConnectSet, usize)> {
    let set = set_of(sock)?;
    let way = find(set, sock.key())?;
    Some((set, way))
}

/// Index of the entry of this socket.
#[inline(always)]
fn find(set: &ConnectSet, sock: u64) -> Option<usize> {
    position(set, |way| set.socks[way] == sock)
}

/// Index of an entry that may be overwritten: its transition to ESTABLISHED was reported, so user space
/// already has the opener.
#[inline(always)]
fn reported(set: &ConnectSet) -> Option<usize> {
    position(set, |way| set.entries[way].has_flags(1 << state::ESTABLISHED))
}

/// Index of the first entry that matches the predicate.
#[inline(always)]
fn position(set: &ConnectSet, matches: impl Fn(usize) -> bool) -> Option<usize> {
    let way = (0..WAYS).find(|way| matches(*way))?;
    // The verifier knows the few possible values of `way`, and would verify all following code once per
    // value; a second search would multiply that again. So `way` is XORed with a zero that the verifier
    // cannot recognise as zero.
    let mut way = way as u64;
    // SAFETY: the instructions only compute with registers.
    unsafe {
        asm!("{zero} = {any}", "{zero} ^= -1", "{zero} &= {any}", "{way} ^= {zero}",
            any = in(reg) set.socks[0], zero = out(reg) _, way = inout(reg) way, options(nomem, preserves_flags));
    }
    Some(way as usize & (WAYS - 1))
}
