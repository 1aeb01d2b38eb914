//! Time in each second that every party has for itself: what one takes is no other's. Pure.

use std::{collections::HashMap, time::Duration};

use selfconn_ebpf::Owner;
use tokio::time::Instant;

use super::party::Party;

const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct PartyTime {
    limit: Duration,
    /// What is taken in the current second.
    taken: HashMap<Party, Duration>,
    ends_at: Option<Instant>,
}

impl PartyTime {
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self { limit, taken: HashMap::new(), ends_at: None }
    }

    /// True if no party of this owner has taken all its time.
    pub fn has_some(&mut self, owner: Owner, now: Instant) -> bool {
        if self.ends_at.is_none_or(|ends_at| now >= ends_at) {
            self.taken.clear();
            self.ends_at = Some(now + INTERVAL);
        }
        Party::of(owner).all(|party| self.taken.get(&party).is_none_or(|taken| *taken < self.limit))
    }

    /// Takes this much, also if it is more than the rest.
    pub fn take(&mut self, owner: Owner, time: Duration) {
        Party::of(owner).for_each(|party| *self.taken.entry(party).or_default() += time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_users_take_leaves_each_other_one_all_its_time() {
        const STEP: Duration = Duration::from_millis(3);
        let (mut time, now) = (PartyTime::new(Duration::from_millis(40)), Instant::now());
        let mut taken = |owner: Owner, now: Instant| {
            let took = |_: &u32| {
                let has_some = time.has_some(owner, now);
                if has_some {
                    time.take(owner, STEP);
                }
                has_some
            };
            (0..100).filter(took).count()
        };
        for uid in 1_000..2_000 {
            assert_eq!(taken(Owner::new(uid, 0), now), 14);
        }
        // A container's users have one time together.
        assert_eq!([taken(Owner::new(1, 7), now), taken(Owner::new(2, 7), now)], [14, 0]);
        assert_eq!(taken(Owner::new(1_000, 0), now + INTERVAL), 14);
    }
}
