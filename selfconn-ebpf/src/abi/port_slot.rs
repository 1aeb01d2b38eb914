//! The slots of ports in the arrays of [`crate::names::WATCHED_PORTS`] and [`crate::names::REFUSED_AT`].

use super::{endpoint::Endpoint, held_ports::held_port_slot};

/// Number of slots. Each is a word.
pub const PORT_SLOTS: u32 = 1 << 12;

/// The slot of a port in a network namespace. Several share it.
#[inline(always)]
#[must_use]
pub const fn port_slot(endpoint: &Endpoint) -> u32 {
    held_port_slot(endpoint) & (PORT_SLOTS - 1)
}
