//! Who shares a limit or takes turns. An owner alone is not enough: a user may have several sessions, and a container's
//! root may be many users.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

/// Users in the same block of this many uids are one party, too, where no control group is known: the range that a user
/// namespace maps is as long, and root there may use all of it.
pub(super) const UIDS_OF_A_RANGE: u32 = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Party {
    /// A user in a control group.
    Owner(Owner),
    /// A user in any control group: he may have several sessions.
    Uid(u32),
    Cgroup(u64),
}

impl Party {
    /// The parties that an owner is of. Root is none in all control groups together, because it runs most services of a
    /// host. An unknown control group is none, and neither is the root group, in which all processes are without cgroup
    /// v2.
    pub(super) fn of(owner: Owner) -> impl Iterator<Item = Self> {
        let uid = (owner.uid != 0).then_some(Self::Uid(owner.uid));
        let cgroup = is_group(owner.cgroup).then_some(Self::Cgroup(owner.cgroup));
        [Self::Owner(owner)].into_iter().chain(uid).chain(cgroup)
    }
}

/// How many the users of a control group may have together, where a user may have one: a container's root may be any
/// user.
const MAX_OF_CGROUP: usize = 2;

/// How many must be free for a user who has one already, in another control group: one of them is left for others.
const MIN_FREE_FOR_USER: usize = 2;

/// True if this owner has as many of something as it may have: one for a user in a control group, two for the users of
/// a control group. A user other than root has more than one in all control groups together only while two are free,
/// because services and containers may have the same uid, and one of them must not keep the others out. `takers` has
/// the owner of each that is taken, and `free` of them are left.
pub fn is_share_taken<'a>(
    takers: impl Iterator<Item = &'a Owner> + Clone,
    owner: Owner,
    free: usize,
) -> bool {
    let mut others = takers.clone();
    takers.clone().any(|other| *other == owner)
        || free < MIN_FREE_FOR_USER && others.any(|other| owner.uid != 0 && other.uid == owner.uid)
        || takers.filter(|other| is_same_cgroup(**other, owner)).count() >= MAX_OF_CGROUP
}

/// The owner that has the most, together with its user's others and with its control group. Of owners for whom that is
/// equal, the one that has the most itself.
pub fn largest_owner(amounts: impl Iterator<Item = (Owner, usize)> + Clone) -> Option<Owner> {
    let mut by_party: HashMap<Party, usize> = HashMap::new();
    for (owner, amount) in amounts.clone() {
        Party::of(owner).for_each(|party| *by_party.entry(party).or_default() += amount);
    }
    let of = |party| by_party.get(&party).copied().unwrap_or_default();
    let order = |owner: &Owner| (Party::of(*owner).map(of).max(), of(Party::Owner(*owner)));
    amounts.map(|(owner, _)| owner).max_by_key(order)
}

/// True if the owners have a party in common.
pub(super) fn have_common_party(one: Owner, other: Owner) -> bool {
    one == other || one.uid != 0 && one.uid == other.uid || is_same_cgroup(one, other)
}

/// True if both are in the same control group, and it is known.
fn is_same_cgroup(one: Owner, other: Owner) -> bool {
    is_group(one.cgroup) && one.cgroup == other.cgroup
}

/// True if this is the number of a control group that keeps some processes apart from others. 0 is unknown, and 1 the
/// root group (`cgroup_setup_root`, kernel/cgroup/cgroup.c at v5.10).
pub(super) const fn is_group(cgroup: u64) -> bool {
    cgroup > 1
}

/// True if this may be a uid that a user namespace maps. Two containers may have the same ones.
#[must_use]
pub fn may_be_mapped(uid: u32) -> bool {
    uid >= UIDS_OF_A_RANGE
}

/// The first uid of the range that this uid is in, if it may be mapped: all of a range are one user.
#[must_use]
pub fn user_of_range(uid: u32) -> u32 {
    if may_be_mapped(uid) { uid - uid % UIDS_OF_A_RANGE } else { uid }
}

/// Who pays for the sockets of this user, if the kernel says no more of them. TIME_WAIT and a socket whose process has
/// closed it have no user.
#[must_use]
pub fn owner_of_user(uid: Option<u32>) -> Owner {
    let uid = uid.unwrap_or(u32::MAX);
    // No inode is so large, so a block is no control group.
    const BLOCK: u64 = 1 << 63;
    match uid / UIDS_OF_A_RANGE {
        0 => Owner::new(uid, 0),
        block => Owner::new(uid, BLOCK | u64::from(block)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_owner_is_of_the_user_or_the_control_group_that_has_the_most_together() {
        let largest = |amounts: &[(Owner, usize)]| largest_owner(amounts.iter().copied());
        let victim = (Owner::new(1_000, 1), 4);
        let sessions = [(Owner::new(1_001, 2), 3), (Owner::new(1_001, 3), 2), victim];
        let uids = [(Owner::new(100_001, 4), 2), (Owner::new(100_002, 4), 3), victim];
        assert_eq!(largest(&sessions), Some(Owner::new(1_001, 2)));
        assert_eq!(largest(&uids), Some(Owner::new(100_002, 4)));
        // Root's services are not one user.
        assert_eq!(largest(&[(Owner::new(0, 2), 3), (Owner::new(0, 3), 3), victim]), Some(victim.0));
        assert_eq!(largest(&[]), None);
    }

    #[test]
    fn a_user_in_another_control_group_has_one_more_while_two_are_free() {
        let taken = [Owner::new(1_000, 7)];
        for (owner, free, is_taken) in [
            (Owner::new(1_000, 7), 3, true),
            (Owner::new(1_000, 8), 2, false),
            (Owner::new(1_000, 8), 1, true),
            (Owner::new(1_001, 8), 1, false),
            (Owner::new(1_001, 7), 1, false),
        ] {
            assert_eq!(is_share_taken(taken.iter(), owner, free), is_taken, "{owner:?}, {free} free");
        }
        let of_group = [Owner::new(1, 7), Owner::new(2, 7)];
        assert!(is_share_taken(of_group.iter(), Owner::new(3, 7), 2), "two of a control group");
        assert!(!is_share_taken([Owner::new(0, 7)].iter(), Owner::new(0, 8), 1), "root's services");
    }
}
