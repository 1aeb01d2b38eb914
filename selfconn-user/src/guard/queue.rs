//! Which network namespace the guard takes next. Pure.
//!
//! A namespace with a first connect to its own address comes before those without, and owners take turns, so that a user
//! who makes thousands of namespaces delays the next owner's by one. An owner is the user that owns the outermost user
//! namespace of the network namespace, because network namespaces are made at will.

use std::collections::{HashMap, HashSet, VecDeque};

use selfconn_ebpf::Owner;

use crate::{budget::SharedLimit, sockets::NetnsId};

/// Maximum number of namespaces that are guarded or wait for it. Each takes a descriptor.
pub const MAX_NAMESPACES: usize = 2_048;

/// A namespace that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting<P> {
    pub id: NetnsId,
    pub owner: u32,
    /// How to get there.
    pub path: P,
}

#[derive(Debug)]
struct OwnerQueue<P> {
    connecting: VecDeque<Waiting<P>>,
    others: VecDeque<Waiting<P>>,
}

/// The namespaces that are guarded or wait, with the shares of their owners.
#[derive(Debug)]
pub struct NamespaceQueue<P> {
    by_owner: HashMap<u32, OwnerQueue<P>>,
    /// The owners that have something waiting, in the order of their turns.
    turns: VecDeque<u32>,
    waiting: HashSet<NetnsId>,
    shares: SharedLimit,
}

impl<P> Default for NamespaceQueue<P> {
    fn default() -> Self {
        Self {
            by_owner: HashMap::new(),
            turns: VecDeque::new(),
            waiting: HashSet::new(),
            shares: SharedLimit::new(MAX_NAMESPACES),
        }
    }
}

impl<P> NamespaceQueue<P> {
    /// Adds a namespace, or moves it ahead if it `connects`. False: its owner has too many.
    pub fn push(&mut self, waiting: Waiting<P>, connects: bool) -> bool {
        let owner = waiting.owner;
        if self.waiting.contains(&waiting.id) {
            if connects
                && let Some(queue) = self.by_owner.get_mut(&owner)
                && let Some(at) = queue.others.iter().position(|other| other.id == waiting.id)
                && let Some(moved) = queue.others.remove(at)
            {
                queue.connecting.push_back(moved);
            }
            return true;
        }
        if !self.shares.try_take(Owner::new(owner, 0), 1) {
            return false;
        }
        self.waiting.insert(waiting.id);
        if !self.turns.contains(&owner) {
            self.turns.push_back(owner);
        }
        let queue = self
            .by_owner
            .entry(owner)
            .or_insert_with(|| OwnerQueue { connecting: VecDeque::new(), others: VecDeque::new() });
        if connects {
            queue.connecting.push_back(waiting);
        } else {
            queue.others.push_back(waiting);
        }
        true
    }

    /// The next namespace. It keeps its share until [`Self::release`].
    pub fn pop(&mut self) -> Option<Waiting<P>> {
        let has_connecting = |queue: &OwnerQueue<P>| !queue.connecting.is_empty();
        let turn = self
            .turns
            .iter()
            .position(|owner| self.by_owner.get(owner).is_some_and(has_connecting))
            .or_else(|| (!self.turns.is_empty()).then_some(0))?;
        let owner = self.turns.remove(turn)?;
        let queue = self.by_owner.get_mut(&owner)?;
        let next = queue.connecting.pop_front().or_else(|| queue.others.pop_front());
        if queue.connecting.is_empty() && queue.others.is_empty() {
            self.by_owner.remove(&owner);
        } else {
            self.turns.push_back(owner);
        }
        if let Some(next) = &next {
            self.waiting.remove(&next.id);
        }
        next
    }

    /// A namespace that was popped is not guarded, or not any more.
    pub fn release(&mut self, owner: u32) {
        self.shares.give_back(Owner::new(owner, 0), 1);
    }

    /// The namespaces that wait.
    pub fn ids(&self) -> impl Iterator<Item = NetnsId> {
        self.waiting.iter().copied()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(inode: u32, owner: u32) -> Waiting<()> {
        Waiting { id: NetnsId { inode, cookie: inode.into() }, owner, path: () }
    }

    fn drain(queue: &mut NamespaceQueue<()>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).map(|next| next.id.inode).collect()
    }

    #[test]
    fn owners_take_turns_and_a_namespace_that_connects_comes_first() {
        let mut queue = NamespaceQueue::default();
        for inode in 1..=5 {
            assert!(queue.push(waiting(inode, 1_000), false));
        }
        assert!(queue.push(waiting(10, 0), false));
        assert!(queue.push(waiting(11, 1_001), true));
        // It waits already.
        assert!(queue.push(waiting(4, 1_000), true));
        assert!(queue.push(waiting(4, 1_000), false));
        assert_eq!(queue.ids().count(), 7);
        assert_eq!(drain(&mut queue), [4, 11, 10, 1, 2, 3, 5]);
        assert!(queue.is_empty() && queue.pop().is_none());
    }

    #[test]
    fn an_owner_who_floods_delays_another_by_one() {
        let mut queue = NamespaceQueue::default();
        for inode in 1..=500 {
            assert!(queue.push(waiting(inode, 65_534), true));
        }
        assert!(queue.push(waiting(1_000, 0), true));
        let order = drain(&mut queue);
        assert_eq!(order.iter().position(|inode| *inode == 1_000), Some(1));
    }

    #[test]
    fn an_owner_beyond_its_share_is_refused_and_another_is_not() {
        let mut queue = NamespaceQueue::default();
        let accepted = (1..=4_000).filter(|inode| queue.push(waiting(*inode, 65_534), false)).count();
        assert!(accepted < MAX_NAMESPACES, "{accepted}");
        assert!(queue.push(waiting(9_000, 1_000), false), "another owner finds room");
        // Also while they are guarded, and until they have ended.
        while queue.pop().is_some() {}
        assert!(!queue.push(waiting(9_001, 65_534), false));
        queue.release(65_534);
        queue.release(65_534);
        assert!(queue.push(waiting(9_001, 65_534), false));
    }
}
