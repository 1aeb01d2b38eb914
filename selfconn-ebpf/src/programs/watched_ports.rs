//! The ports whose listeners user space waits for.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use selfconn_ebpf::{Endpoint, WATCHED_PORT_SLOTS, watched_port_slot};

/// User space writes it through mmap(2).
#[map]
static WATCHED_PORTS: Array<u64> = Array::with_max_entries(WATCHED_PORT_SLOTS, BPF_F_MMAPABLE);

/// True if user space may wait for the end of a listener at this port.
#[inline(always)]
pub(crate) fn is_watched(endpoint: &Endpoint) -> bool {
    let slot = WATCHED_PORTS.get_ptr(watched_port_slot(endpoint));
    // SAFETY: a slot of an array stays valid as long as the program is loaded. It is written whole.
    slot.is_some_and(|slot| unsafe { slot.read_volatile() } != 0)
}
