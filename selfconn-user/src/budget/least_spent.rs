//! Items of owners, for a time that may not suffice for all: the owner that has spent least comes next. What an owner
//! spends is counted for its user and for its control group, and the larger sum holds. Pure.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

use selfconn_ebpf::Owner;

use super::party::Party;

/// What an owner has spent, what its next item will probably cost, and the place of that item in the order.
type Turn = Reverse<(u64, u64, u32)>;

/// Refers to the items, because there may be many, and each queue of them has a bound in `budget::memory`.
#[derive(Debug)]
pub struct LeastSpent<'a, T, F> {
    items: &'a [T],
    /// The owner of an item, and its estimated cost.
    owner_and_estimate: F,
    /// The places of the items: in the order of their owners, and of an owner the cheapest first.
    order: Vec<u32>,
    /// One for each owner with items. What it had spent then.
    turns: BinaryHeap<Turn>,
    spent: HashMap<Party, u64>,
}

/// Bytes of a queue for each item.
pub const QUEUED_ITEM_BYTES: usize = size_of::<u32>();

/// Bytes of a queue for each owner that has items: one that is known by its user and by itself. A table of the standard
/// library is at least seven sixteenths full.
pub const QUEUED_OWNER_BYTES: usize = size_of::<Turn>() + 2 * (size_of::<(Party, u64)>() + 1) * 16 / 7;

impl<'a, T, F: Fn(&T) -> (Owner, u64)> LeastSpent<'a, T, F> {
    /// The items, with a function that gives the owner and the estimated cost of each. An estimate decides only which
    /// item of an owner, and of two owners that have spent the same, comes first.
    pub fn new(items: &'a [T], owner_and_estimate: F) -> Self {
        let mut order: Vec<u32> = (0..u32::try_from(items.len()).unwrap_or(u32::MAX)).collect();
        order.sort_unstable_by_key(|item| owner_and_estimate(&items[*item as usize]));
        let key = |place: u32| owner_and_estimate(&items[order[place as usize] as usize]);
        let places = 0..u32::try_from(order.len()).unwrap_or(u32::MAX);
        let is_first = |place: &u32| *place == 0 || key(place - 1).0 != key(*place).0;
        let firsts = || places.clone().filter(is_first);
        let mut turns = Vec::with_capacity(firsts().count());
        turns.extend(firsts().map(|place| Reverse((0, key(place).1, place))));
        // The owners and their users. It does not grow: then it would be twice in memory for a moment.
        let spent = HashMap::with_capacity(2 * turns.len());
        Self { items, owner_and_estimate, order, turns: turns.into(), spent }
    }

    /// The next item. Its cost must be charged before the one after it.
    pub fn pop(&mut self) -> Option<(Owner, &'a T)> {
        loop {
            let Reverse((known, estimate, place)) = self.turns.pop()?;
            let (owner, _, item) = self.at(place)?;
            let spent = self.spent(owner);
            if spent > known {
                self.turns.push(Reverse((spent, estimate, place)));
                continue;
            }
            if let Some((_, next, _)) = self.at(place + 1).filter(|(other, ..)| *other == owner) {
                self.turns.push(Reverse((spent, next, place + 1)));
            }
            return Some((owner, item));
        }
    }

    /// The owner and the estimated cost of the item at a place of the order, and the item.
    fn at(&self, place: u32) -> Option<(Owner, u64, &'a T)> {
        let item = self.items.get(*self.order.get(place as usize)? as usize)?;
        let (owner, estimate) = (self.owner_and_estimate)(item);
        Some((owner, estimate, item))
    }

    pub fn charge(&mut self, owner: Owner, cost: u64) {
        for party in Party::of(owner) {
            let spent = self.spent.entry(party).or_default();
            *spent = spent.saturating_add(cost);
        }
    }

    fn spent(&self, owner: Owner) -> u64 {
        Party::of(owner).filter_map(|party| self.spent.get(&party)).max().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All items in the order in which they come if each costs as much as this function says.
    fn order<T: Copy>(items: impl Iterator<Item = (Owner, u64, T)>, cost: impl Fn(&T) -> u64) -> Vec<T> {
        let items: Vec<_> = items.collect();
        let mut queue = LeastSpent::new(&items, |(owner, estimate, _)| (*owner, *estimate));
        let mut order = Vec::new();
        while let Some((owner, (.., item))) = queue.pop() {
            queue.charge(owner, cost(item));
            order.push(*item);
        }
        order
    }

    #[test]
    fn an_owner_whose_items_cost_more_than_estimated_waits_for_the_others() {
        let items = (0..1_000).map(|_| (Owner::new(1_000, 7), 0, "costly"));
        let others = (0..100).map(|_| (Owner::new(1_001, 8), 50, "cheap"));
        let cost = |item: &&str| if *item == "costly" { 10_000 } else { 50 };
        let order = order(items.chain(others), cost);
        assert_eq!(order[..101].iter().filter(|item| **item == "cheap").count(), 100);
        assert_eq!(order.len(), 1_100);
    }

    #[test]
    fn neither_many_users_of_a_control_group_nor_many_sessions_of_a_user_come_earlier() {
        let users = (0..1_000).map(|uid| (Owner::new(100_000 + uid, 7), 10, "users"));
        let sessions = (0..1_000).map(|cgroup| (Owner::new(1_000, 100 + cgroup), 10, "sessions"));
        let others = (0..10).map(|_| (Owner::new(1_001, 8), 20, "other"));
        let order = order(users.chain(sessions).chain(others), |_| 10);
        assert!(order[..30].iter().filter(|item| **item == "other").count() >= 9, "{:?}", &order[..30]);
    }

    #[test]
    fn root_is_another_owner_in_each_control_group() {
        let services = (0..100).map(|cgroup| (Owner::new(0, 1 + cgroup), 10, "a service"));
        let flood = (0..100).map(|_| (Owner::new(1_000, 500), 10, "a flood"));
        let order = order(flood.chain(services), |_| 10);
        assert_eq!(order[..101].iter().filter(|item| **item == "a service").count(), 100);
    }

    #[test]
    fn the_cheapest_of_an_owner_comes_first() {
        let owner = Owner::new(0, 1);
        assert_eq!(order([(owner, 30, 3), (owner, 10, 1), (owner, 20, 2)].into_iter(), |_| 1), [1, 2, 3]);
    }

    #[test]
    fn a_queue_has_no_more_memory_than_its_bound_says() {
        // An owner of each item, which is the worst case.
        let owners: Vec<_> = (0..10_000).map(|number| Owner::new(1 + number, 0)).collect();
        let mut queue = LeastSpent::new(&owners, |owner| (*owner, 0));
        while let Some((owner, _)) = queue.pop() {
            queue.charge(owner, 1);
        }
        let LeastSpent { order, turns, spent, .. } = queue;
        assert!(order.capacity() * size_of::<u32>() <= owners.len() * QUEUED_ITEM_BYTES);
        let slots = (spent.capacity() * 8).div_ceil(7).next_power_of_two();
        let of_owners = turns.capacity() * size_of::<Turn>() + slots * (size_of::<(Party, u64)>() + 1);
        assert!(of_owners <= owners.len() * QUEUED_OWNER_BYTES, "{of_owners}");
    }
}
