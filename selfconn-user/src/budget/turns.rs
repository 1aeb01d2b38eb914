//! Whose turn it is, among owners that wait: that of the owner whose last turn, or whose arrival if that is later, is
//! longest ago. A turn of an owner is one of its user and one of its control group, too: who has several sessions or
//! many uids gains none. Among owners for whom that is the same, such as the users of one control group, their own
//! turns count. Pure.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

use super::party::{Party, have_common_party};

/// When this many parties are remembered, those whose turn is longest ago are forgotten.
const MAX_PARTIES: usize = 4_096;

#[derive(Debug, Default)]
pub struct Turns {
    last: HashMap<Party, u64>,
    count: u64,
}

impl Turns {
    /// Number of turns so far: the arrival of an owner that comes now.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Since which turn an owner waits: for one of any of its parties, and for one of its own. The smallest pair is
    /// next.
    #[must_use]
    pub fn waiting_since(&self, owner: Owner, arrival: u64) -> (u64, u64) {
        let since = |turn: Option<&u64>| turn.copied().unwrap_or(0).max(arrival);
        let of_parties = since(Party::of(owner).filter_map(|party| self.last.get(&party)).max());
        let of_owner = since(self.last.get(&Party::Owner(owner)));
        (of_parties, of_owner)
    }

    /// The owner has its turn now.
    pub fn note(&mut self, owner: Owner) {
        self.count += 1;
        self.last.extend(Party::of(owner).map(|party| (party, self.count)));
        if self.last.len() > MAX_PARTIES {
            // A turn is one of three parties at most.
            let forgotten = self.count - MAX_PARTIES as u64 / 6;
            self.last.retain(|_, turn| *turn > forgotten);
        }
    }
}

/// The first items of owners that take turns, `max` at most, in the order of the turns. An owner's items come in the
/// order of their keys. It takes as many looks at each item as it returns items, and a look no look-up in a table.
#[must_use]
pub fn first_in_turns<K: Ord + Copy, T>(mut items: Vec<(K, Owner, T)>, max: usize) -> Vec<T> {
    let mut turns: Vec<Owner> = Vec::with_capacity(max);
    let mut first = Vec::with_capacity(max);
    while first.len() < max {
        let waiting_since = |owner: Owner| {
            let last = |has_turn: &dyn Fn(Owner) -> bool| turns.iter().rposition(|turn| has_turn(*turn));
            (last(&|turn| have_common_party(turn, owner)), last(&|turn| turn == owner))
        };
        let order = |(_, (key, owner, _)): &(usize, &(K, Owner, T))| (waiting_since(*owner), *key);
        let next = items.iter().enumerate().min_by_key(order).map(|(place, _)| place);
        let Some(place) = next else { break };
        let (_, owner, item) = items.swap_remove(place);
        turns.push(owner);
        first.push(item);
    }
    first
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::budget::FairQueue;

    #[test]
    fn no_more_parties_are_remembered_than_allowed_and_the_last_ones_are() {
        let mut turns = Turns::default();
        let owner = |number: u64| Owner::new(number as u32, number);
        let newest = 3 * MAX_PARTIES as u64;
        for number in 1..=newest {
            turns.note(owner(number));
            assert!(turns.last.len() <= MAX_PARTIES + 3);
        }
        assert!(turns.waiting_since(owner(newest - 100), 0) < turns.waiting_since(owner(newest), 0));
        assert!(turns.waiting_since(owner(1), 0) < turns.waiting_since(owner(newest - 100), 0));
    }

    proptest! {
        #[test]
        fn the_first_in_turns_are_those_of_a_queue(
            owners in vec((0..4_u32, 0..4_u64), 0..40),
            max in 0..12_usize,
        ) {
            let items = || owners.iter().enumerate().map(|(key, (uid, cgroup))| (key, Owner::new(*uid, *cgroup), key));
            let mut queue = FairQueue::default();
            items().for_each(|(_, owner, item)| queue.push(owner, item));
            let expected: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(_, item)| item).take(max).collect();
            prop_assert_eq!(first_in_turns(items().rev().collect(), max), expected);
        }
    }
}
