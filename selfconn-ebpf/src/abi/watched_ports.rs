//! The ports whose listeners user space waits for: their connects are refused at one address, while a listener at
//! another address or of the other family keeps the port from being a source port.

use super::{endpoint::Endpoint, held_ports::held_port_slot};

/// Number of slots of [`crate::names::WATCHED_PORTS`]. Each is a word. 0: the end of a listener there is not reported.
pub const WATCHED_PORT_SLOTS: u32 = 1 << 12;

/// The slot of a port. Ports of one slot share it, so that a listener may be reported for which nobody waits.
#[inline(always)]
#[must_use]
pub const fn watched_port_slot(endpoint: &Endpoint) -> u32 {
    held_port_slot(endpoint) & (WATCHED_PORT_SLOTS - 1)
}
