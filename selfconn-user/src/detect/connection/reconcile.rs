//! Reconciles the tracked connections with the kernel's socket table: a self-connection that the table lists
//! and the hooks missed is established, a self-connection that the table no longer lists is closed. Pure,
//! too.
//!
//! A dump of the table is not atomic: the kernel sends it in pieces, and it can skip a socket when other
//! sockets of the same hash bucket are removed between two pieces. One dump that lists a socket proves that
//! the socket exists. Only two dumps in a row without the socket prove that it is gone.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use selfconn_ebpf::{Opener, Transition, state};

use super::{Connection, ConnectionEnd, ConnectionEvent, Connections, Source, Tracked, close, place, rank};

/// Identity of a self-connection in the socket table: network namespace, address and port. No two live
/// sockets have the same. Namespace 0: unknown.
pub type Place = (u32, IpAddr, u16);

/// A self-connection that the socket table lists. The fields mean the same as in [`Connection`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedConnection {
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    pub addr: IpAddr,
    pub port: u16,
    pub is_ipv6: bool,
    pub ifindex: Option<u32>,
    pub cookie: Option<u64>,
    pub uid: Option<u32>,
    /// One of [`state`].
    pub state: u8,
    /// The socket's kernel address and its opener, if the connect table has an entry for it.
    pub connect_entry: Option<(u64, Opener)>,
}

impl ListedConnection {
    /// A [`Connection`] with this number and all that the socket table says.
    #[must_use]
    pub fn to_connection(&self, number: u64) -> Connection {
        Connection {
            number,
            source: Source::Scan,
            cookie: self.cookie,
            addr: self.addr,
            port: self.port,
            is_ipv6: self.is_ipv6,
            netns: (self.netns != 0).then_some(self.netns),
            ifindex: self.ifindex,
            uid: self.uid,
            opener: self.connect_entry.map(|(_, opener)| opener),
            isns: None,
            closer: None,
            established_ns: None,
        }
    }

    /// ESTABLISHED or later. A socket that is still connecting is not a self-connection yet. One in TIME_WAIT
    /// is not a self-connection any more.
    fn is_open(&self) -> bool {
        rank(self.state) >= rank(state::ESTABLISHED) && self.state != state::TIME_WAIT
    }
}

impl Connections {
    /// Must be called before the socket table is read. From now on, every close is recorded: a snapshot that
    /// still lists the closed connection must not establish it again.
    pub fn begin_snapshot(&mut self) {
        self.closed_during_snapshot = Some(HashSet::new());
    }

    /// Compares the tracked connections with a snapshot of the socket table. Every transition until the
    /// snapshot must have been applied before. `began_ns` is when the snapshot began (`CLOCK_BOOTTIME`).
    /// `was_read` returns true if the snapshot covers that network namespace.
    ///
    /// Returns the number of self-connections that the hooks missed, which are those established here.
    pub fn reconcile(
        &mut self,
        listed: &[ListedConnection],
        began_ns: u64,
        was_read: impl Fn(u32) -> bool,
        mut each: impl FnMut(ConnectionEvent<'_>),
    ) -> u64 {
        let closed_during_snapshot = self.closed_during_snapshot.take().unwrap_or_default();
        let known: HashMap<Place, u64> = self
            .tracked
            .iter()
            .filter(|(_, tracked)| tracked.closed_ns.is_none())
            .map(|(key, tracked)| (tracked.connection.place(), *key))
            .collect();
        let mut seen = HashSet::new();
        let mut missed = 0;
        for listed in listed.iter().filter(|listed| listed.is_open()) {
            let place = (listed.netns, listed.addr, listed.port);
            seen.insert(place);
            if let Some(tracked) = known.get(&place).and_then(|key| self.tracked.get_mut(key)) {
                tracked.connection.cookie = tracked.connection.cookie.or(listed.cookie);
                // Its connect() was reported, but the hooks missed that it was established.
                if !tracked.established_emitted && tracked.last_seen_ns < began_ns {
                    tracked.established_emitted = true;
                    missed += 1;
                    each(ConnectionEvent::Established(&tracked.connection));
                }
            } else if !closed_during_snapshot.contains(&place) {
                missed += 1;
                self.last_number += 1;
                let tracked = Tracked::from_table(self.last_number, listed, began_ns);
                each(ConnectionEvent::Established(&tracked.connection));
                let key = listed.connect_entry.map_or(self.last_number, |(sock, _)| sock);
                if listed.connect_entry.is_none() {
                    self.provisional_keys.insert(place, key);
                }
                self.tracked.insert(key, tracked);
            }
        }
        let mut vanished = Vec::new();
        for (key, tracked) in self.tracked.iter_mut().filter(|(_, tracked)| tracked.closed_ns.is_none()) {
            let place = tracked.connection.place();
            let is_absent = tracked.last_seen_ns < began_ns && was_read(place.0) && !seen.contains(&place);
            if is_absent && tracked.was_absent {
                vanished.push(*key);
            }
            tracked.was_absent = is_absent;
        }
        for tracked in vanished.into_iter().filter_map(|key| self.tracked.remove(&key)) {
            self.provisional_keys.remove(&tracked.connection.place());
            if tracked.established_emitted {
                close(&mut None, &tracked.connection, ConnectionEnd::default(), &mut each);
            }
        }
        missed
    }

    /// Assigns the kernel address of a transition to a connection that was known by its endpoint only.
    pub(super) fn assign_socket(&mut self, t: &Transition) {
        if self.provisional_keys.is_empty() {
            return;
        }
        if let Some(key) = self.provisional_keys.remove(&place(t))
            && let Some(tracked) = self.tracked.remove(&key)
        {
            self.tracked.insert(t.sock, tracked);
        }
    }
}

impl Tracked {
    /// A connection that a snapshot of the socket table, begun at `at_ns`, lists.
    fn from_table(number: u64, listed: &ListedConnection, at_ns: u64) -> Self {
        Self {
            connection: listed.to_connection(number),
            last: (listed.state, listed.state),
            reported_by: u8::MAX,
            last_seen_ns: at_ns,
            established_emitted: true,
            was_absent: false,
            closed_ns: None,
        }
    }
}
