//! Owners: who is charged for what a task takes from tables that all tasks of the host share.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The level below the root of cgroup v2 to which the groups of a process count. systemd and container runtimes
/// make these levels as root; what is below can be delegated to a user.
pub const OWNER_CGROUP_LEVEL: u32 = 3;

/// The maximum number of nested user namespaces: `create_user_ns`, kernel/user_namespace.c at v5.10.
pub const MAX_USER_NS_LEVEL: u32 = 33;

/// Who is charged. Network namespaces and mapped uids are no part of it, because any user makes as many as he
/// likes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
pub struct Owner {
    /// Id of the process's control group at [`OWNER_CGROUP_LEVEL`], or of its own group if that is higher: the
    /// inode of its directory. 0: unknown. In a container with a user namespace that root made: see
    /// [`Self::of_container`].
    pub cgroup: u64,
    /// Real user id, in the initial user namespace. Of a task in another user namespace: the user that owns the
    /// outermost user namespace below the initial one.
    pub uid: u32,
    /// Always zero.
    pub padding: u32,
}

/// The time of an entry that somebody has taken and not yet written.
pub const CLAIMED: u64 = u64::MAX;

impl Owner {
    /// No owner is known.
    pub const UNKNOWN: Self = Self { cgroup: 0, uid: 0, padding: 0 };

    /// In place of a control group, the outermost user namespace below the initial one, if root made it: that is a
    /// container of LXC, Incus or podman, for example. Root in there makes control groups as it likes, and no other
    /// such namespace. The number is the inode of the namespace. No control group's id is so large.
    #[inline(always)]
    #[must_use]
    pub const fn of_container(user_ns: u32) -> u64 {
        1 << 61 | user_ns as u64
    }

    /// The owner with this uid in this control group.
    #[must_use]
    pub const fn new(uid: u32, cgroup: u64) -> Self {
        Self { cgroup, uid, padding: 0 }
    }
}

/// What an owner has used and lost: a value of [`crate::names::OWNERS`]. Two CPUs can count losses at the same time,
/// because each of these counts is incremented by one atomic instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct OwnerState {
    /// Openers that did not fit into the connect table, or were pushed out.
    pub lost_openers: u64,
    /// Refused connects that are not counted by destination, because the owner's share of the refused-connect table was
    /// full.
    pub lost_refused_connects: u64,
    /// Failed binds beyond the owner's rate.
    pub lost_bind_failures: u64,
    bind_failures: Window,
    preventions: Window,
}

/// What an owner did in the current second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
struct Window {
    /// When it began: `CLOCK_BOOTTIME`, nanoseconds.
    start_ns: u64,
    count: u64,
}

impl Window {
    const ZERO: Self = Self { start_ns: 0, count: 0 };

    /// Counts one. False: it is beyond `limit` in a second. If two CPUs count at the same time, one more or less may
    /// pass.
    #[inline(always)]
    fn admit(&mut self, now_ns: u64, limit: u64) -> bool {
        const WINDOW_NS: u64 = 1_000_000_000;
        if now_ns.wrapping_sub(self.start_ns) >= WINDOW_NS {
            (self.start_ns, self.count) = (now_ns, 0);
        }
        self.count += 1;
        self.count <= limit
    }
}

impl OwnerState {
    /// Nothing is used and lost.
    pub const ZERO: Self = Self {
        lost_openers: 0,
        lost_refused_connects: 0,
        lost_bind_failures: 0,
        bind_failures: Window::ZERO,
        preventions: Window::ZERO,
    };

    /// Counts a failed bind. False: it is beyond the rate. `users`: how many users' rates it may have.
    #[inline(always)]
    pub fn admit_bind_failure(&mut self, now_ns: u64, users: u64) -> bool {
        self.bind_failures.admit(now_ns, users * BIND_FAILURE_LIMIT)
    }

    /// Counts a refused connect to itself that is reported while the guard's ring buffer is half full.
    #[inline(always)]
    pub fn admit_prevention(&mut self, now_ns: u64, users: u64) -> bool {
        self.preventions.admit(now_ns, users * PREVENTION_LIMIT)
    }
}

/// Failed binds of an owner in a second that are reported. A server that retries fails a few times a second.
pub const BIND_FAILURE_LIMIT: u64 = 50;

/// Refused connects to itself of an owner in a second that are reported while the guard's ring buffer is half full.
pub const PREVENTION_LIMIT: u64 = 50;

/// The rate of a user in all control groups together, as a multiple of that in one.
pub const USER_RATE_FACTOR: u64 = 2;

