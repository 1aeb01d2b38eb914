//! The rates of the log. An event takes from that of its owner, and from larger ones of its user in all control groups
//! together and of all users of its control group. So a user with many sessions, or a container with many uids, has
//! four times the rate of an owner, and one container that floods takes nothing from another one with the same uid.
//! Pure: the caller has the clock.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
};

use selfconn_ebpf::Owner;

use super::{RateLimiter, party::Party};

const SECOND_NS: u64 = 1_000_000_000;

/// A rate's burst. The 2,000 connections that are open at a start are one.
pub(super) const BURST_SECONDS: u32 = 10;

/// The rate of a user in all control groups together, and of a control group, as a multiple of an owner's rate.
pub(super) const PARTY_FACTOR: u32 = 4;

/// A reserve is this part of its rate.
const RESERVE_DIVISOR: u32 = 10;

/// Maximum number of owners, of users, and of control groups that have a share of their own.
pub(super) const SHARES: usize = 1_024;

/// Maximum number of programs and ports that are remembered of an owner.
const PROGRAMS: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Share {
    pub(super) events: RateLimiter,
    pub(super) reserve: RateLimiter,
}

impl Share {
    fn new(rate: u32) -> Self {
        Self {
            events: RateLimiter::new(rate, BURST_SECONDS),
            reserve: RateLimiter::new(rate / RESERVE_DIVISOR, BURST_SECONDS),
        }
    }

    fn is_idle(&self, now_ns: u64) -> bool {
        self.events.is_full(now_ns) && self.reserve.is_full(now_ns)
    }
}

#[derive(Debug)]
struct OwnerShare {
    share: Share,
    /// Hashes of the programs and ports of its connections.
    seen: HashSet<u64>,
}

#[derive(Debug)]
pub(super) struct LogShares {
    rate: u32,
    owners: HashMap<Owner, OwnerShare>,
    uids: HashMap<u32, Share>,
    cgroups: HashMap<u64, Share>,
    swept_ns: u64,
}

impl LogShares {
    /// `rate`: events of an owner in a second.
    pub(super) fn new(rate: u32) -> Self {
        Self { rate, owners: HashMap::new(), uids: HashMap::new(), cgroups: HashMap::new(), swept_ns: 0 }
    }

    /// True if this holds for each share from which the owner's events take.
    pub(super) fn all(&mut self, owner: Owner, now_ns: u64, holds: impl Fn(&Share) -> bool) -> bool {
        let mut all = true;
        self.each(owner, now_ns, |share| all &= holds(share));
        all
    }

    /// Calls this for each share from which the owner's events take.
    pub(super) fn each(&mut self, owner: Owner, now_ns: u64, mut f: impl FnMut(&mut Share)) {
        self.sweep_if_full(now_ns);
        let of_party = self.rate.saturating_mul(PARTY_FACTOR);
        for party in Party::of(owner) {
            let share = match party {
                Party::Owner(owner) => Some(&mut self.of_owner(owner).share),
                Party::Uid(uid) => share_of(&mut self.uids, uid, of_party),
                Party::Cgroup(cgroup) => share_of(&mut self.cgroups, cgroup, of_party),
            };
            // Where there is none, the owner's own share is still a bound.
            if let Some(share) = share {
                f(share);
            }
        }
    }

    /// True if the owner has no earlier connection of this program and port, which have this hash.
    pub(super) fn is_first(&mut self, owner: Owner, what: u64) -> bool {
        let seen = &mut self.of_owner(owner).seen;
        if seen.len() == PROGRAMS {
            seen.clear();
        }
        seen.insert(what)
    }

    /// The share of an owner. Beyond the number of shares, the users of a control group have one together.
    fn of_owner(&mut self, owner: Owner) -> &mut OwnerShare {
        let key = match self.owners.len() {
            _ if self.owners.contains_key(&owner) => owner,
            0..SHARES => owner,
            len if len < 2 * SHARES => owner.everybody(),
            _ => Owner::UNKNOWN.everybody(),
        };
        let new = || OwnerShare { share: Share::new(self.rate), seen: HashSet::new() };
        self.owners.entry(key).or_insert_with(new)
    }

    /// Removes idle shares if there are too many, at most once a second.
    fn sweep_if_full(&mut self, now_ns: u64) {
        let is_full =
            [self.owners.len(), self.uids.len(), self.cgroups.len()].iter().any(|len| *len >= SHARES);
        if is_full && now_ns.saturating_sub(self.swept_ns) >= SECOND_NS {
            self.swept_ns = now_ns;
            self.owners.retain(|_, owner| !owner.share.is_idle(now_ns));
            self.uids.retain(|_, share| !share.is_idle(now_ns));
            self.cgroups.retain(|_, share| !share.is_idle(now_ns));
        }
    }

    /// The number of owners that have a share.
    #[cfg(test)]
    pub(super) fn owner_count(&self) -> usize {
        self.owners.len()
    }
}

/// `None`: there are too many.
fn share_of<K: Copy + Eq + Hash>(shares: &mut HashMap<K, Share>, key: K, rate: u32) -> Option<&mut Share> {
    if shares.len() >= SHARES && !shares.contains_key(&key) {
        return None;
    }
    Some(shares.entry(key).or_insert_with(|| Share::new(rate)))
}
