//! The tracked sockets, by their kernel address. Their number is bounded, and owners share it: a connection beyond it
//! is counted, not kept.

use std::collections::{HashMap, VecDeque};

use selfconn_ebpf::{Endpoint, Opener, Owner, Transition, state};

use super::Tracked;
use crate::{
    budget::{
        OwnerLosses, SharedLimit,
        memory::{self, MAX_CONNECTIONS},
        owner_of_user, user_of_range,
    },
    detect::port_set::PortSet,
    sockets::SocketEntry,
};

/// Number of untracked transitions that are kept, because a second probe may report them a moment later.
const MAX_RECENT: usize = 64;

/// Number of users whose untracked connections are counted apart: all that a user namespace may map are one. All others
/// are [`OTHER_USERS`].
const MAX_USERS: usize = 512;
const OTHER_USERS: u32 = u32::MAX;

// Beside it: the attribution with its holders, the decision of the log, the id in both, and half of the tables again
// while they grow, or the keys by which a snapshot is compared (`identity.rs`).
const _: () = assert!(size_of::<Tracked>() * 3 / 2 + 400 <= memory::CONNECTION_BYTES);

#[derive(Debug)]
pub(super) struct TrackedTable {
    by_sock: HashMap<u64, Tracked>,
    shares: SharedLimit,
    /// The connections that were not tracked.
    pub(super) untracked: OwnerLosses,
    /// Kernel address, states and probe of the last untracked transitions.
    recent: VecDeque<(u64, (u8, u8), u8)>,
    /// Untracked connections that may still be open, by user, and their ports.
    maybe_open: HashMap<u32, u64>,
    maybe_open_ports: PortSet,
    /// The ports of those since the last snapshot began, which it may not have.
    ports_since_snapshot: PortSet,
}

impl Default for TrackedTable {
    fn default() -> Self {
        Self {
            by_sock: HashMap::new(),
            shares: SharedLimit::new(MAX_CONNECTIONS),
            untracked: OwnerLosses::default(),
            recent: VecDeque::new(),
            maybe_open: HashMap::new(),
            maybe_open_ports: PortSet::default(),
            ports_since_snapshot: PortSet::default(),
        }
    }
}

impl TrackedTable {
    pub(super) fn get(&self, sock: u64) -> Option<&Tracked> {
        self.by_sock.get(&sock)
    }

    pub(super) fn get_mut(&mut self, sock: u64) -> Option<&mut Tracked> {
        self.by_sock.get_mut(&sock)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Tracked)> + Clone {
        self.by_sock.iter().map(|(sock, tracked)| (*sock, tracked))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Tracked)> {
        self.by_sock.iter_mut().map(|(sock, tracked)| (*sock, tracked))
    }

    /// Number of tracked sockets.
    pub(super) fn count(&self) -> usize {
        self.by_sock.len()
    }

    /// True if there is room for one more of this owner.
    pub(super) fn take_room(&mut self, owner: Owner) -> bool {
        self.shares.try_take(owner, 1)
    }

    /// Adds a socket for which [`Self::take_room`] took room, in place of the one that had this address.
    pub(super) fn insert(&mut self, sock: u64, tracked: Tracked) {
        if let Some(replaced) = self.by_sock.insert(sock, tracked) {
            self.shares.give_back(replaced.payer, 1);
        }
    }

    pub(super) fn remove(&mut self, sock: u64) -> Option<Tracked> {
        let tracked = self.by_sock.remove(&sock)?;
        self.shares.give_back(tracked.payer, 1);
        Some(tracked)
    }

    /// A socket has another key from now on.
    pub(super) fn change_key(&mut self, from: u64, to: u64) {
        if let Some(tracked) = self.by_sock.remove(&from) {
            self.insert(to, tracked);
        }
    }

    /// A transition of a socket that is not tracked, because its owner has no room. It is counted once for each
    /// connection: when it is ESTABLISHED.
    pub(super) fn on_untracked(&mut self, owner: Owner, t: &Transition) {
        if t.new != state::ESTABLISHED {
            return;
        }
        let is_duplicate = |(sock, states, probe_id): &(u64, (u8, u8), u8)| {
            *sock == t.sock && *states == (t.old, t.new) && *probe_id != t.probe_id
        };
        if let Some(at) = self.recent.iter().position(is_duplicate) {
            self.recent.remove(at);
            return;
        }
        if self.recent.len() >= MAX_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((t.sock, (t.old, t.new), t.probe_id));
        count_open(&mut self.maybe_open, owner.uid, 1);
        self.maybe_open_ports.insert(&t.endpoint);
        self.ports_since_snapshot.insert(&t.endpoint);
        self.untracked.count(owner, 1);
    }

