//! The room of a log file with a limit, from one rotation to the next. Owners share it like every limit, so an owner
//! with many lines leaves room for the others. Pure.

use selfconn_ebpf::Owner;

use crate::budget::{OwnerLosses, SharedLimit};

/// Maximum number of users and control groups whose bytes are counted apart. Beyond it, the users of a control group
/// are counted together, and beyond twice as many all others.
const MAX_PARTIES: usize = 4_096;

#[derive(Debug, Default)]
pub(super) struct Room {
    /// `None`: there is no limit.
    shares: Option<SharedLimit>,
    losses: OwnerLosses,
    is_over_share: bool,
}

impl Room {
    /// `len`: what the file has already.
    pub(super) fn new(limit: Option<u64>, len: u64) -> Self {
        let mut room = Self::default();
        room.reset(limit, len);
        room
    }

    /// The file is another one, or was truncated.
    pub(super) fn reset(&mut self, limit: Option<u64>, len: u64) {
        let room = |limit: u64| usize::try_from(limit.saturating_sub(len)).unwrap_or(usize::MAX);
        self.shares = limit.map(room).map(SharedLimit::new);
        self.is_over_share = false;
    }

    /// False: the owner has no room for a line of this length.
    pub(super) fn try_take(&mut self, owner: Owner, bytes: usize) -> bool {
        let Some(shares) = &mut self.shares else { return true };
        let payer = match shares.parties() {
            0..MAX_PARTIES => owner,
            _ if shares.used_by(owner) > 0 => owner,
            parties if parties < 2 * MAX_PARTIES => owner.everybody(),
            _ => Owner::UNKNOWN.everybody(),
        };
        shares.try_take(payer, bytes)
    }

    /// Counts a line for which its owner has no room. True: it is the first one of this file.
    pub(super) fn count_over_share(&mut self, owner: Owner) -> bool {
        self.losses.count(owner, 1);
        !std::mem::replace(&mut self.is_over_share, true)
    }

    /// Number of lines that found no room.
    pub(super) fn over_share(&self) -> u64 {
        self.losses.total()
    }

    /// Those since the last call, by owner.
    pub(super) fn take_over_share(&mut self) -> Vec<(Owner, u64)> {
        self.losses.take_unreported()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_that_a_container_can_be_have_one_share_and_little_memory() {
        let mut room = Room::new(Some(100_000_000), 0);
        let try_take = |room: &mut Room, owner| {
            let has_room = room.try_take(owner, 1_000);
            if !has_room {
                room.count_over_share(owner);
            }
            has_room
        };
        let written = (0..200_000).filter(|uid| try_take(&mut room, Owner::new(*uid, 7))).count();
        assert!((75_000..=87_500).contains(&written), "{written}: at most seven eighths");
        assert!(room.shares.as_ref().is_some_and(|shares| shares.parties() <= 2 * MAX_PARTIES + 6));
        assert!(room.try_take(Owner::new(0, 8), 1_000), "root in another group");
        assert_eq!(room.over_share(), 200_000 - written as u64);
        assert!(room.take_over_share().len() <= 65);
    }
}
