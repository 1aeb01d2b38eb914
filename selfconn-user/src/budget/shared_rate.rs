//! A number in each second that owners share. Pure.

use std::time::Duration;

use selfconn_ebpf::Owner;
use tokio::time::Instant;

use super::SharedLimit;

const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct SharedRate {
    limit: usize,
    /// What is taken in the current second.
    taken: SharedLimit,
    ends_at: Option<Instant>,
}

impl SharedRate {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, taken: SharedLimit::new(limit), ends_at: None }
    }

    /// # Errors
    /// When the owner may have the next one.
    pub fn try_take(&mut self, owner: Owner, now: Instant) -> Result<(), Instant> {
        let ends_at = match self.ends_at {
            Some(ends_at) if now < ends_at => ends_at,
            _ => {
                self.taken = SharedLimit::new(self.limit);
                *self.ends_at.insert(now + INTERVAL)
            }
        };
        if self.taken.try_take(owner, 1) { Ok(()) } else { Err(ends_at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_leaves_room_for_the_next_and_has_it_again_in_the_next_second() {
        let (mut rate, now) = (SharedRate::new(100), Instant::now());
        let (flood, victim) = (Owner::new(1_000, 1), Owner::new(1_001, 2));
        let mut taken = |owner, now| (0..100).filter(|_| rate.try_take(owner, now).is_ok()).count();
        assert_eq!([taken(flood, now), taken(flood, now)], [75, 0]);
        assert!(taken(victim, now) > 0);
        assert_eq!(taken(flood, now + INTERVAL), 75);
    }
}
