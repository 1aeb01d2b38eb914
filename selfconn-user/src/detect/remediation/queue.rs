//! The connections that wait for the remedy. An owner's are taken by when they are due; the owners take turns, so that
//! the connections of one owner do not delay those of another. The turns are those of control groups first, and
//! those of the users of a group second, so that a container's root who changes uids gains nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use super::RemedyRequest;
use crate::{
    budget::{
        Payer,
        memory::{self, MAX_OWNER_REMEDIES, MAX_REMEDIES},
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
struct Group {
    cgroup: Option<Arc<str>>,
    /// The owners of the group that have waiting connections; the first one is next. Never empty.
    owners: VecDeque<Payer>,
    /// Number of waiting connections.
    waiting: usize,
}

#[derive(Debug, Default)]
pub(super) struct RemedyQueue {
    /// By owner. None of the maps is empty.
    by_owner: HashMap<Payer, BTreeMap<DueKey, WaitingConnection>>,
    /// The control groups of the waiting connections; the first one is next.
    turns: VecDeque<Group>,
    /// Each waiting connection by its number.
    keys: HashMap<u64, (Payer, u64)>,
    by_due: BTreeSet<DueKey>,
    /// Those whose wait has not been reported.
    unreported: BTreeSet<DueKey>,
}

impl RemedyQueue {
    /// Adds a connection. Returns the one that is pushed out if there is no room: the owner's last one if the
    /// owner's share is full, else one of the control group that has the most.
    pub(super) fn insert(
        &mut self,
        owner: Payer,
        due_ns: u64,
        waiting: WaitingConnection,
    ) -> Option<WaitingConnection> {
        let key = (due_ns, waiting.request.number);
        self.remove(key.1);
        let of_owner = self.by_owner.entry(owner.clone()).or_default();
        let is_new = of_owner.is_empty();
        of_owner.insert(key, waiting);
        let is_share_full = of_owner.len() > MAX_OWNER_REMEDIES;
        let group_at = self.turns.iter().position(|group| group.cgroup == owner.cgroup);
        let group_at = group_at.unwrap_or_else(|| {
            let cgroup = owner.cgroup.clone();
            self.turns.push_back(Group { cgroup, owners: VecDeque::new(), waiting: 0 });
            self.turns.len() - 1
        });
        let group = &mut self.turns[group_at];
        group.waiting += 1;
        if is_new {
            group.owners.push_back(owner.clone());
        }
        self.keys.insert(key.1, (owner.clone(), due_ns));
        self.by_due.insert(key);
        self.unreported.insert(key);
        let payer = match (is_share_full, self.keys.len() > MAX_REMEDIES) {
            (true, _) => owner,
            (false, true) => {
                let largest = self.turns.iter().max_by_key(|group| group.waiting)?;
                if largest.cgroup == owner.cgroup { owner } else { largest.owners.back()?.clone() }
            }
            (false, false) => return None,
        };
        let (_, last) = *self.by_owner.get(&payer)?.last_key_value()?.0;
        self.remove(last)
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<WaitingConnection> {
        let (owner, due_ns) = self.keys.remove(&number)?;
        self.by_due.remove(&(due_ns, number));
        self.unreported.remove(&(due_ns, number));
        let of_owner = self.by_owner.get_mut(&owner)?;
        let waiting = of_owner.remove(&(due_ns, number));
        let is_owner_done = of_owner.is_empty();
        let group_at = self.turns.iter().position(|group| group.cgroup == owner.cgroup)?;
        let group = &mut self.turns[group_at];
        group.waiting -= 1;
        if is_owner_done {
            self.by_owner.remove(&owner);
            group.owners.retain(|other| *other != owner);
            if group.owners.is_empty() {
                self.turns.remove(group_at);
            }
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
        let due = |owner: &Payer| {
            let ((due_ns, number), _) = self.by_owner.get(owner)?.first_key_value()?;
            (*due_ns <= now_ns).then_some(*number)
        };
        let (group_at, (at, number)) = self.turns.iter().enumerate().find_map(|(group_at, group)| {
            let mut owners = group.owners.iter().enumerate();
            Some((group_at, owners.find_map(|(at, owner)| Some((at, due(owner)?)))?))
        })?;
        let mut group = self.turns.remove(group_at)?;
        if let Some(owner) = group.owners.remove(at) {
            group.owners.push_back(owner);
        }
        self.turns.push_back(group);
        self.remove(number)
    }

    /// The connections that are due and whose wait has not been reported. From now on it has.
    pub(super) fn report_overdue(&mut self, now_ns: u64) -> Vec<&WaitingConnection> {
        let mut overdue = Vec::new();
        while let Some(key) = self.unreported.first().copied().filter(|(due_ns, _)| *due_ns <= now_ns) {
            self.unreported.remove(&key);
            overdue.push(key);
        }
        let waiting = |key: DueKey| self.by_owner.get(&self.keys.get(&key.1)?.0)?.get(&key);
        overdue.into_iter().filter_map(waiting).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::remediation::tests::request;

    fn insert(queue: &mut RemedyQueue, uid: u32, due_ns: u64, number: u64) -> Option<u64> {
        let waiting = WaitingConnection { fields: ConnectionFields::sample(), request: request(number) };
        queue
            .insert(Payer { uid: Some(uid), cgroup: None }, due_ns, waiting)
            .map(|pushed_out| pushed_out.request.number)
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
            assert_eq!(insert(&mut queue, uid, due_ns, number), None);
        }
        assert_eq!((queue.first_due_ns(), queue.first_unreported_ns()), (Some(3), Some(3)));
        assert_eq!(take(&mut queue, 10), [2, 7, 6, 3, 5, 1, 4]);
        assert_eq!(take(&mut queue, 20), [8]);
        assert!(queue.turns.is_empty() && queue.by_owner.is_empty() && queue.keys.is_empty());
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

    #[test]
    fn an_owner_whose_share_is_full_loses_its_own_last_one() {
        let mut queue = RemedyQueue::default();
        let limit = MAX_OWNER_REMEDIES as u64;
        for number in 1..=limit {
            assert_eq!(insert(&mut queue, 0, number, number), None);
        }
        assert_eq!(insert(&mut queue, 0, limit + 1, limit + 1), Some(limit + 1));
        assert_eq!(insert(&mut queue, 0, 0, 9_999_999), Some(limit));
        assert_eq!(insert(&mut queue, 1, 0, 7_777_777), None);
    }

    #[test]
    fn who_changes_uids_in_one_control_group_gains_no_turns() {
        let mut queue = RemedyQueue::default();
        let mut insert_of = |uid, cgroup: &str, number| {
            let owner = Payer { uid: Some(uid), cgroup: Some(cgroup.into()) };
            let waiting = WaitingConnection { fields: ConnectionFields::sample(), request: request(number) };
            queue.insert(owner, 1, waiting).map(|pushed_out| pushed_out.request.number)
        };
        for number in 1..=MAX_REMEDIES as u64 {
            assert_eq!(insert_of(number as u32, "/docker/a", number), None);
        }
        let victims = [MAX_REMEDIES as u64 + 1, MAX_REMEDIES as u64 + 2];
        for number in victims {
            assert!(insert_of(0, "/system.slice/b.service", number).is_some_and(|out| out < victims[0]));
        }
        let first: Vec<_> = take(&mut queue, 1).into_iter().take(4).collect();
        assert_eq!(first.iter().filter(|number| victims.contains(number)).count(), 2, "{first:?}");
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
