//! The connections that wait for the remedy. An owner's are taken by when they are due. Owners take turns, as in
//! `budget::turns`, and share the room, so the connections of one user delay those of another by one, and take no room
//! from them, however many sessions or uids he has.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use selfconn_ebpf::Owner;

use super::RemedyRequest;
use crate::{
    budget::{
        SharedLimit, Turns,
        memory::{self, MAX_REMEDIES},
    },
    event::ConnectionFields,
};

#[derive(Debug)]
pub(super) struct WaitingConnection {
    pub(super) fields: ConnectionFields,
    pub(super) request: RemedyRequest,
}

// Beside the entry: its texts, the keys of five tables, and half of a `BTreeMap` node that is not full.
const _: () = assert!(size_of::<WaitingConnection>() + 512 <= memory::REMEDY_BYTES);

/// When a connection is due, and its number: the order within an owner.
type DueKey = (u64, u64);

#[derive(Debug)]
struct OwnerQueue {
    /// The number of turns when its first connection came.
    since: u64,
    /// Never empty.
    connections: BTreeMap<DueKey, WaitingConnection>,
}

#[derive(Debug)]
pub(super) struct RemedyQueue {
    by_owner: HashMap<Owner, OwnerQueue>,
    turns: Turns,
    /// The room for waiting connections.
    shares: SharedLimit,
    /// Each waiting connection by its number.
    keys: HashMap<u64, (Owner, u64)>,
    by_due: BTreeSet<DueKey>,
    /// Those whose wait has not been reported.
    unreported: BTreeSet<DueKey>,
}

impl Default for RemedyQueue {
    fn default() -> Self {
        Self {
            by_owner: HashMap::new(),
            turns: Turns::default(),
            shares: SharedLimit::new(MAX_REMEDIES),
            keys: HashMap::new(),
            by_due: BTreeSet::new(),
            unreported: BTreeSet::new(),
        }
    }
}

impl RemedyQueue {
    /// Adds a connection. Returns it if its owner has no room for it.
    pub(super) fn insert(
        &mut self,
        owner: Owner,
        due_ns: u64,
        waiting: WaitingConnection,
    ) -> Option<WaitingConnection> {
        let key = (due_ns, waiting.request.number);
        self.remove(key.1);
        if !self.shares.try_take(owner, 1) {
            return Some(waiting);
        }
        let since = self.turns.count();
        let new = || OwnerQueue { since, connections: BTreeMap::new() };
        self.by_owner.entry(owner).or_insert_with(new).connections.insert(key, waiting);
        self.keys.insert(key.1, (owner, due_ns));
        self.by_due.insert(key);
        self.unreported.insert(key);
        None
    }

