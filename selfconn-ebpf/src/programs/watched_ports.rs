//! The ports whose listeners user space waits for.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use selfconn_ebpf::{Endpoint, PORT_SLOTS, port_slot};

/// User space sets a slot through mmap(2), at most every 20 ms. A report clears it, because anybody can open and close
/// a listener in a loop.
#[map]
static WATCHED_PORTS: Array<u64> = Array::with_max_entries(PORT_SLOTS, BPF_F_MMAPABLE);

/// Reports the end of a listener at this port if user space may wait for it. `report` returns false if the report is
/// lost.
#[inline(always)]
pub(crate) fn report_once(endpoint: &Endpoint, report: impl FnOnce() -> bool) {
    let Some(slot) = WATCHED_PORTS.get_ptr_mut(port_slot(endpoint)) else { return };
    // The slot is cleared first: user space may set it as soon as it has the report.
    // SAFETY: a slot of an array stays valid as long as the program is loaded. It is read and written whole.
    unsafe {
        if slot.read_volatile() != 0 {
            slot.write_volatile(0);
            if !report() {
                slot.write_volatile(1);
            }
        }
    }
}