    /// True if a connection that is not tracked, and may still be open, may hold this port.
    pub(super) fn may_lack_open_at(&self, endpoint: &Endpoint) -> bool {
        self.maybe_open_ports.may_have(endpoint) || self.ports_since_snapshot.may_have(endpoint)
    }

    /// The ports of the connections that are not tracked, and may still be open.
    pub(super) fn untracked_ports(&self) -> PortSet {
        let mut ports = self.maybe_open_ports.clone();
        ports.extend(&self.ports_since_snapshot);
        ports
    }

    /// A snapshot begins.
    pub(super) fn begin_snapshot(&mut self) {
        self.ports_since_snapshot.clear();
    }

    /// How many connections of each owner a snapshot has found that are not tracked. Those of a user that may have been
    /// counted before are not counted again. `ports` has their ports.
    pub(super) fn on_listed_untracked(&mut self, found: impl Iterator<Item = (Owner, u64)>, ports: PortSet) {
        let (mut known, mut open) = (std::mem::take(&mut self.maybe_open), HashMap::new());
        for (owner, count) in found {
            count_open(&mut open, owner.uid, count);
            let user = user_of_range(owner.uid);
            let user = if known.contains_key(&user) { user } else { OTHER_USERS };
            let known = known.entry(user).or_default();
            let new = count.saturating_sub(*known);
            *known = known.saturating_sub(count);
            if new > 0 {
                self.untracked.count(owner, new);
            }
        }
        (self.maybe_open, self.maybe_open_ports) = (open, ports);
    }
}

fn count_open(counts: &mut HashMap<u32, u64>, uid: u32, count: u64) {
    let user = user_of_range(uid);
    let is_apart = counts.contains_key(&user) || counts.len() < MAX_USERS;
    *counts.entry(if is_apart { user } else { OTHER_USERS }).or_default() += count;
}

/// Who pays for a socket.
pub(super) fn payer_of_transition(t: &Transition) -> Owner {
    payer((t.opener.at_ns != 0).then_some(&t.opener), t.uid)
}

/// Who pays for a socket that the socket table lists.
pub(super) fn payer_of_entry(entry: &SocketEntry) -> Owner {
    payer(entry.connect_entry.as_ref().map(|entry| &entry.1), entry.uid.unwrap_or(0))
}

/// The owner of the opener or, if the opener is unknown, of the socket.
pub(super) fn payer(opener: Option<&Opener>, uid: u32) -> Owner {
    opener.map_or_else(|| owner_of_user(Some(uid)), |opener| opener.owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_of_one_user_hides_no_connection_of_another() {
        let (attacker, victim) = (Owner::new(65_534, 0), Owner::new(1_000, 0));
        let mut table = TrackedTable::default();
        let mut list = |found: &[(Owner, u64)]| {
            table.on_listed_untracked(found.iter().copied(), PortSet::default());
            table.untracked.take_unreported()
        };
        assert_eq!(list(&[(attacker, 300_000)]), [(attacker, 300_000)]);
        assert_eq!(list(&[(attacker, 10), (victim, 1)]), [(victim, 1)]);
        // In another session, the user is the same.
        assert_eq!(list(&[(Owner::new(1_000, 9), 2), (attacker, 10)]), [(Owner::new(1_000, 9), 1)]);
        // More users than are counted apart.
        let many = MAX_USERS as u32 + 100;
        let users: Vec<_> = (2_000..2_000 + many).map(|uid| (Owner::new(uid, 0), 1)).collect();
        assert_eq!(list(&users).iter().map(|(_, count)| count).sum::<u64>(), u64::from(many));
        assert!(list(&users).is_empty());
        // All that a user namespace maps are one.
        let mapped = |per_uid| (0..many).map(move |uid| (Owner::new(131_072 + uid, 0), per_uid));
        list(&mapped(3).collect::<Vec<_>>());
        assert_eq!(list(&mapped(1).chain([(victim, 1)]).collect::<Vec<_>>()), [(victim, 1)]);
    }

    #[test]
    fn many_uids_of_a_user_namespace_whose_openers_are_unknown_leave_room() {
        let mut table = TrackedTable::default();
        let taken = (70_000..130_000).filter(|uid| table.take_room(payer(None, *uid))).count();
        assert_eq!(taken, MAX_CONNECTIONS * 7 / 8);
        assert!(table.take_room(payer(None, 1_000)) && table.take_room(payer(None, 0)));
    }
}
