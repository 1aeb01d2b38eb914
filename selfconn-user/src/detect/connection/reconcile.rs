//! Reconciles the tracked connections with the kernel's socket table: a self-connection that the table lists
//! and the hooks missed is established, a self-connection that the table no longer lists is closed. Pure,
//! too.
//!
//! A dump of the table is not atomic: the kernel sends it in pieces, and it can skip a socket when other
//! sockets of the same hash bucket are removed between two pieces. One dump that lists a socket proves that
//! the socket exists. Only two dumps in a row without the socket prove that it is gone.
//!
//! A socket of the table and a tracked connection are the same if their namespace, address and port are. The
//! family does not count: an IPv4 socket and an IPv6 socket with a v4-mapped address cannot both have them.

use std::collections::{HashMap, HashSet};

use selfconn_ebpf::{Endpoint, Transition, state};

use super::{Connection, ConnectionEnd, ConnectionEvent, Connections, Tracked, close, rank};
use crate::sockets::SocketEntry;

/// ESTABLISHED or later. A socket that is still connecting is not a self-connection yet. One in TIME_WAIT is
/// not a self-connection any more.
fn is_open(entry: &SocketEntry) -> bool {
    rank(entry.state) >= rank(state::ESTABLISHED) && entry.state != state::TIME_WAIT
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
        entries: &[SocketEntry],
        began_ns: u64,
        was_read: impl Fn(u32) -> bool,
        mut each: impl FnMut(ConnectionEvent<'_>),
    ) -> u64 {
        let closed_during_snapshot = self.closed_during_snapshot.take().unwrap_or_default();
        let known: HashMap<Endpoint, u64> = self
            .tracked
            .iter()
            .filter(|(_, tracked)| tracked.closed_ns.is_none())
            .map(|(key, tracked)| (tracked.connection.endpoint.any_family(), *key))
            .collect();
        let mut seen = HashSet::new();
        let mut missed = 0;
        for entry in entries.iter().filter(|entry| is_open(entry)) {
            let endpoint = entry.endpoint.any_family();
            seen.insert(endpoint);
            if let Some(tracked) = known.get(&endpoint).and_then(|key| self.tracked.get_mut(key)) {
                tracked.connection.cookie = tracked.connection.cookie.or(entry.cookie);
                // Its connect() was reported, but the hooks missed that it was established.
                if !tracked.established_emitted && tracked.last_seen_ns < began_ns {
                    tracked.established_emitted = true;
                    missed += 1;
                    each(ConnectionEvent::Established(&tracked.connection));
                }
            } else if !closed_during_snapshot.contains(&endpoint) {
                missed += 1;
                self.last_number += 1;
                let tracked = Tracked::from_entry(self.last_number, entry, began_ns);
                each(ConnectionEvent::Established(&tracked.connection));
                let key = entry.connect_entry.map_or(self.last_number, |(sock, _)| sock);
                if entry.connect_entry.is_none() {
                    self.provisional_keys.insert(endpoint, key);
                }
                self.tracked.insert(key, tracked);
            }
        }
        let mut vanished = Vec::new();
        for (key, tracked) in self.tracked.iter_mut().filter(|(_, tracked)| tracked.closed_ns.is_none()) {
            let endpoint = tracked.connection.endpoint.any_family();
            let is_absent =
                tracked.last_seen_ns < began_ns && was_read(endpoint.netns) && !seen.contains(&endpoint);
            if is_absent && tracked.was_absent {
                vanished.push(*key);
            }
            tracked.was_absent = is_absent;
        }
        for tracked in vanished.into_iter().filter_map(|key| self.tracked.remove(&key)) {
            self.provisional_keys.remove(&tracked.connection.endpoint.any_family());
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
        if let Some(key) = self.provisional_keys.remove(&t.endpoint.any_family())
            && let Some(tracked) = self.tracked.remove(&key)
        {
            self.tracked.insert(t.sock, tracked);
        }
    }
}

impl Tracked {
    /// A connection that a snapshot of the socket table, begun at `at_ns`, lists.
    fn from_entry(number: u64, entry: &SocketEntry, at_ns: u64) -> Self {
        Self {
            connection: Connection::from_entry(number, entry),
            last: (entry.state, entry.state),
            reported_by: u8::MAX,
            last_seen_ns: at_ns,
            established_emitted: true,
            was_absent: false,
            closed_ns: None,
        }
    }
}
