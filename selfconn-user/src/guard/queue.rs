//! Which network namespace the guard takes next, and whose attachments fill its room. Pure.
//!
//! A namespace with a first connect to its own address comes before those without, three times in a row at most. Owners
//! take turns as in `budget::turns`, so a user who makes thousands of namespaces delays another owner's by one, and new
//! owners pass nobody. An owner is the user that owns the outermost user namespace of the network namespace, because
//! network namespaces are made at will.

use std::collections::{HashMap, HashSet, VecDeque};

use selfconn_ebpf::Owner;

use crate::{
    budget::{SharedLimit, Turns},
    sockets::NetnsId,
};

/// Maximum number of devices to which the program is attached, and of namespaces that wait for another. An attachment
/// may take a descriptor.
pub const MAX_ATTACHMENTS: usize = 2_048;

/// Maximum number of these for a user other than root: twice what a user with a hundred containers has. The end of the
/// daemon detaches all of them one after the other, each with the kernel's lock for network configuration held.
pub const MAX_USER_ATTACHMENTS: usize = 256;

/// Maximum number of turns in a row of namespaces that connect, while others wait.
const MAX_CONNECTING_TURNS: u32 = 3;

/// A namespace that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting<P> {
    pub id: NetnsId,
    pub owner: u32,
    /// How to get there.
    pub path: P,
    /// True if something connects to itself there.
    pub connects: bool,
}

#[derive(Debug)]
struct OwnerQueue<P> {
    /// The numbers of turns and of arrivals when its first namespace arrived.
    since: (u64, u64),
    connecting: VecDeque<Waiting<P>>,
    others: VecDeque<Waiting<P>>,
}

/// The namespaces that wait, and how much of the room each owner has.
#[derive(Debug)]
pub struct NamespaceQueue<P> {
    by_owner: HashMap<u32, OwnerQueue<P>>,
    turns: Turns,
    /// Number of arrivals of namespaces so far.
    arrivals: u64,
    /// How many of the last ones were those of namespaces that connect.
    connecting_turns: u32,
    waiting: HashSet<NetnsId>,
    shares: SharedLimit,
}

impl<P> Default for NamespaceQueue<P> {
    fn default() -> Self {
        Self {
            by_owner: HashMap::new(),
            turns: Turns::default(),
            arrivals: 0,
            connecting_turns: 0,
            waiting: HashSet::new(),
            shares: SharedLimit::new(MAX_ATTACHMENTS),
        }
    }
}

/// The owner of a namespace, in whatever control group it was made.
fn payer(owner: u32) -> Owner {
    Owner::new(owner, 0)
}

impl<P> NamespaceQueue<P> {
    /// Adds a namespace with room for one more attachment. If it waits already, the new way to it is taken, and it
    /// moves ahead if it connects. False: its owner has too many.
    pub fn push(&mut self, waiting: Waiting<P>) -> bool {
        let owner = waiting.owner;
        if self.waiting.contains(&waiting.id) {
            let Some(queue) = self.by_owner.get_mut(&owner) else { return true };
            let is_same = |other: &Waiting<P>| other.id == waiting.id;
            if let Some(known) = queue.connecting.iter_mut().find(|other| is_same(other)) {
                known.path = waiting.path;
            } else if let Some(at) = queue.others.iter().position(is_same) {
                if waiting.connects {
                    queue.others.remove(at);
                    queue.connecting.push_back(waiting);
                } else {
                    queue.others[at] = waiting;
                }
            }
            return true;
        }
        if !self.take_room(owner) {
            return false;
        }
        self.waiting.insert(waiting.id);
        self.arrivals += 1;
        let since = (self.turns.count(), self.arrivals);
        let new = || OwnerQueue { since, connecting: VecDeque::new(), others: VecDeque::new() };
        let queue = self.by_owner.entry(owner).or_insert_with(new);
        if waiting.connects {
            queue.connecting.push_back(waiting);
        } else {
            queue.others.push_back(waiting);
        }
        true
    }

    /// Takes room for an attachment. False: the owner has too many.
    pub fn take_room(&mut self, owner: u32) -> bool {
        let payer = payer(owner);
        let has_room = owner == 0 || self.shares.used_by(payer) < MAX_USER_ATTACHMENTS;
        has_room && self.shares.try_take(payer, 1)
    }

    /// The next namespace. Its room stays taken until [`Self::give_back`].
    pub fn pop(&mut self) -> Option<Waiting<P>> {
        let prefers_connecting = self.connecting_turns < MAX_CONNECTING_TURNS;
        let order = |(owner, queue): &(&u32, &OwnerQueue<P>)| {
            let has_preferred = match prefers_connecting {
                true => !queue.connecting.is_empty(),
                false => !queue.others.is_empty(),
            };
            let (since, arrival) = queue.since;
            (!has_preferred, self.turns.waiting_since(payer(**owner), since), arrival)
        };
        let (&owner, _) = self.by_owner.iter().min_by_key(order)?;
        self.turns.note(payer(owner));
        let queue = self.by_owner.get_mut(&owner)?;
        let [first, second] = match prefers_connecting {
            true => [&mut queue.connecting, &mut queue.others],
            false => [&mut queue.others, &mut queue.connecting],
        };
        let next = first.pop_front().or_else(|| second.pop_front());
        let connects = next.as_ref().is_some_and(|next| next.connects);
        self.connecting_turns = if connects { self.connecting_turns + 1 } else { 0 };
        if queue.connecting.is_empty() && queue.others.is_empty() {
            self.by_owner.remove(&owner);
        }
        if let Some(next) = &next {
            self.waiting.remove(&next.id);
        }
        next
    }

