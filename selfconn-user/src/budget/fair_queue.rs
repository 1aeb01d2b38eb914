//! A queue in which owners take turns, as in `turns`. An owner that arrives waits for one item of each owner that was
//! there before, and for no other. Pure.

use std::collections::{HashMap, VecDeque};

use selfconn_ebpf::Owner;

use super::Turns;

#[derive(Debug)]
struct OwnerQueue<T> {
    /// The number of turns when the first item came.
    since: u64,
    /// In the order in which they came, with their numbers.
    items: VecDeque<(u64, T)>,
}

#[derive(Debug)]
pub struct FairQueue<T> {
    /// None of the queues is empty.
    by_owner: HashMap<Owner, OwnerQueue<T>>,
    turns: Turns,
    /// Number of items that ever came.
    pushed: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { by_owner: HashMap::new(), turns: Turns::default(), pushed: 0 }
    }
}

impl<T> FairQueue<T> {
    pub fn push(&mut self, owner: Owner, item: T) {
        let since = self.turns.count();
        self.pushed += 1;
        let queue =
            self.by_owner.entry(owner).or_insert_with(|| OwnerQueue { since, items: VecDeque::new() });
        queue.items.push_back((self.pushed, item));
    }

    /// The oldest item of the next owner.
    pub fn pop(&mut self) -> Option<(Owner, T)> {
        self.pop_among(|_| true)
    }

    /// The oldest item of the next one of the owners for which `may_have_turn` is true.
    pub fn pop_among(&mut self, may_have_turn: impl Fn(Owner) -> bool) -> Option<(Owner, T)> {
        let order = |(owner, queue): &(&Owner, &OwnerQueue<T>)| {
            let oldest = queue.items.front().map(|(number, _)| *number);
            (self.turns.waiting_since(**owner, queue.since), oldest)
        };
        let owners = self.by_owner.iter().filter(|(owner, _)| may_have_turn(**owner));
        let (&owner, _) = owners.min_by_key(order)?;
        self.turns.note(owner);
        let queue = self.by_owner.get_mut(&owner)?;
        let (_, item) = queue.items.pop_front()?;
        if queue.items.is_empty() {
            self.by_owner.remove(&owner);
        }
        Some((owner, item))
    }

    /// The owners of all items, each once.
    pub fn owners(&self) -> impl Iterator<Item = Owner> {
        self.by_owner.keys().copied()
    }

    /// All items, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.by_owner.values().flat_map(|queue| queue.items.iter().map(|(_, item)| item))
    }

    /// Takes out the items for which `keeps` is false. It may change an item.
    pub fn retain(&mut self, keeps: impl Fn(&mut T) -> bool) {
        for queue in self.by_owner.values_mut() {
            queue.items.retain_mut(|(_, item)| keeps(item));
        }
        self.by_owner.retain(|_, queue| !queue.items.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(queue: &mut FairQueue<u32>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).map(|(_, item)| item).collect()
    }

    #[test]
    fn owners_take_turns_and_an_owners_items_keep_their_order() {
        let mut queue = FairQueue::default();
        for (uid, item) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
            queue.push(Owner::new(uid, 0), item);
        }
        assert_eq!(drain(&mut queue), [10, 20, 30, 11, 21, 12]);
        assert!(queue.by_owner.is_empty());
    }

    #[test]
    fn who_changes_his_uid_or_his_session_delays_another_by_one() {
        let uids = |number: u32| Owner::new(100_000 + number, 7);
        let sessions = |number: u32| Owner::new(1_000, 100 + u64::from(number));
        for flood in [uids, sessions] {
            let mut queue = FairQueue::default();
            for number in 0..500 {
                queue.push(flood(number), number);
            }
            for _ in 0..10 {
                queue.pop();
            }
            // One that had a turn of its own not long ago, and one of the host's root.
            for victim in [Owner::new(5, 5), Owner::new(0, 8), Owner::new(5, 5)] {
                queue.push(victim, 1_000);
                queue.push(flood(900), 0);
                let next: Vec<_> = (0..2).filter_map(|_| queue.pop()).map(|(_, item)| item).collect();
                assert!(next.contains(&1_000), "{victim:?} {next:?}");
            }
        }
    }

    #[test]
    fn the_users_of_a_control_group_take_turns() {
        let mut queue = FairQueue::default();
        for number in 0..500 {
            queue.push(Owner::new(1_000, 7), number);
        }
        for _ in 0..10 {
            queue.pop();
        }
        queue.push(Owner::new(0, 7), 1_000);
        let next: Vec<_> = (0..2).filter_map(|_| queue.pop()).map(|(_, item)| item).collect();
        assert!(next.contains(&1_000), "{next:?}");
    }

    #[test]
    fn new_owners_do_not_keep_one_from_its_turn_that_was_there_before() {
        let mut queue = FairQueue::default();
        let victim = Owner::new(5, 5);
        queue.push(victim, 0);
        assert!(queue.pop().is_some());
        queue.push(victim, 1_000);
        // Each of them has had no turn.
        for number in 1..=100 {
            queue.push(Owner::new(1_000 + number, 1_000 + u64::from(number)), number);
        }
        assert_eq!(queue.pop(), Some((victim, 1_000)));
    }

    #[test]
    fn an_owner_that_may_have_no_turn_keeps_its_items() {
        let mut queue = FairQueue::default();
        for (uid, item) in [(1, 10), (2, 20), (1, 11)] {
            queue.push(Owner::new(uid, 0), item);
        }
        let mut of_other = || queue.pop_among(|owner| owner.uid != 1).map(|(_, item)| item);
        assert_eq!([of_other(), of_other()], [Some(20), None]);
        assert_eq!(drain(&mut queue), [10, 11]);
    }

    #[test]
    fn items_can_be_taken_out() {
        let mut queue = FairQueue::default();
        for number in 0..10 {
            queue.push(Owner::new(number % 2, 0), number);
        }
        queue.retain(|item| *item % 2 == 1 && *item > 4);
        assert_eq!(queue.iter().sum::<u32>(), 5 + 7 + 9);
        assert!(queue.owners().eq([Owner::new(1, 0)]));
        assert_eq!(drain(&mut queue), [5, 7, 9]);
    }
}
