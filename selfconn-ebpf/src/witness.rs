//! Who dialled: the table of dials in flight and of self-connections, by the socket's address.
//!
//! Only CLOSE -> SYN_SENT always runs in the connecting task, and there the source port may not be known yet. So every
//! dial of a socket to its own address is remembered, and forgotten as soon as its port turns out to be another one.
//! An entry counts only when the whole tuple matches: a missed SYN_SENT gives nobody, not a wrong name.

use aya_ebpf::{helpers::generated::bpf_ktime_get_boot_ns, macros::map, maps::HashMap};
use selfconn_ebpf::{Dial, Opener, Tuple, cause};

use crate::{report, sock};

/// A plain hash, not an LRU, which would evict without telling. The loader may set its size.
#[map]
static DIALS: HashMap<u64, Dial> = HashMap::with_max_entries(16_384, 0);

/// Remembers the running task as the opener; overwrites whatever an earlier life of the socket left.
#[inline(always)]
pub(crate) fn remember<C: aya_ebpf::EbpfContext>(ctx: &C, sock: u64, tuple: Tuple, source_port: u16) {
    // SAFETY: no arguments.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    let cause = match source_port {
        _ if !sock::knows_port() => 0,
        0 => cause::EPHEMERAL,
        _ => cause::BOUND,
    };
    let dial = Dial { tuple, opener: sock::opener(now_ns, cause), reported: 0, padding: 0 };
    if DIALS.insert(&sock, &dial, 0).is_err() {
        report::count_not_remembered(ctx);
    }
}

/// Who opened this socket, if that was seen. `None`: the other witness has reported that it comes to this state.
#[inline(always)]
pub(crate) fn recall(sock: u64, tuple: &Tuple, new: u8) -> Option<Opener> {
    let Some(dial) = DIALS.get_ptr_mut(&sock) else { return Some(Opener::UNKNOWN) };
    // SAFETY: an entry lives as long as the program runs. It changes under our hands only if the socket is dialled
    // again, and its transitions, which bring both witnesses here one after the other, run under the socket's lock.
    let dial = unsafe { &mut *dial };
    if !same(&dial.tuple, tuple) {
        return Some(Opener::UNKNOWN);
    }
    let bit = 1 << (new & 31);
    if dial.reported & bit != 0 {
        return None;
    }
    dial.reported |= bit;
    Some(dial.opener)
}

/// Ends what is known about this socket.
#[inline(always)]
pub(crate) fn forget(sock: u64) {
    // Not there is what we want.
    let _ = DIALS.remove(&sock);
}

/// Ends a dial that came to nothing, and gives who made it. `None`: that was not seen, or the other witness has ended it.
#[inline(always)]
pub(crate) fn end(sock: u64, tuple: &Tuple) -> Option<Opener> {
    let dial = DIALS.get_ptr(&sock)?;
    // SAFETY: as in `recall`.
    let dial = unsafe { &*dial };
    let dialler = same(&dial.tuple, tuple).then_some(dial.opener);
    DIALS.remove(&sock).ok()?;
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
