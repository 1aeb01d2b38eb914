//! Reconciles the tracked connections with the kernel's socket table: a self-connection that the table lists
//! and the hooks missed is established, a self-connection that the table no longer lists is closed. Pure,
//! too.
//!
//! A dump of the table is not atomic: the kernel sends it in pieces, and it can skip a socket when other
//! sockets of the same hash bucket are removed between two pieces. One dump that lists a socket proves that
//! the socket exists. Only two dumps in a row of its network namespace without the socket prove that it is gone, or one
//! that shows that the namespace has ended.
//!
//! When a socket of the table and a tracked connection are the same is decided in `identity.rs`.

use std::collections::HashMap;

use selfconn_ebpf::{Owner, Transition, state};

use super::{
    Connection, ConnectionEnd, ConnectionEvent, Connections, Tracked, close,
    identity::{Agreement, ClosedSockets, ListedSocket, SocketId, TrackedKeys, agreement},
    rank,
    table::payer_of_entry,
};
use crate::{
    budget::{memory, owner_of_user},
    sockets::{Coverage, LeftOut, SocketEntry},
};

// Of a snapshot the owners of untracked sockets, and of the tracked connections the keys of vanished ones.
const _: () = assert!(
    size_of::<Owner>() <= memory::MATCHED_SOCKET_BYTES
        && size_of::<u64>() <= memory::MATCHED_CONNECTION_BYTES
);

/// ESTABLISHED or later. A socket that is still connecting is not a self-connection yet. One in TIME_WAIT is
/// not a self-connection any more.
fn is_open(entry: &SocketEntry) -> bool {
    rank(entry.state) >= rank(state::ESTABLISHED) && entry.state != state::TIME_WAIT
}

impl Connections {
    /// Must be called before the socket table is read. From now on, every close is recorded: a snapshot that
    /// still lists the closed connection must not establish it again.
    pub fn begin_snapshot(&mut self) {
        self.closed_during_snapshot = Some(ClosedSockets::default());
        self.tracked.begin_snapshot();
    }

    /// The self-connections that the snapshot has left out. Must be called before [`Self::reconcile`], for which
    /// `coverage` must be `Unknown` where one may have been left out.
    pub fn set_left_out(&mut self, left_out: &LeftOut) {
        self.left_out = left_out.users().collect();
        self.left_out_ports = left_out.ports().clone();
    }

