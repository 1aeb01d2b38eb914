//! Ports in network namespaces: those of sockets that are known to exist, or may exist, and are not kept one by one,
//! because their number has no bound. Pure.
//!
//! A port has the slot that the programs' table of held ports has for it, so the set also says which of those are
//! needed. Anybody can have sockets in every slot, in a namespace of their own. So the set has the namespaces, too, by
//! a hash that nobody can choose: a port of another namespace is not in it, but by chance, which is one in some
//! thousands for each namespace that is.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

use selfconn_ebpf::{Endpoint, HELD_PORT_SLOTS, held_port_slot};

use crate::budget::memory;

/// Number of bits for namespaces.
const NAMESPACE_BITS: u32 = 1 << 15;

const WORD_BITS: u32 = u64::BITS;

/// The memory of a set that is not empty.
const PORT_SET_BYTES: usize = (HELD_PORT_SLOTS + NAMESPACE_BITS) as usize / 8;

const _: () = assert!(PORT_SET_BYTES <= memory::PORT_SET_BYTES);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortSet {
    /// Empty if the set is.
    words: Vec<u64>,
}

impl PortSet {
    pub fn insert(&mut self, endpoint: &Endpoint) {
        self.words.resize(PORT_SET_BYTES / size_of::<u64>(), 0);
        for bit in bits_of(endpoint) {
            if let Some(word) = self.words.get_mut((bit / WORD_BITS) as usize) {
                *word |= 1 << (bit % WORD_BITS);
            }
        }
    }

    /// Adds all of another set.
    pub fn extend(&mut self, other: &Self) {
        if self.is_empty() {
            self.words.clone_from(&other.words);
        }
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    pub fn clear(&mut self) {
        self.words = Vec::new();
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// False: no socket of the set has this port in this namespace, at whatever address.
    #[must_use]
    pub fn may_have(&self, endpoint: &Endpoint) -> bool {
        !self.is_empty() && bits_of(endpoint).into_iter().all(|bit| self.has_bit(bit))
    }

    /// The slots of its ports in the programs' table of held ports.
    pub fn slots(&self) -> impl Iterator<Item = u32> {
        (0..HELD_PORT_SLOTS).filter(|slot| self.has_bit(*slot))
    }

    fn has_bit(&self, bit: u32) -> bool {
        self.words.get((bit / WORD_BITS) as usize).is_some_and(|word| word & 1 << (bit % WORD_BITS) != 0)
    }
}

/// The bits of a slot and of a namespace.
fn bits_of(endpoint: &Endpoint) -> [u32; 2] {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    let namespace = (KEY.hash_one(endpoint.netns) % u64::from(NAMESPACE_BITS)) as u32;
    [held_port_slot(endpoint), HELD_PORT_SLOTS + namespace]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::samples;

    fn at(netns: u32, port: u16) -> Endpoint {
        Endpoint { netns, ..samples::endpoint("127.0.0.1", port) }
    }

    #[test]
    fn a_set_has_a_port_of_one_namespace_at_any_address_and_no_other() {
        let mut set = PortSet::default();
        assert!(set.is_empty() && !set.may_have(&at(1, 80)) && set.slots().count() == 0);
        set.insert(&at(1, 80));
        let wildcard = Endpoint { netns: 1, ..samples::endpoint("0.0.0.0", 80) };
        assert!(set.may_have(&at(1, 80)) && set.may_have(&wildcard));
        assert!(!set.may_have(&at(1, 81)));
        assert_eq!(set.slots().collect::<Vec<_>>(), [held_port_slot(&at(1, 80))]);
        let mut all = PortSet::default();
        all.extend(&set);
        all.extend(&PortSet::default());
        assert_eq!(all, set);
        set.clear();
        assert!(set.is_empty() && !set.may_have(&at(1, 80)));
    }

    #[test]
    fn who_has_every_port_of_a_namespace_has_none_of_another() {
        let mut set = PortSet::default();
        for port in 0..=u16::MAX {
            set.insert(&at(1, port));
        }
        assert_eq!(set.slots().count(), HELD_PORT_SLOTS as usize, "every slot");
        // Of another namespace each port is in the set, or none, because the hash says it of the namespace.
        let others = (2..1_002).filter(|netns| set.may_have(&at(*netns, 80))).count();
        assert!(others <= 3, "{others} of 1,000 namespaces");
        assert_eq!(set.words.capacity() * size_of::<u64>(), PORT_SET_BYTES);
    }
}
