//! A limit that owners share. Pure.
//!
//! A user, and a control group that only root makes, may take at most [`FACTOR`] times as much as is free. So one alone
//! takes at most three quarters, and however many there are, the next one finds room. Nothing that an owner has is ever
//! taken from him.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

const FACTOR: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Party {
    Uid(u32),
    Cgroup(u64),
}

impl Party {
    /// Whose shares an owner takes from. Root has none of its own, because it runs most services of a host: only their
    /// control groups have.
    fn of(owner: Owner) -> impl Iterator<Item = Self> {
        let uid = (owner.uid != 0).then_some(Self::Uid(owner.uid));
        [Self::Cgroup(owner.cgroup)].into_iter().chain(uid)
    }
}

#[derive(Debug)]
pub struct SharedLimit {
    limit: usize,
    used: usize,
    by_party: HashMap<Party, usize>,
}

impl SharedLimit {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, used: 0, by_party: HashMap::new() }
    }

    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// False: there is no room, or none for this owner.
    #[must_use]
    pub fn try_take(&mut self, owner: Owner, amount: usize) -> bool {
        let Some(free) = self.limit.checked_sub(self.used + amount) else { return false };
        let has_room = |party| self.by_party.get(&party).unwrap_or(&0) + amount <= FACTOR * free;
        if !Party::of(owner).all(has_room) {
            return false;
        }
        self.used += amount;
        for party in Party::of(owner) {
            *self.by_party.entry(party).or_default() += amount;
        }
        true
    }

    /// Gives back what was taken.
    pub fn give_back(&mut self, owner: Owner, amount: usize) {
        debug_assert!(amount <= self.used);
        self.used = self.used.saturating_sub(amount);
        for party in Party::of(owner) {
            if let Some(used) = self.by_party.get_mut(&party) {
                *used = used.saturating_sub(amount);
                if *used == 0 {
                    self.by_party.remove(&party);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(shares: &mut SharedLimit, owner: Owner) -> usize {
        (0..).take_while(|_| shares.try_take(owner, 1)).count()
    }

    #[test]
    fn one_owner_has_at_most_three_quarters_and_the_next_ones_find_room() {
        let mut shares = SharedLimit::new(1_000);
        let taken: Vec<_> =
            (1..=6).map(|number| fill(&mut shares, Owner::new(number, number.into()))).collect();
        assert_eq!(taken, [750, 187, 47, 12, 3, 0]);
        shares.give_back(Owner::new(1, 1), 750);
        assert!(fill(&mut shares, Owner::new(6, 6)) > 500, "what is given back is free");
    }

    #[test]
    fn who_changes_his_user_or_his_session_gains_nothing() {
        let mut shares = SharedLimit::new(1_000);
        assert_eq!(fill(&mut shares, Owner::new(0, 7)), 750);
        for uid in 1..100 {
            assert_eq!(fill(&mut shares, Owner::new(uid, 7)), 0, "another user of the same container");
        }
        assert!(fill(&mut shares, Owner::new(0, 8)) > 0, "another service of root");
        let mut shares = SharedLimit::new(1_000);
        assert_eq!(fill(&mut shares, Owner::new(5, 7)), 750);
        assert_eq!(fill(&mut shares, Owner::new(5, 8)), 0, "another session of the same user");
    }

    #[test]
    fn everything_can_be_given_back() {
        let mut shares = SharedLimit::new(100);
        let owners = [Owner::new(1, 1), Owner::new(0, 1), Owner::new(1, 2)];
        for owner in owners {
            assert!(shares.try_take(owner, 10));
        }
        assert!(!shares.try_take(owners[1], 100));
        assert_eq!(shares.used(), 30);
        for owner in owners {
            shares.give_back(owner, 10);
        }
        assert!(shares.used == 0 && shares.by_party.is_empty());
    }
}
