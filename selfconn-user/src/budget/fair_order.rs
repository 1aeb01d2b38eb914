//! The order in which owners' items are handled if the time may not suffice for all. Pure.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

use super::party::Party;

/// Puts items with their costs in an order: an item comes after as much as its owner's items up to it cost together,
/// the cheapest first. So an item waits for no more of each other owner than of its own. What an owner's items cost is
/// counted for its user and for its control group, and the larger sum holds.
pub fn cheapest_owners_first<T>(mut items: Vec<(Owner, u64, T)>) -> Vec<T> {
    items.sort_by_key(|(_, cost, _)| *cost);
    let mut spent: HashMap<Party, u64> = HashMap::new();
    let mut ranked: Vec<(u64, T)> = items
        .into_iter()
        .map(|(owner, cost, item)| {
            let sums = Party::of(owner).map(|party| {
                let sum = spent.entry(party).or_default();
                *sum = sum.saturating_add(cost);
                *sum
            });
            (sums.max().unwrap_or(cost), item)
        })
        .collect();
    ranked.sort_by_key(|(sum, _)| *sum);
    ranked.into_iter().map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_with_little_comes_before_most_of_one_with_much() {
        let one = |number| (Owner::new(1_000, 7), 100, (1_000, number));
        let mut items: Vec<_> = (0..1_000).map(one).collect();
        items.push((Owner::new(1_001, 8), 250, (1_001, 0)));
        let order = cheapest_owners_first(items);
        let position = order.iter().position(|item| *item == (1_001, 0)).unwrap();
        assert_eq!(position, 2, "{:?}", &order[..4]);
        assert_eq!(order.len(), 1_001);
    }

    #[test]
    fn neither_many_users_of_a_control_group_nor_many_sessions_of_a_user_come_earlier() {
        let users = (0..1_000).map(|uid| (Owner::new(100_000 + uid, 7), 100, "users"));
        let sessions = (0..1_000).map(|cgroup| (Owner::new(1_000, 100 + cgroup), 100, "sessions"));
        let items = users.chain(sessions).chain([(Owner::new(1_001, 8), 150, "other")]).collect();
        let order = cheapest_owners_first(items);
        assert_eq!(order[2], "other", "{:?}", &order[..4]);
    }

    #[test]
    fn root_is_another_owner_in_each_control_group() {
        let services = (0..100).map(|cgroup| (Owner::new(0, 1 + cgroup), 10, "a service"));
        let flood = (0..100).map(|_| (Owner::new(1_000, 500), 10, "a flood"));
        let order = cheapest_owners_first(flood.chain(services).collect());
        assert!(order[..101].iter().filter(|item| **item == "a service").count() == 100);
    }

    #[test]
    fn the_cheapest_of_an_owner_comes_first() {
        let owner = Owner::new(0, 1);
        let order = cheapest_owners_first(vec![(owner, 30, 3), (owner, 10, 1), (owner, 20, 2)]);
        assert_eq!(order, [1, 2, 3]);
    }
}
