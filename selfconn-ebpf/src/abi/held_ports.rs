//! Which ports self-connections hold: a filter in front of failed binds, nearly all of which have another cause.
//!
//! A slot can stand for ports of several network namespaces. So an empty slot proves that no self-connection holds the
//! port, and another one only says that user space must look. The table has one slot for each port number, so no user
//! can fill it, and needs no share.

use super::endpoint::Endpoint;

/// Number of slots of [`crate::names::HELD_PORTS`]. Each is a time of `CLOCK_BOOTTIME`, nanoseconds: when a
/// self-connection last took a port of this slot. 0: none holds one.
pub const HELD_PORT_SLOTS: u32 = 1 << 16;

/// The slot after those of the ports: when a self-connection last took any port. 0: no port is held. A program looks at
/// it where it does not know the port yet.
pub const ANY_HELD_PORT_SLOT: u32 = HELD_PORT_SLOTS;

/// The slot of a port. The namespace is known by its inode here, because user space can't ask for the cookie on every
/// kernel.
#[inline(always)]
#[must_use]
pub const fn held_port_slot(endpoint: &Endpoint) -> u32 {
    let hash = endpoint.netns.wrapping_mul(0x9e37_79b1);
    (hash >> 16 ^ endpoint.port as u32) & (HELD_PORT_SLOTS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_one_namespace_have_slots_of_their_own() {
        let at = |netns, port| held_port_slot(&Endpoint { netns, port, ..Endpoint::UNKNOWN });
        let slots: std::collections::HashSet<u32> =
            (0..=u16::MAX).map(|port| at(4_026_531_840, port)).collect();
        assert_eq!(slots.len(), HELD_PORT_SLOTS as usize);
        let collisions =
            (4_026_531_840..4_026_532_840_u32).filter(|netns| at(*netns, 80) == at(1, 80)).count();
        assert!(collisions < 3, "{collisions} of 1,000 namespaces");
    }
}
