//! Whose turn it is, among owners that wait: that of the owner whose last turn, or whose arrival if that is later, is
//! longest ago. A turn of an owner is one of its user and one of its control group, too: who has several sessions or
//! many uids gains none. Among owners for whom that is the same, such as the users of one control group, their own
//! turns count. Pure.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

use super::party::Party;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