    /// Compares the tracked connections with a snapshot of the socket table. Every transition until the
    /// snapshot must have been applied before. `began_ns` is when the snapshot began (`CLOCK_BOOTTIME`).
    /// `coverage` says what it means that the snapshot does not list a connection.
    ///
    /// Returns the number of self-connections that the hooks missed, which are those established here.
    pub fn reconcile(
        &mut self,
        entries: &[SocketEntry],
        began_ns: u64,
        coverage: impl Fn(&Connection) -> Coverage,
        mut each: impl FnMut(ConnectionEvent<'_>),
    ) -> u64 {
        let closed_during_snapshot = self.closed_during_snapshot.take().unwrap_or_default();
        let left_out = std::mem::take(&mut self.left_out);
        // Some of them may be tracked. Then it is known all the same who holds the port.
        let mut untracked_ports = std::mem::take(&mut self.left_out_ports);
        self.tracked.iter_mut().for_each(|(_, tracked)| tracked.is_listed = false);
        let open = self.tracked.iter().filter(|(_, tracked)| tracked.closed_ns.is_none());
        let known = TrackedKeys::of(open.map(|(key, tracked)| (key, &tracked.connection)));
        let mut missed = 0;
        let mut untracked = Vec::new();
        for entry in entries.iter().filter(|entry| is_open(entry)) {
            let tracked = known.find(entry).and_then(|key| self.tracked.get_mut(key));
            let found = tracked.map(|tracked| (agreement(&tracked.connection, entry), tracked));
            if let Some((agreement @ (Agreement::Proven | Agreement::Possible), tracked)) = found {
                tracked.is_listed = true;
                let connection = &mut tracked.connection;
                if agreement == Agreement::Proven {
                    connection.cookie = connection.cookie.or(entry.cookie);
                    if entry.options.is_known() {
                        connection.options = entry.options;
                    }
                }
                connection.inode = connection.inode.or((entry.inode != 0).then_some(entry.inode));
                if entry.device.is_some() {
                    connection.device.clone_from(&entry.device);
                }
                if entry.is_held {
                    connection.is_kernel_socket = Some(false);
                }
                // Its connect() was reported, but the hooks missed that it was established.
                if !tracked.established_emitted && tracked.last_seen_ns < began_ns {
                    tracked.established_emitted = true;
                    missed += 1;
                    each(ConnectionEvent::Established(&tracked.connection));
                }
            } else {
                let listed = closed_during_snapshot.find(entry, began_ns);
                if listed == ListedSocket::Closed {
                    continue;
                }
                let payer = payer_of_entry(entry);
                // What may be closed already makes no event, and may be a loss.
                if listed == ListedSocket::Uncertain || !self.tracked.take_room(payer) {
                    if untracked.is_empty() {
                        // A vector that grows is there twice.
                        untracked.reserve_exact(entries.len());
                    }
                    untracked.push(payer);
                    untracked_ports.insert(&entry.endpoint);
                    continue;
                }
                missed += 1;
                self.last_number += 1;
                // The numbers of connections are no kernel addresses.
                let key = entry.connect_entry.as_ref().map_or(self.last_number, |entry| entry.0);
                self.close_missed(key, &mut each);
                let tracked = Tracked::from_entry(self.last_number, payer, entry, began_ns);
                each(ConnectionEvent::Established(&tracked.connection));
                if entry.connect_entry.is_none() {
                    for id in SocketId::all_of(entry.cookie, &entry.endpoint) {
                        self.provisional_keys.insert(id, key);
                    }
                }
                self.tracked.insert(key, tracked);
            }
        }
        drop(known);
        let (count, mut vanished) = (self.tracked.count(), Vec::new());
        for (key, tracked) in self.tracked.iter_mut().filter(|(_, tracked)| tracked.closed_ns.is_none()) {
            if tracked.last_seen_ns >= began_ns || tracked.is_listed {
                tracked.was_absent = false;
                continue;
            }
            let mut has_vanished = false;
            match coverage(&tracked.connection) {
                Coverage::NetnsEnded => has_vanished = true,
                Coverage::Read if tracked.was_absent => has_vanished = true,
                Coverage::Read => tracked.was_absent = true,
                // Where there is not time for all namespaces, not each snapshot reads the same.
                Coverage::Unknown => {}
            }
            if has_vanished {
                if vanished.is_empty() {
                    vanished.reserve_exact(count);
                }
                vanished.push(key);
            }
        }
        // Some of those that the snapshot left out are tracked.
        let is_unseen = |(_, tracked): &(u64, &Tracked)| tracked.closed_ns.is_none() && !tracked.is_listed;
        let mut unseen: HashMap<Option<u32>, u64> = HashMap::new();
        for (_, tracked) in self.tracked.iter().filter(is_unseen).filter(|_| !left_out.is_empty()) {
            let uid = Some(tracked.connection.uid.unwrap_or_default());
            *unseen.entry(uid.filter(|_| left_out.contains_key(&uid))).or_default() += 1;
        }
        let left_out = left_out.into_iter().map(|(uid, count)| {
            let tracked = unseen.get(&uid).copied().unwrap_or_default();
            (uid.map_or(Owner::UNKNOWN, |uid| owner_of_user(Some(uid))), count.saturating_sub(tracked))
        });
        let found = untracked.into_iter().map(|owner| (owner, 1)).chain(left_out);
        self.tracked.on_listed_untracked(found, untracked_ports);
        for tracked in vanished.into_iter().filter_map(|key| self.tracked.remove(key)) {
            let connection = &tracked.connection;
            for id in SocketId::all_of(connection.cookie, &connection.endpoint) {
                self.provisional_keys.remove(&id);
            }
            if tracked.established_emitted {
                close(&mut None, connection, ConnectionEnd::default(), &mut each);
            }
        }
        missed
    }

    /// Assigns the kernel address of a transition to a connection that only the socket table has listed so far.
    pub(super) fn assign_socket(&mut self, t: &Transition, each: impl FnMut(ConnectionEvent<'_>)) {
        if self.provisional_keys.is_empty() {
            return;
        }
        let cookie = (t.cookie != 0).then_some(t.cookie);
        let found = SocketId::all_of(cookie, &t.endpoint).find_map(|id| {
            let key = *self.provisional_keys.get(&id)?;
            let listed_cookie = self.tracked.get(key)?.connection.cookie;
            (cookie.is_none() || listed_cookie.is_none() || cookie == listed_cookie).then_some(key)
        });
        if let Some(key) = found
            && let Some(tracked) = self.tracked.get(key)
        {
            let connection = &tracked.connection;
            for id in SocketId::all_of(connection.cookie, &connection.endpoint) {
                self.provisional_keys.remove(&id);
            }
            if key != t.sock {
                self.close_missed(t.sock, each);
            }
            self.tracked.change_key(key, t.sock);
        }
    }
}

impl Tracked {
    /// A connection that a snapshot of the socket table, begun at `at_ns`, lists.
    fn from_entry(number: u64, payer: Owner, entry: &SocketEntry, at_ns: u64) -> Self {
        Self {
            payer,
            connection: Connection::from_entry(number, entry),
            last: (entry.state, entry.state),
            reported_by: u8::MAX,
            last_seen_ns: at_ns,
            established_emitted: true,
            is_listed: true,
            was_absent: false,
            closed_ns: None,
        }
    }
}
