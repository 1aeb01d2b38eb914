//! Which network namespaces are not guarded, and which of them an event is due for. Pure.
//!
//! Users make network namespaces at will, and the root of a container puts programs with ever other names in front of
//! the guard. So owners share the room, and an owner has a few events for each kind of reason in a while; the others
//! follow.

use std::{
    collections::{HashMap, HashSet},
    mem::{Discriminant, discriminant},
    time::{Duration, Instant},
};

use selfconn_ebpf::Owner;

use super::queue::{MAX_ATTACHMENTS, MAX_USER_ATTACHMENTS};
use crate::{bpf::guard::Disarmed, budget::SharedLimit, sockets::NetnsId};

/// Maximum number of namespaces that are known to be unguarded.
const MAX_UNGUARDED: usize = 2_048;

/// Maximum number of events for an owner and a kind of reason in [`EVENT_WINDOW`].
const MAX_EVENTS: usize = 8;

const EVENT_WINDOW: Duration = Duration::from_secs(20);

/// Why nothing is refused in a network namespace, or not for certain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnguardedReason {
    /// Its owner has too many of them, or too many devices in them.
    NoRoom,
    NotEntered(String),
    NotAttached(String),
    /// What is attached there can't be read or changed.
    Unknown(String),
    Disarmed(Disarmed),
}

impl UnguardedReason {
    fn text(&self) -> String {
        match self {
            Self::NoRoom => {
                format!(
                    "its owner has too many network namespaces or VRF devices; \
                     {MAX_USER_ATTACHMENTS} devices of a user can be guarded, and {MAX_ATTACHMENTS} in all"
                )
            }
            Self::NotEntered(error) => format!("it can't be entered: {error}"),
            Self::NotAttached(error) => format!("the program can't be attached: {error}"),
            Self::Unknown(error) => format!("what is attached can't be read or changed: {error}"),
            Self::Disarmed(Disarmed::TakenOff) => "the program was taken off".to_owned(),
            Self::Disarmed(Disarmed::Behind(other)) => {
                format!("the program {other} runs first, and may end the chain")
            }
        }
    }
}

/// A network namespace without the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnguardedNetns {
    pub id: NetnsId,
    pub why: String,
}

#[derive(Debug)]
struct Unguarded {
    owner: u32,
    reason: UnguardedReason,
    is_reported: bool,
}

#[derive(Debug)]
pub struct UnguardedNamespaces {
    by_id: HashMap<NetnsId, Unguarded>,
    shares: SharedLimit,
    /// Those for which there was no room since the last walk. They have no event. The walk itself keeps as much of
    /// every namespace.
    beyond: HashSet<NetnsId>,
    /// Entries that are not reported.
    pending: usize,
    /// The events of the current window.
    events: HashMap<(u32, Discriminant<UnguardedReason>), usize>,
    window_ends: Option<Instant>,
}

impl Default for UnguardedNamespaces {
    fn default() -> Self {
        Self {
            by_id: HashMap::new(),
            shares: SharedLimit::new(MAX_UNGUARDED),
            beyond: HashSet::new(),
            pending: 0,
            events: HashMap::new(),
            window_ends: None,
        }
    }
}

impl UnguardedNamespaces {
    pub fn insert(&mut self, id: NetnsId, owner: u32, reason: UnguardedReason) {
        if let Some(known) = self.by_id.get_mut(&id) {
            if known.reason != reason {
                known.reason = reason;
                self.pending += usize::from(std::mem::take(&mut known.is_reported));
            }
        } else if self.shares.try_take(Owner::new(owner, 0), 1) {
            self.beyond.remove(&id);
            self.by_id.insert(id, Unguarded { owner, reason, is_reported: false });
            self.pending += 1;
        } else {
            self.beyond.insert(id);
        }
    }

    /// The program is attached to all devices of the namespace. A reason of another kind stays until the next walk.
    pub fn on_attached(&mut self, id: NetnsId) {
        use UnguardedReason::{Disarmed, NoRoom, NotAttached, NotEntered, Unknown};
        match self.by_id.get(&id).map(|known| &known.reason) {
            Some(NoRoom | NotEntered(_) | NotAttached(_)) => self.remove(id),
            Some(Unknown(_) | Disarmed(_)) | None => {}
        }
    }

    pub fn remove(&mut self, id: NetnsId) {
        self.beyond.remove(&id);
        if let Some(known) = self.by_id.remove(&id) {
            self.shares.give_back(Owner::new(known.owner, 0), 1);
            self.pending -= usize::from(!known.is_reported);
        }
    }

