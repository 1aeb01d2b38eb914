//! Items of owners, for a time that may not suffice for all: the owner that has spent least comes next. What an owner
//! spends is counted for its user and for its control group, and the larger sum holds. Pure.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use selfconn_ebpf::Owner;

use super::party::Party;

/// What an owner has spent, what its next item will probably cost, and the owner.
type Turn = Reverse<(u64, u64, Owner)>;

#[derive(Debug)]
pub struct LeastSpent<T> {
    /// With their estimated costs, the cheapest first.
    by_owner: HashMap<Owner, VecDeque<(u64, T)>>,
    /// One for each owner with items. What it had spent then.
    turns: BinaryHeap<Turn>,
    spent: HashMap<Party, u64>,
}

impl<T> LeastSpent<T> {
    /// The items with their owners and estimated costs. An estimate decides only which item of an owner, and of two
    /// owners that have spent the same, comes first.
    pub fn new(mut items: Vec<(Owner, u64, T)>) -> Self {
        items.sort_by_key(|(_, estimate, _)| *estimate);
        let mut by_owner: HashMap<Owner, VecDeque<(u64, T)>> = HashMap::new();
        for (owner, estimate, item) in items {
            by_owner.entry(owner).or_default().push_back((estimate, item));
        }
        let first =
            |(owner, items): (&Owner, &VecDeque<(u64, T)>)| Some(Reverse((0, items.front()?.0, *owner)));
        let turns = by_owner.iter().filter_map(first).collect();
        Self { by_owner, turns, spent: HashMap::new() }
    }

    /// The next item. Its cost must be charged before the one after it.
    pub fn pop(&mut self) -> Option<(Owner, T)> {
        loop {
            let Reverse((known, estimate, owner)) = self.turns.pop()?;
            let spent = self.spent(owner);
            if spent > known {
                self.turns.push(Reverse((spent, estimate, owner)));
                continue;
            }
            let items = self.by_owner.get_mut(&owner)?;
            let (_, item) = items.pop_front()?;
            if let Some((next, _)) = items.front() {
                self.turns.push(Reverse((spent, *next, owner)));
            }
            return Some((owner, item));
        }
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
    fn order<T>(items: Vec<(Owner, u64, T)>, cost: impl Fn(&T) -> u64) -> Vec<T> {
        let mut items = LeastSpent::new(items);
        let mut order = Vec::new();
        while let Some((owner, item)) = items.pop() {
            items.charge(owner, cost(&item));
            order.push(item);
        }
        order
    }

    #[test]
    fn an_owner_whose_items_cost_more_than_estimated_waits_for_the_others() {
        let items = (0..1_000).map(|_| (Owner::new(1_000, 7), 0, "costly"));
        let others = (0..100).map(|_| (Owner::new(1_001, 8), 50, "cheap"));
        let cost = |item: &&str| if *item == "costly" { 10_000 } else { 50 };
        let order = order(items.chain(others).collect(), cost);
        assert_eq!(order[..101].iter().filter(|item| **item == "cheap").count(), 100);
        assert_eq!(order.len(), 1_100);
    }

    #[test]
    fn neither_many_users_of_a_control_group_nor_many_sessions_of_a_user_come_earlier() {
        let users = (0..1_000).map(|uid| (Owner::new(100_000 + uid, 7), 10, "users"));
        let sessions = (0..1_000).map(|cgroup| (Owner::new(1_000, 100 + cgroup), 10, "sessions"));
        let others = (0..10).map(|_| (Owner::new(1_001, 8), 20, "other"));
        let order = order(users.chain(sessions).chain(others).collect(), |_| 10);
        assert!(order[..30].iter().filter(|item| **item == "other").count() >= 9, "{:?}", &order[..30]);
    }

    #[test]
    fn root_is_another_owner_in_each_control_group() {
        let services = (0..100).map(|cgroup| (Owner::new(0, 1 + cgroup), 10, "a service"));
        let flood = (0..100).map(|_| (Owner::new(1_000, 500), 10, "a flood"));
        let order = order(flood.chain(services).collect(), |_| 10);
        assert_eq!(order[..101].iter().filter(|item| **item == "a service").count(), 100);
    }

    #[test]
    fn the_cheapest_of_an_owner_comes_first() {
        let owner = Owner::new(0, 1);
        assert_eq!(order(vec![(owner, 30, 3), (owner, 10, 1), (owner, 20, 2)], |_| 1), [1, 2, 3]);
    }
}
