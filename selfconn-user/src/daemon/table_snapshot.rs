//! A snapshot of the socket table of every network namespace, with the processes that have the
//! self-connections open.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use selfconn_ebpf::ConnectEntry;

use crate::{
    detect::connection::{Connection, ListedConnection, Place},
    sockets::{self, SocketSnapshot},
    system::process::Holder,
};

/// The self-connections in the socket tables of all namespaces, and the processes that have them open.
pub(super) struct TableSnapshot {
    snapshot: SocketSnapshot,
    holders: HashMap<Place, Vec<Holder>>,
}

/// Reads the socket tables. This may take long. `netns_hints` are threads that may be the only ones in their
/// namespace.
pub(super) fn take_snapshot(netns_hints: &[u32]) -> TableSnapshot {
    let options = sockets::SnapshotOptions { attempts: true, ..Default::default() };
    let snapshot = sockets::snapshot(options, netns_hints).unwrap_or_else(|error| {
        // An empty snapshot covers no namespace, so no connection is considered closed.
        log::error!("the socket table can't be read: {error}");
        SocketSnapshot::default()
    });
    for why in &snapshot.unseen {
        log::info!("the socket table of a network namespace can't be read: {why}");
    }
    let inodes: HashSet<u64> =
        snapshot.entries.iter().map(|socket| socket.inode).filter(|inode| *inode != 0).collect();
    // The walk over the file descriptors of all processes is expensive. It is needed only if there is a
    // self-connection.
    let by_inode = if inodes.is_empty() {
        HashMap::new()
    } else {
        sockets::find_holders(&inodes, sockets::HolderSearch::Complete).by_inode
    };
    let holders_of = |socket: &sockets::SocketEntry| {
        by_inode.get(&socket.inode).map(|holders| ((socket.netns, socket.addr, socket.port), holders.clone()))
    };
    TableSnapshot { holders: snapshot.entries.iter().filter_map(holders_of).collect(), snapshot }
}

impl TableSnapshot {
    /// When the snapshot began: `CLOCK_BOOTTIME`, nanoseconds.
    pub(super) fn began_ns(&self) -> u64 {
        self.snapshot.began_ns
    }

    /// True if the snapshot includes this network namespace.
    pub(super) fn covers(&self, netns: u32) -> bool {
        self.snapshot.namespaces.contains(&netns)
    }

    /// The processes that have a self-connection open. `None`: none was found.
    pub(super) fn holders(&self, connection: &Connection) -> Option<Vec<Holder>> {
        let place = connection.place();
        let holders = match place {
            // Without BTF the probes do not know the namespace.
            (0, addr, port) => self.holders.iter().find(|((_, a, p), _)| (*a, *p) == (addr, port))?.1,
            _ => self.holders.get(&place)?,
        };
        Some(holders.clone())
    }

    /// The listed self-connections, with their entries in the connect table.
    pub(super) fn listed(&self, entries: &[(u64, ConnectEntry)], knows_netns: bool) -> Vec<ListedConnection> {
        let entries_by_place: HashMap<Place, (u64, &ConnectEntry)> =
            entries.iter().map(|(sock, entry)| (place(entry), (*sock, entry))).collect();
        let listed = |socket: &sockets::SocketEntry| {
            let netns = if knows_netns { socket.netns } else { 0 };
            let entry = entries_by_place
                .get(&(netns, socket.addr, socket.port))
                .map(|(sock, entry)| (*sock, entry.opener));
            ListedConnection {
                netns,
                addr: socket.addr,
                port: socket.port,
                is_ipv6: socket.is_ipv6,
                ifindex: socket.ifindex,
                cookie: socket.cookie,
                uid: socket.uid,
                state: socket.state,
                connect_entry: entry,
            }
        };
        self.snapshot.entries.iter().map(listed).collect()
    }

    /// The connections in `listed` that are in TIME_WAIT, with the time that is left.
    pub(super) fn time_waits<'a>(
        &'a self,
        listed: &'a [ListedConnection],
    ) -> impl Iterator<Item = (&'a ListedConnection, Duration)> {
        // `listed` has the same order as the snapshot's entries.
        listed
            .iter()
            .zip(&self.snapshot.entries)
            .filter_map(|(listed, socket)| Some((listed, socket.time_wait_left?)))
    }

    /// Kernel addresses in the connect table whose sockets no longer exist: the entry is older than the
    /// snapshot, its namespace was read, and the snapshot lists neither a self-connection nor a connection
    /// attempt for it.
    pub(super) fn stale_connects(&self, entries: &[(u64, ConnectEntry)]) -> Vec<u64> {
        let existing: HashSet<Place> = self
            .snapshot
            .entries
            .iter()
            .map(|socket| (socket.netns, socket.addr, socket.port))
            .chain(self.snapshot.attempts.iter().map(|entry| (entry.netns, entry.addr, entry.dport)))
            .collect();
        let is_stale = |entry: &ConnectEntry| {
            entry.opener.at_ns < self.snapshot.began_ns
                && self.covers(entry.endpoint.netns)
                && !existing.contains(&place(entry))
        };
        entries.iter().filter(|(_, entry)| is_stale(entry)).map(|(sock, _)| *sock).collect()
    }
}

fn place(entry: &ConnectEntry) -> Place {
    (entry.endpoint.netns, entry.endpoint.ip(), entry.endpoint.port)
}
