//! A set of users, whose size does not depend on how many there are: a host's own uids are members each by itself, the
//! uids that a user namespace maps by their range. Pure.

use super::party::UIDS_OF_A_RANGE;

const WORD_BITS: usize = u64::BITS as usize;

/// The memory of a set that is not empty: a bit for each uid of the host, and for each range above.
pub const USER_SET_BYTES: usize = 2 * UIDS_OF_A_RANGE as usize / 8;

#[derive(Debug, Default)]
pub struct UserSet {
    /// Empty if no user is a member.
    words: Vec<u64>,
}

impl UserSet {
    pub fn insert(&mut self, uid: u32) {
        let (word, bit) = position(uid);
        self.words.resize(USER_SET_BYTES / size_of::<u64>(), 0);
        if let Some(word) = self.words.get_mut(word) {
            *word |= bit;
        }
    }

    /// True if this user is a member, or one of the same range above the host's own uids.
    #[must_use]
    pub fn contains(&self, uid: u32) -> bool {
        let (word, bit) = position(uid);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

/// The index of a word, and the bit in it.
fn position(uid: u32) -> (usize, u64) {
    let index = match uid / UIDS_OF_A_RANGE {
        0 => uid,
        range => UIDS_OF_A_RANGE + range,
    };
    let index = index as usize;
    (index / WORD_BITS, 1 << (index % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_no_other_user_but_a_mapped_one_is_its_whole_range() {
        let mut set = UserSet::default();
        assert!(set.is_empty() && [0, 1_000, u32::MAX].iter().all(|uid| !set.contains(*uid)));
        for uid in [0, 1_000, 65_535, 200_000, u32::MAX] {
            set.insert(uid);
        }
        for (uid, is_member) in [
            (0, true),
            (1, false),
            (999, false),
            (1_000, true),
            (65_535, true),
            (65_536, false),
            (196_608, true),
            (262_143, true),
            (262_144, false),
            (u32::MAX - 1, true),
        ] {
            assert_eq!(set.contains(uid), is_member, "{uid}");
        }
        assert_eq!(set.words.len() * size_of::<u64>(), USER_SET_BYTES);
    }
}