    /// Gives back the room of this many attachments that failed or have ended.
    pub fn give_back(&mut self, owner: u32, attachments: usize) {
        self.shares.give_back(payer(owner), attachments);
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
        Waiting { id: NetnsId { inode, cookie: inode.into() }, owner, path: (), connects: false }
    }

    fn connecting(inode: u32, owner: u32) -> Waiting<()> {
        Waiting { connects: true, ..waiting(inode, owner) }
    }

    fn drain(queue: &mut NamespaceQueue<()>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).map(|next| next.id.inode).collect()
    }

    #[test]
    fn owners_take_turns_and_a_namespace_that_connects_comes_first() {
        let mut queue = NamespaceQueue::default();
        for inode in 1..=5 {
            assert!(queue.push(waiting(inode, 1_000)));
        }
        assert!(queue.push(waiting(10, 0)));
        assert!(queue.push(connecting(11, 1_001)));
        // It waits already.
        assert!(queue.push(connecting(4, 1_000)));
        assert!(queue.push(waiting(4, 1_000)));
        assert_eq!(queue.ids().count(), 7);
        assert_eq!(drain(&mut queue), [4, 11, 10, 1, 2, 3, 5]);
        assert!(queue.is_empty() && queue.pop().is_none());
    }

    #[test]
    fn a_namespace_that_waits_is_entered_by_the_newest_way() {
        let mut queue = NamespaceQueue::default();
        let by = |path, connects| Waiting { id: NetnsId { inode: 1, cookie: 1 }, owner: 0, path, connects };
        for (path, connects) in [("a", false), ("b", false), ("c", true), ("d", false)] {
            assert!(queue.push(by(path, connects)));
        }
        assert_eq!((queue.pop(), queue.pop()), (Some(by("d", true)), None));
        assert_eq!(queue.shares.used(), 1);
    }

    #[test]
    fn an_owner_who_floods_delays_another_by_one() {
        let mut queue = NamespaceQueue::default();
        for inode in 1..=200 {
            assert!(queue.push(connecting(inode, 65_534)));
        }
        assert!(queue.push(connecting(1_000, 70_000)));
        let order = drain(&mut queue);
        assert_eq!(order.iter().position(|inode| *inode == 1_000), Some(1));
    }

    #[test]
    fn an_owner_who_floods_delays_one_that_comes_again_by_one() {
        let mut queue = NamespaceQueue::default();
        for inode in 1..=200 {
            assert!(queue.push(connecting(inode, 65_534)));
        }
        for inode in [1_000, 1_001] {
            assert!(queue.pop().is_some_and(|next| next.owner == 65_534));
            assert!(queue.push(connecting(inode, 0)));
            let next = [queue.pop(), queue.pop()];
            assert!(next.contains(&Some(connecting(inode, 0))), "{next:?}");
        }
    }

    #[test]
    fn new_owners_pass_nobody() {
        let mut queue = NamespaceQueue::default();
        let owner = 200_000;
        assert!(queue.push(waiting(1, owner)) && queue.pop().is_some());
        assert!(queue.push(waiting(2, owner)));
        for owner in 100_000..100_100 {
            assert!(queue.push(waiting(owner, owner)));
        }
        assert_eq!(queue.pop().map(|next| next.id.inode), Some(2));
    }

    #[test]
    fn namespaces_that_connect_keep_no_other_from_its_turn() {
        let mut queue = NamespaceQueue::default();
        for inode in 1..=100 {
            assert!(queue.push(connecting(inode, 65_534)));
        }
        assert!(queue.push(waiting(1_000, 0)));
        let order = drain(&mut queue);
        assert_eq!(order.iter().position(|inode| *inode == 1_000), Some(MAX_CONNECTING_TURNS as usize));
    }

    #[test]
    fn a_namespace_with_many_devices_takes_a_turn_and_room_for_each() {
        let mut queue = NamespaceQueue::default();
        let (crowded, other) = (waiting(1, 65_534), waiting(2, 70_000));
        assert!(queue.push(crowded.clone()) && queue.push(other.clone()));
        let mut attached = 0;
        let mut order = Vec::new();
        while let Some(next) = queue.pop() {
            order.push(next.id.inode);
            if next == crowded {
                attached += 1;
                queue.push(next);
            }
        }
        assert_eq!(order[..3], [1, 2, 1], "another owner's namespace waits for one device");
        assert_eq!(attached, MAX_USER_ATTACHMENTS);
        assert!(queue.push(other), "another owner finds room");
        queue.give_back(65_534, attached);
        assert!(queue.push(crowded), "after the devices have ended");
    }

    #[test]
    fn an_owner_beyond_its_share_is_refused_and_another_is_not() {
        let mut queue = NamespaceQueue::default();
        let accepted = (1..=4_000).filter(|inode| queue.push(waiting(*inode, 65_534))).count();
        assert_eq!(accepted, MAX_USER_ATTACHMENTS);
        assert!(queue.push(waiting(9_000, 1_000)), "another owner finds room");
        // Also while they are guarded, and until they have ended.
        while queue.pop().is_some() {}
        assert!(!queue.push(waiting(9_001, 65_534)));
        queue.give_back(65_534, 2);
        assert!(queue.push(waiting(9_001, 65_534)));
    }

    #[test]
    fn root_has_three_quarters_of_the_room() {
        let mut queue = NamespaceQueue::default();
        let accepted = (1..=4_000).filter(|inode| queue.push(waiting(*inode, 0))).count();
        assert_eq!(accepted, MAX_ATTACHMENTS * 3 / 4);
        let accepted = (5_001..=9_000).filter(|inode| queue.push(waiting(*inode, 1_000))).count();
        assert_eq!(accepted, MAX_USER_ATTACHMENTS, "a user finds room beside it");
    }
}