/// The rate of all users of a control group together, as a multiple of one user's: a container's root may be any user.
pub const CGROUP_RATE_FACTOR: u64 = 8;

impl Owner {
    /// All users of this owner's control group.
    #[inline(always)]
    #[must_use]
    pub const fn everybody(&self) -> Self {
        Self { uid: u32::MAX, ..*self }
    }

    /// This owner's user in all control groups: he may have several sessions. `None`: root, which runs most services of
    /// a host, or a user whose control group is unknown and who is the same everywhere.
    #[inline(always)]
    #[must_use]
    pub const fn everywhere(&self) -> Option<Self> {
        if self.uid == 0 || self.cgroup == 0 { None } else { Some(Self { cgroup: 0, ..*self }) }
    }
}

/// How much an owner takes among `N` owners: the number of them with the same uid plus the number of them with the
/// same control group. A container's root who changes his uid keeps his control group, and a user who gets himself
/// another session keeps his uid.
#[inline(always)]
fn weight<const N: usize>(owner: &impl Fn(usize) -> Owner, of: &Owner, zero: u64) -> u64 {
    let mut weight = zero;
    for slot in 0..N {
        let owner = owner(slot);
        weight += is_equal(owner.uid.into(), of.uid.into()) + is_equal(owner.cgroup, of.cgroup);
    }
    weight
}

/// 1 if both are equal, else 0. In a program without a branch, because the verifier follows both sides of each one, and
/// in an order that the compiler keeps, because it would first load all slots, for which the stack has no room.
#[inline(always)]
#[must_use]
pub fn is_equal(a: u64, b: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut outcome = a ^ b;
        // SAFETY: the instructions only compute with registers.
        unsafe {
            core::arch::asm!("{other} = {outcome}", "{other} = -{other}", "{outcome} |= {other}", "{outcome} >>= 63",
                "{outcome} ^= 1", outcome = inout(reg) outcome, other = out(reg) _);
        }
        outcome
    }
    #[cfg(not(target_arch = "bpf"))]
    u64::from(a == b)
}

/// The slot whose entry makes room for a new one of `pusher`, among `N` full slots. `owner` and `inserted_ns` say of
/// each slot whose entry it holds and since when. `None`: the new entry finds no room.
///
/// An owner that takes more than the pusher would take loses its oldest entry. Otherwise the pusher loses the oldest
/// of its own. A [claimed](CLAIMED) entry is left alone.
#[inline(always)]
pub fn evicted<const N: usize>(
    owner: impl Fn(usize) -> Owner,
    inserted_ns: impl Fn(usize) -> u64,
    pusher: &Owner,
) -> Option<usize> {
    const { assert!(N <= 8) };
    // The verifier follows the code once for each value of a number that it knows. It does not know that a padding is
    // zero, so a sum that begins with one is any number for it.
    let zero: u64 = owner(0).padding.into();
    // Likewise, where the pusher's ids come from makes no difference.
    let pusher = &Owner { uid: pusher.uid ^ zero as u32, cgroup: pusher.cgroup ^ zero, ..*pusher };
    // With the new entry itself, which has the same uid and the same control group.
    let pusher_weight = weight::<N>(&owner, pusher, zero) + 2;
    // Each rank has the weight in its upper bits, then the age, then the slot: the maximum is the oldest entry of the
    // heaviest owner.
    let (mut heaviest, mut own) = (zero, zero);
    for slot in 0..N {
        let of = owner(slot);
        let inserted_ns = inserted_ns(slot);
        let age = (!inserted_ns >> 9) << 3 | slot as u64;
        let unless_claimed = is_equal(inserted_ns, CLAIMED).wrapping_sub(1);
        heaviest = max(heaviest, (weight::<N>(&owner, &of, zero) << WEIGHT_SHIFT | age) & unless_claimed);
        let is_own = is_equal(of.uid.into(), pusher.uid.into()) & is_equal(of.cgroup, pusher.cgroup);
        own = max(own, (is_own << WEIGHT_SHIFT | age) & is_own.wrapping_neg() & unless_claimed);
    }
    if heaviest >> WEIGHT_SHIFT > pusher_weight {
        Some((heaviest & 7) as usize)
    } else if own != 0 {
        Some((own & 7) as usize)
    } else {
        None
    }
}

/// The position of a weight in a rank. A weight is at most 16, so a rank is less than 2^63.
const WEIGHT_SHIFT: u32 = 58;

