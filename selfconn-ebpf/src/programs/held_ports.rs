//! The ports that self-connections hold. The programs set a slot, and user space clears it when no connection and no
//! TIME_WAIT needs it any more.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use selfconn_ebpf::{ANY_HELD_PORT_SLOT, Endpoint, held_port_slot};

/// User space reads and writes it through mmap(2).
#[map]
static HELD_PORTS: Array<u64> = Array::with_max_entries(ANY_HELD_PORT_SLOT + 1, BPF_F_MMAPABLE);

/// A self-connection has taken this port.
#[inline(always)]
pub(crate) fn set(endpoint: &Endpoint, now_ns: u64) {
    for slot in [ANY_HELD_PORT_SLOT, held_port_slot(endpoint)] {
        if let Some(slot) = HELD_PORTS.get_ptr_mut(slot) {
            // SAFETY: a slot of an array stays valid as long as the program is loaded. It is written whole.
            unsafe { slot.write_volatile(now_ns) };
        }
    }
}

/// False: no self-connection holds this port.
#[inline(always)]
pub(crate) fn may_be_held(endpoint: &Endpoint) -> bool {
    is_set(held_port_slot(endpoint))
}

/// False: no self-connection holds any port.
#[inline(always)]
pub(crate) fn is_any_held() -> bool {
    is_set(ANY_HELD_PORT_SLOT)
}

#[inline(always)]
fn is_set(slot: u32) -> bool {
    // SAFETY: as in `set`.
    HELD_PORTS.get_ptr(slot).is_none_or(|slot| unsafe { slot.read_volatile() } != 0)
}