    /// Why there is no room for a connection of this owner.
    pub(super) fn refusal(&self, owner: Owner) -> String {
        let (all, own) = (self.shares.used(), self.shares.used_by_party(owner));
        format!(
            "no room to wait: {all} connections wait already, {own} of them of its user or its control group"
        )
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<WaitingConnection> {
        let (owner, due_ns) = self.keys.remove(&number)?;
        let key = (due_ns, number);
        self.by_due.remove(&key);
        self.unreported.remove(&key);
        self.shares.give_back(owner, 1);
        let queue = self.by_owner.get_mut(&owner)?;
        let waiting = queue.connections.remove(&key);
        if queue.connections.is_empty() {
            self.by_owner.remove(&owner);
        }
        waiting
    }

    /// When the first connection is due.
    pub(super) fn first_due_ns(&self) -> Option<u64> {
        self.by_due.first().map(|(due_ns, _)| *due_ns)
    }

    /// When the first connection is due whose wait has not been reported.
    pub(super) fn first_unreported_ns(&self) -> Option<u64> {
        self.unreported.first().map(|(due_ns, _)| *due_ns)
    }

    /// Takes the connection that is due first of the owner whose turn it is.
    pub(super) fn take_due(&mut self, now_ns: u64) -> Option<WaitingConnection> {
        let order = |(owner, queue): (&Owner, &OwnerQueue)| {
            let (key, _) = queue.connections.first_key_value()?;
            let since = self.turns.waiting_since(*owner, queue.since);
            (key.0 <= now_ns).then_some((since, *key, *owner))
        };
        let (_, (_, number), owner) = self.by_owner.iter().filter_map(order).min()?;
        self.turns.note(owner);
        self.remove(number)
    }

    /// The connections that are due and whose wait has not been reported. From now on it has.
    pub(super) fn report_overdue(&mut self, now_ns: u64) -> Vec<&WaitingConnection> {
        let mut overdue = Vec::new();
        while let Some(key) = self.unreported.first().copied().filter(|(due_ns, _)| *due_ns <= now_ns) {
            self.unreported.remove(&key);
            overdue.push(key);
        }
        let waiting = |key: DueKey| self.by_owner.get(&self.keys.get(&key.1)?.0)?.connections.get(&key);
        overdue.into_iter().filter_map(waiting).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::remediation::tests::request;

    /// True if there is room for it.
    fn insert_of(queue: &mut RemedyQueue, owner: Owner, due_ns: u64, number: u64) -> bool {
        let waiting = WaitingConnection { fields: ConnectionFields::sample(), request: request(number) };
        queue.insert(owner, due_ns, waiting).is_none()
    }

    fn insert(queue: &mut RemedyQueue, uid: u32, due_ns: u64, number: u64) -> bool {
        insert_of(queue, Owner::new(uid, 0), due_ns, number)
    }

    fn take(queue: &mut RemedyQueue, now_ns: u64) -> Vec<u64> {
        std::iter::from_fn(|| queue.take_due(now_ns)).map(|waiting| waiting.request.number).collect()
    }

    #[test]
    fn owners_take_turns_and_each_ones_connections_are_taken_by_when_they_are_due() {
        let mut queue = RemedyQueue::default();
        for (uid, due_ns, number) in
            [(1, 5, 1), (1, 3, 2), (1, 4, 3), (1, 9, 4), (2, 8, 5), (3, 6, 6), (2, 7, 7), (3, 20, 8)]
        {
            assert!(insert(&mut queue, uid, due_ns, number));
        }
        assert_eq!((queue.first_due_ns(), queue.first_unreported_ns()), (Some(3), Some(3)));
        assert_eq!(take(&mut queue, 10), [2, 6, 7, 3, 5, 1, 4]);
        assert_eq!(take(&mut queue, 20), [8]);
        assert!(queue.by_owner.is_empty() && queue.keys.is_empty() && queue.shares.used() == 0);
        assert!(queue.by_due.is_empty() && queue.unreported.is_empty());
    }

    #[test]
    fn a_single_owner_keeps_the_order_in_which_its_connections_are_due() {
        let mut queue = RemedyQueue::default();
        for number in 1..=9 {
            insert(&mut queue, 1, 100 - number, number);
        }
        queue.remove(4);
        assert_eq!(take(&mut queue, 100), [9, 8, 7, 6, 5, 3, 2, 1]);
    }

    /// Numbers of the connections, one of each of these owners, for which there is room.
    fn fill(queue: &mut RemedyQueue, owners: impl Iterator<Item = Owner>) -> Vec<u64> {
        let numbered = owners.zip(1..);
        numbered.filter_map(|(owner, number)| insert_of(queue, owner, 1, number).then_some(number)).collect()
    }

    /// Owners of many connections that are one user's, or one container's.
    fn floods() -> [Vec<Owner>; 3] {
        let count = 2 * MAX_REMEDIES as u32;
        let one_session = (0..count).map(|_| Owner::new(1_000, 7));
        let sessions = (0..count).map(|number| Owner::new(1_000, 100 + u64::from(number % 10)));
        let uids = (0..count).map(|number| Owner::new(100_000 + number, 7));
        [one_session.collect(), sessions.collect(), uids.collect()]
    }

    #[test]
    fn neither_more_sessions_nor_more_uids_have_more_room() {
        let room = floods().map(|owners| {
            let mut queue = RemedyQueue::default();
            let room = fill(&mut queue, owners.into_iter()).len();
            for (number, owner) in (1_000_000..).zip([Owner::new(0, 1), Owner::new(5, 5), Owner::new(0, 2)]) {
                assert!(insert_of(&mut queue, owner, 1, number), "another owner has room");
            }
            queue.remove(1);
            assert!(insert_of(&mut queue, Owner::new(5, 5), 1, 1), "what has ended gives its room back");
            room
        });
        assert_eq!(room, [MAX_REMEDIES * 3 / 4, MAX_REMEDIES * 7 / 8, MAX_REMEDIES * 7 / 8]);
    }

    #[test]
    fn neither_more_sessions_nor_more_uids_have_more_turns() {
        for owners in floods() {
            let flood = owners[0];
            let mut queue = RemedyQueue::default();
            fill(&mut queue, owners.into_iter());
            for _ in 0..20 {
                assert!(queue.take_due(1).is_some());
            }
            // One service of root, and another one that comes again and again.
            let victims = [1_000_000, 1_000_001, 1_000_002];
            for (number, owner) in victims.into_iter().zip([8, 9, 9].map(|cgroup| Owner::new(0, cgroup))) {
                assert!(insert_of(&mut queue, owner, 1, number));
            }
            let next: Vec<_> = (0..6).filter_map(|_| queue.take_due(1)).collect();
            let next: Vec<_> = next.iter().map(|waiting| waiting.request.number).collect();
            assert!(victims.iter().all(|victim| next.contains(victim)), "{flood:?}: {next:?}");
        }
    }

    #[test]
    fn the_services_of_root_have_a_turn_each() {
        let mut queue = RemedyQueue::default();
        for number in 1..=30 {
            assert!(insert_of(&mut queue, Owner::new(0, 1 + number % 3), number, number));
        }
        assert!(insert_of(&mut queue, Owner::new(1_000, 9), 0, 100));
        let first: Vec<_> = take(&mut queue, 100).into_iter().take(8).collect();
        assert_eq!(first, [100, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_wait_is_reported_once_also_if_it_began_earlier_than_reported_ones() {
        let mut queue = RemedyQueue::default();
        let reported = |queue: &mut RemedyQueue, now_ns| -> Vec<u64> {
            queue.report_overdue(now_ns).iter().map(|waiting| waiting.request.number).collect()
        };
        insert(&mut queue, 1, 5, 1);
        insert(&mut queue, 2, 6, 2);
        insert(&mut queue, 1, 20, 3);
        assert_eq!(reported(&mut queue, 10), [1, 2]);
        insert(&mut queue, 3, 4, 4);
        assert_eq!(reported(&mut queue, 10), [4]);
        assert!(reported(&mut queue, 10).is_empty());
        assert_eq!(queue.first_unreported_ns(), Some(20));
    }
}