/// The greater of two ranks, without a branch: see [`is_equal`].
#[inline(always)]
fn max(a: u64, b: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut greater = a;
        // SAFETY: the instructions only compute with registers.
        unsafe {
            core::arch::asm!("{less} = {greater}", "{less} -= {b}", "{less} s>>= 63", "{difference} &= {less}",
                "{greater} ^= {difference}", greater = inout(reg) greater, difference = inout(reg) a ^ b => _,
                b = in(reg) b, less = out(reg) _);
        }
        greater
    }
    #[cfg(not(target_arch = "bpf"))]
    a.max(b)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const WAYS: usize = 8;

    /// Inserts one entry for each owner into full slots. Returns how many slots each owner has in the end, and
    /// how many of its entries were lost.
    fn fill(pushers: &[Owner], watched: &[Owner]) -> Vec<(usize, usize)> {
        let mut slots: Vec<(Owner, u64)> = Vec::new();
        let mut lost = Vec::new();
        for (now_ns, pusher) in (1_u64 << 40..).step_by(1 << 20).zip(pushers) {
            if slots.len() < WAYS {
                slots.push((*pusher, now_ns));
                continue;
            }
            match evicted::<WAYS>(|slot| slots[slot].0, |slot| slots[slot].1, pusher) {
                Some(way) => {
                    lost.push(slots[way].0);
                    slots[way] = (*pusher, now_ns);
                }
                None => lost.push(*pusher),
            }
        }
        let count = |of: &Owner| {
            let slots = slots.iter().filter(|(owner, _)| owner == of).count();
            (slots, lost.iter().filter(|owner| *owner == of).count())
        };
        watched.iter().map(count).collect()
    }

    #[test]
    fn a_flood_of_one_owner_costs_only_that_owner() {
        let attacker = Owner::new(65_534, 7);
        // The victim may share the control group (a host without systemd), or the uid (a root container).
        for victim in [Owner::new(0, 7), Owner::new(65_534, 8), Owner::new(0, 8), Owner::UNKNOWN] {
            let flood = [attacker; 1_000];
            // Before, within and after the flood.
            let pushers = [&[victim][..], &flood, &[victim], &flood, &[victim], &flood].concat();
            assert_eq!(fill(&pushers, &[victim])[0], (3, 0), "{victim:?}");
        }
    }

    #[test]
    fn an_owner_who_changes_uids_or_control_groups_gains_nothing() {
        let victim = Owner::new(0, 1);
        let uids = (0..1_000).map(|uid| Owner::new(100_000 + uid, 7));
        let sessions = (0..1_000).map(|session| Owner::new(1_000, 100 + session));
        for flood in [uids.collect::<Vec<_>>(), sessions.collect()] {
            let pushers = [&flood[..], &[victim; 3], &flood].concat();
            assert_eq!(fill(&pushers, &[victim])[0], (3, 0), "{:?}", flood[0]);
        }
    }

    #[test]
    fn an_owner_alone_keeps_its_newest_entries() {
        let one = Owner::new(5, 5);
        assert_eq!(fill(&[one; 20], &[one]), [(WAYS, 12)]);
        let inserted_ns = |slot| if slot == 5 { 1 << 20 } else { 1 << 30 };
        assert_eq!(evicted::<WAYS>(|_| one, inserted_ns, &one), Some(5));
    }

    #[test]
    fn a_claimed_entry_is_evicted_by_nobody() {
        let (one, other) = (Owner::new(5, 5), Owner::new(6, 6));
        let all_but = |free| move |slot| if slot == free { 1 << 30 } else { CLAIMED };
        assert_eq!(evicted::<WAYS>(|_| one, all_but(3), &one), Some(3));
        assert_eq!(evicted::<WAYS>(|_| one, all_but(3), &other), Some(3));
        for pusher in [one, other] {
            assert_eq!(evicted::<WAYS>(|_| one, all_but(WAYS), &pusher), None);
        }
    }

    #[test]
    fn failed_binds_beyond_the_limit_of_a_second_are_refused() {
        const SECOND_NS: u64 = 1_000_000_000;
        let mut state = OwnerState::ZERO;
        let mut admitted = |from_ns: u64| {
            (0..1_000).filter(|count| state.admit_bind_failure(from_ns + count, 1)).count() as u64
        };
        assert_eq!([SECOND_NS, 2 * SECOND_NS - 2_000, 3 * SECOND_NS].map(&mut admitted), [50, 0, 50]);
    }

    #[test]
    fn among_equals_the_newcomer_finds_no_room() {
        let owner = |slot| Owner::new(slot as u32, slot as u64);
        assert_eq!(evicted::<WAYS>(owner, |_| 1 << 30, &Owner::new(99, 99)), None);
    }
}
