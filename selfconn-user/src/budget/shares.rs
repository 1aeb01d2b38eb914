//! A limit that owners share. Pure.
//!
//! An owner may take at most [`OWNER_FACTOR`] times as much as is free. A user in all control groups together, and all
//! users of a control group that only root makes, may take at most [`PARTY_FACTOR`] times as much. So one owner alone takes
//! at most three quarters, a user with many sessions or a container's root who changes uids at most seven eighths, and the
//! next owner finds room, also another container with the same uid. Nothing that an owner has is ever taken from him.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

use super::party::Party;

const OWNER_FACTOR: usize = 3;
const PARTY_FACTOR: usize = 7;

/// How much a party may take, as a multiple of what is free.
const fn factor(party: Party) -> usize {
    match party {
        Party::Owner(_) => OWNER_FACTOR,
        Party::Uid(_) | Party::Cgroup(_) => PARTY_FACTOR,
    }
}

#[derive(Debug)]
pub struct SharedLimit {
    limit: usize,
    used: usize,
    by_party: HashMap<Party, usize>,
}

impl SharedLimit {
    /// Bytes for each owner that has something: one that is known by its user and by itself. A table of the standard
    /// library is at most seven eighths full. (Control groups are few, because only root makes them.)
    pub const OWNER_BYTES: usize = 2 * (size_of::<(Party, usize)>() + 1) * 8 / 7;

    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, used: 0, by_party: HashMap::new() }
    }

    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Number of owners, users and control groups that have something.
    #[must_use]
    pub fn parties(&self) -> usize {
        self.by_party.len()
    }

    /// How much this owner has taken, without what its user and its control group have as other owners.
    #[must_use]
    pub fn used_by(&self, owner: Owner) -> usize {
        self.by_party.get(&Party::Owner(owner)).copied().unwrap_or(0)
    }

    /// How much this owner, its user in all control groups, or all users of its control group have: the largest.
    #[must_use]
    pub fn used_by_party(&self, owner: Owner) -> usize {
        Party::of(owner).filter_map(|party| self.by_party.get(&party)).max().copied().unwrap_or(0)
    }

    /// False: there is no room, or none for this owner.
    #[must_use]
    pub fn try_take(&mut self, owner: Owner, amount: usize) -> bool {
        let Some(free) = self.limit.checked_sub(self.used + amount) else { return false };
        let has_room =
            |party: Party| self.by_party.get(&party).unwrap_or(&0) + amount <= factor(party) * free;
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
        let others: usize = (1..100).map(|uid| fill(&mut shares, Owner::new(uid, 7))).sum();
        assert_eq!(others, 125, "all other users of the same container");
        assert!(fill(&mut shares, Owner::new(0, 8)) > 0, "another service of root");
        let mut shares = SharedLimit::new(1_000);
        assert_eq!(fill(&mut shares, Owner::new(5, 7)), 750);
        assert_eq!(fill(&mut shares, Owner::new(5, 8)), 125, "another session of the same user");
        assert_eq!(fill(&mut shares, Owner::new(5, 9)), 0, "and a third one");
        let used =
            [Owner::new(5, 9), Owner::new(6, 7), Owner::new(6, 9)].map(|one| shares.used_by_party(one));
        assert_eq!(used, [875, 750, 0], "of the user, of the control group, of neither");
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
