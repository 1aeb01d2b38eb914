//! The rates of the log. An event takes from that of its owner, and from larger ones of its user in all control groups
//! together and of all users of its control group. So a user with many sessions, or a container with many uids, has
//! four times the rate of an owner, and one container that floods takes nothing from another one with the same uid.
//! Warnings about ports at risk have a rate of their own. Pure: the caller has the clock.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::Hash,
    str::FromStr,
};

use selfconn_ebpf::Owner;

use super::{RateLimiter, party::Party};

const SECOND_NS: u64 = 1_000_000_000;

/// The burst of a rate that has none of its own.
pub(super) const BURST_SECONDS: u32 = 10;

/// How many events an owner may have in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogRate {
    /// In a second.
    pub rate: u32,
    /// At once.
    pub burst: u32,
}

impl LogRate {
    /// A storm's beginning is in the log, as whole as at a rate of 5,000, and the rest of it fills no disk. The 2,000
    /// connections that are open at a start are a burst, too.
    pub const DEFAULT: Self = Self { rate: 100, burst: 50_000 };

    /// A burst of ten seconds.
    #[must_use]
    pub const fn new(rate: u32) -> Self {
        Self { rate, burst: rate.saturating_mul(BURST_SECONDS) }
    }

    /// The rate of warnings about ports at risk beside this rate. A user in one session has 455 ports in the table of
    /// refused connects (`selfconn_ebpf::refused_connects`). The burst is enough if all of them are at risk at the same
    /// moment and are reported at eight counts, and the rate if they all end and others begin each minute.
    const fn of_warnings(self) -> Self {
        const MAX: LogRate = LogRate { rate: 20, burst: 4_096 };
        Self {
            rate: if self.rate < MAX.rate { self.rate } else { MAX.rate },
            burst: if self.burst < MAX.burst { self.burst } else { MAX.burst },
        }
    }

    const fn times(self, factor: u32) -> Self {
        Self { rate: self.rate.saturating_mul(factor), burst: self.burst.saturating_mul(factor) }
    }
}

impl FromStr for LogRate {
    type Err = &'static str;

    /// Parses `RATE` or `RATE/BURST`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |digits: &str| digits.parse().ok().filter(|number| *number > 0);
        let parsed = match text.split_once('/') {
            Some((rate, burst)) => number(rate).zip(number(burst)).map(|(rate, burst)| Self { rate, burst }),
            None => number(text).map(Self::new),
        };
        parsed.ok_or("must be a number, or RATE/BURST")
    }
}

impl fmt::Display for LogRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.rate, self.burst)
    }
}

/// The rate of a user in all control groups together, and of a control group, as a multiple of an owner's rate.
pub(super) const PARTY_FACTOR: u32 = 4;

/// A reserve is this part of its rate.
const RESERVE_DIVISOR: u32 = 10;

/// Maximum number of owners, of users, and of control groups that have a share of their own.
pub(super) const SHARES: usize = 1_024;

/// Maximum number of programs and ports that are remembered of an owner. A table of the standard library with 64 places
/// has room for as many.
const PROGRAMS: usize = 56;

#[derive(Clone, Debug)]
pub(super) struct Share {
    pub(super) events: RateLimiter,
    pub(super) reserve: RateLimiter,
    pub(super) warnings: RateLimiter,
}

impl Share {
    /// `rate`: that of an owner. `factor`: how many owners the share is for.
    fn new(rate: LogRate, factor: u32) -> Self {
        let warnings = rate.of_warnings().times(factor);
        let LogRate { rate, burst } = rate.times(factor);
        let part_of_burst = (burst / RESERVE_DIVISOR).max(BURST_SECONDS);
        Self {
            events: RateLimiter::with_burst(rate, burst),
            reserve: RateLimiter::with_burst(rate / RESERVE_DIVISOR, part_of_burst),
            warnings: RateLimiter::with_burst(warnings.rate, warnings.burst),
        }
    }

    fn is_idle(&self, now_ns: u64) -> bool {
        [&self.events, &self.reserve, &self.warnings].iter().all(|limiter| limiter.is_full(now_ns))
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
    rate: LogRate,
    owners: HashMap<Owner, OwnerShare>,
    uids: HashMap<u32, Share>,
    cgroups: HashMap<u64, Share>,
    swept_ns: u64,
}

impl LogShares {
    /// `rate`: that of an owner.
    pub(super) fn new(rate: LogRate) -> Self {
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
        let rate = self.rate;
        for party in Party::of(owner) {
            let share = match party {
                Party::Owner(owner) => Some(&mut self.of_owner(owner).share),
                Party::Uid(uid) => share_of(&mut self.uids, uid, rate),
                Party::Cgroup(cgroup) => share_of(&mut self.cgroups, cgroup, rate),
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
        let new = || OwnerShare { share: Share::new(self.rate, 1), seen: HashSet::new() };
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

/// The share of a user or of a control group. `rate`: that of an owner. `None`: there are too many.
fn share_of<K: Copy + Eq + Hash>(
    shares: &mut HashMap<K, Share>,
    key: K,
    rate: LogRate,
) -> Option<&mut Share> {
    if shares.len() >= SHARES && !shares.contains_key(&key) {
        return None;
    }
    Some(shares.entry(key).or_insert_with(|| Share::new(rate, PARTY_FACTOR)))
}
