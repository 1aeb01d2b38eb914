//! The guard: what its program and user space agree on. The program answers the SYN of a connect to itself as a closed
//! port would.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{endpoint::Endpoint, record::tag, task::Opener};

/// What the program does with the SYN of a connect to itself: the values of the global
/// [`names::GUARD_MODE`](super::names::GUARD_MODE).
pub mod mode {
    /// The program is not attached.
    pub const OFF: u32 = 0;
    /// Report it, and let it pass.
    pub const DRY_RUN: u32 = 1;
    /// Refuse it.
    pub const REFUSE: u32 = 2;
}

/// What a rule says about what it matches: bits of a value in the guard's maps, and of the global
/// [`names::GUARD_ONLY`](super::names::GUARD_ONLY).
pub mod rule {
    /// It may connect to itself.
    pub const EXCEPT: u32 = 1 << 0;
    /// One of the ports that are guarded.
    pub const ONLY_PORT: u32 = 1 << 1;
    /// One of the users that are guarded.
    pub const ONLY_UID: u32 = 1 << 2;
    /// One of the control groups that are guarded.
    pub const ONLY_CGROUP: u32 = 1 << 3;
    /// One of the units that are guarded.
    pub const ONLY_UNIT: u32 = 1 << 4;
    /// The one control group of a command that is watched, or one below it.
    pub const ONLY_GROUP: u32 = 1 << 5;
}

/// True if the guard refuses a connect that is matched by rules with these bits. `only`: the kinds of rules of which
/// each must match.
#[inline(always)]
#[must_use]
pub const fn is_guarded(matched: u32, only: u32) -> bool {
    matched & rule::EXCEPT == 0 && matched & only == only
}

/// The levels of a control group's path that rules can match.
pub const CGROUP_LEVELS: u32 = 8;

/// Maximum number of control groups that have a rule.
pub const MAX_CGROUPS: usize = 4_096;

/// The value of a port in the map of ports, which has one for each of the 65,536.
pub type PortRules = u32;

/// A connect to itself was refused, or would have been: a record in the guard's ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Prevention {
    /// [`tag::PREVENTION`].
    pub tag: u16,
    /// Always zero.
    pub padding: u16,
    /// The user that owns the socket (`sk_uid`), in the initial user namespace.
    pub uid: u32,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// The socket cookie.
    pub cookie: u64,
    /// The endpoint that is both the source and the destination.
    pub endpoint: Endpoint,
    /// The connecting task. The task that runs when the packet passes may be another one.
    pub opener: Opener,
}

const _: () = assert!(size_of::<Prevention>() == 152);

/// The first attempt of a connect to its own address in a network namespace: a record in the guard's ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct FirstConnect {
    /// [`tag::FIRST_CONNECT`].
    pub tag: u16,
    /// Always zero.
    pub padding: u16,
    /// The connecting thread, in the initial pid namespace.
    pub tid: u32,
    /// Cookie of the network namespace: see [`Endpoint::netns_cookie`].
    pub netns_cookie: u64,
    /// Inode of the network namespace.
    pub netns: u32,
    /// Always zero.
    pub padding_end: u32,
}

const _: () = assert!(size_of::<FirstConnect>() == 24);

/// A record in the guard's ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardRecord {
    Prevention(Prevention),
    FirstConnect(FirstConnect),
}

impl GuardRecord {
    /// Reads a record. `None`: the tag is unknown, or the record does not have the length of its kind.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match u16::read_from_prefix(bytes).ok()?.0 {
            tag::PREVENTION => Prevention::read_from_bytes(bytes).map(Self::Prevention).ok(),
            tag::FIRST_CONNECT => FirstConnect::read_from_bytes(bytes).map(Self::FirstConnect).ok(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn an_exception_wins_and_every_kind_of_only_must_match() {
        use rule::{EXCEPT, ONLY_PORT, ONLY_UID, ONLY_UNIT};
        for (matched, only, expected) in [
            (0, 0, true),
            (EXCEPT, 0, false),
            (ONLY_PORT, ONLY_PORT, true),
            (0, ONLY_PORT, false),
            (ONLY_PORT, ONLY_PORT | ONLY_UID, false),
            (ONLY_PORT | ONLY_UID, ONLY_PORT | ONLY_UID, true),
            (ONLY_UNIT, ONLY_PORT, false),
            (ONLY_PORT | EXCEPT, ONLY_PORT, false),
        ] {
            assert_eq!(is_guarded(matched, only), expected, "{matched:b} of {only:b}");
        }
    }

    #[test]
    fn a_record_is_known_by_its_tag_and_its_length() {
        let prevention = Prevention { tag: tag::PREVENTION, uid: 7, ..Prevention::new_zeroed() };
        let first = FirstConnect { tag: tag::FIRST_CONNECT, tid: 7, ..FirstConnect::new_zeroed() };
        assert_eq!(GuardRecord::from_bytes(prevention.as_bytes()), Some(GuardRecord::Prevention(prevention)));
        assert_eq!(GuardRecord::from_bytes(first.as_bytes()), Some(GuardRecord::FirstConnect(first)));
        assert_eq!(GuardRecord::from_bytes(&prevention.as_bytes()[..24]), None);
        assert_eq!(GuardRecord::from_bytes(&[0; 24]), None);
        assert_eq!(GuardRecord::from_bytes(&[4]), None);
    }
}