    /// A walk has found the namespaces that are kept.
    pub fn on_walk(&mut self, is_kept: impl Fn(NetnsId) -> bool) {
        self.beyond.clear();
        let gone: Vec<_> = self.by_id.keys().copied().filter(|id| !is_kept(*id)).collect();
        gone.into_iter().for_each(|id| self.remove(id));
    }

    #[must_use]
    pub fn contains(&self, id: NetnsId) -> bool {
        self.by_id.contains_key(&id) || self.beyond.contains(&id)
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.by_id.len() + self.beyond.len()
    }

    /// The namespaces that an event is due for.
    pub fn take_due(&mut self, now: Instant) -> Vec<UnguardedNetns> {
        if self.pending == 0 {
            return Vec::new();
        }
        if self.window_ends.is_none_or(|ends| ends <= now) {
            self.events.clear();
            self.window_ends = Some(now + EVENT_WINDOW);
        }
        let mut due = Vec::new();
        for (id, known) in self.by_id.iter_mut().filter(|(_, known)| !known.is_reported) {
            let events = self.events.entry((known.owner, discriminant(&known.reason))).or_default();
            if *events < MAX_EVENTS {
                *events += 1;
                known.is_reported = true;
                due.push(UnguardedNetns { id: *id, why: known.reason.text() });
            }
        }
        self.pending -= due.len();
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(inode: u32) -> NetnsId {
        NetnsId { inode, cookie: inode.into() }
    }

    #[test]
    fn a_reason_is_reported_once_and_another_one_again() {
        let mut unguarded = UnguardedNamespaces::default();
        let now = Instant::now();
        for reason in [UnguardedReason::NoRoom, UnguardedReason::Disarmed(Disarmed::TakenOff)] {
            unguarded.insert(id(1), 7, reason.clone());
            assert_eq!(unguarded.take_due(now), [UnguardedNetns { id: id(1), why: reason.text() }]);
            unguarded.insert(id(1), 7, reason);
            assert_eq!(unguarded.take_due(now), []);
        }
        unguarded.remove(id(1));
        assert!(!unguarded.contains(id(1)) && unguarded.shares.used() == 0);
    }

    #[test]
    fn an_attachment_does_not_hide_that_another_was_taken_off() {
        let mut unguarded = UnguardedNamespaces::default();
        for (reason, stays) in [
            (UnguardedReason::NoRoom, false),
            (UnguardedReason::NotAttached("no".to_owned()), false),
            (UnguardedReason::Disarmed(Disarmed::TakenOff), true),
        ] {
            unguarded.insert(id(1), 7, reason.clone());
            unguarded.on_attached(id(1));
            assert_eq!(unguarded.contains(id(1)), stays, "{reason:?}");
        }
    }

    #[test]
    fn a_flood_of_one_owner_is_spread_and_takes_nothing_from_another() {
        let mut unguarded = UnguardedNamespaces::default();
        let began = Instant::now();
        for _ in 0..2 {
            (0..4_000).for_each(|inode| unguarded.insert(id(inode), 7, UnguardedReason::NoRoom));
            assert_eq!(unguarded.count(), 4_000, "each is counted once");
        }
        let kept = unguarded.by_id.len();
        assert_eq!(kept, MAX_UNGUARDED * 3 / 4);
        assert!((0..4_000).all(|inode| unguarded.contains(id(inode))));
        assert_eq!(unguarded.take_due(began).len(), MAX_EVENTS);
        unguarded.insert(id(9_000), 8, UnguardedReason::NoRoom);
        unguarded.insert(id(0), 7, UnguardedReason::Disarmed(Disarmed::TakenOff));
        let due = unguarded.take_due(began);
        assert_eq!(due.len(), 2, "another owner, and another kind of reason: {due:?}");
        assert_eq!(unguarded.take_due(began), []);
        let mut reported = MAX_EVENTS + 2;
        for window in 1..1_000 {
            let due = unguarded.take_due(began + EVENT_WINDOW * window);
            assert!(due.len() <= MAX_EVENTS, "{due:?}");
            reported += due.len();
        }
        assert!((kept + 1..=kept + 2).contains(&reported), "each of them in the end: {reported}");
        unguarded.on_walk(|_| false);
        assert_eq!((unguarded.count(), unguarded.pending, unguarded.shares.used()), (0, 0, 0));
    }

    #[test]
    fn ever_other_names_of_a_program_in_front_are_one_kind_of_reason() {
        let mut unguarded = UnguardedNamespaces::default();
        let now = Instant::now();
        let mut events = 0;
        for name in 0..100 {
            let behind = Disarmed::Behind(name.to_string());
            unguarded.insert(id(1), 7, UnguardedReason::Disarmed(behind));
            events += unguarded.take_due(now).len();
        }
        assert_eq!(events, MAX_EVENTS);
    }
}
