//! The identity of a socket: when a socket of the kernel's table and a tracked connection are the same. Pure, too.
//!
//! The cookie decides. Two sockets can have the same addresses and ports at the same time if they are bound to
//! different devices, and one after the other, so an endpoint identifies a socket only if its cookie is unknown: if the
//! programs could not read it, or if the table is that of procfs, which has neither cookies nor devices.

use std::collections::{HashMap, HashSet};

use selfconn_ebpf::Endpoint;

use super::{Connection, Tracked};
use crate::{
    budget::{
        SharedLimit, USER_SET_BYTES, UserSet,
        memory::{self, MAX_CLOSED_DURING_SNAPSHOT},
    },
    sockets::SocketEntry,
};

// A cookie or an endpoint, another endpoint, and the share of an owner, in tables that are at most seven eighths full.
const _: () = assert!(
    (size_of::<u64>() + size_of::<Endpoint>() + 2) * 8 / 7
        + SharedLimit::OWNER_BYTES
        + USER_SET_BYTES / MAX_CLOSED_DURING_SNAPSHOT
        <= memory::CLOSED_DURING_SNAPSHOT_BYTES
);

// The keys of tracked connections are there only while a snapshot is compared. In the worst case no cookie is known.
// They have the room that the table of connections takes beside itself while it grows: a full table does not grow.
const _: () = assert!(2 * (size_of::<(Endpoint, u64)>() + 1) * 8 / 7 <= size_of::<Tracked>() / 2);

/// What a socket is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketId {
    /// Unique until the next boot.
    Cookie(u64),
    /// A [key](Endpoint::table_key). Another socket can have it later.
    Endpoint(Endpoint),
}

impl SocketId {
    /// The id that identifies a socket best.
    #[must_use]
    pub fn new(cookie: Option<u64>, endpoint: &Endpoint) -> Self {
        cookie.map_or_else(|| Self::Endpoint(endpoint.table_key()), Self::Cookie)
    }

    /// The id of a transition or an entry with this cookie, and the id that it has where the cookie is unknown.
    pub(super) fn all_of(cookie: Option<u64>, endpoint: &Endpoint) -> impl Iterator<Item = Self> {
        cookie.map(Self::Cookie).into_iter().chain([Self::Endpoint(endpoint.table_key())])
    }
}

/// Closed connections, to recognize them in a snapshot that still lists them. Owners share their number: one owner's
/// closes take no room from another's, and make no connection of another uncertain.
#[derive(Debug)]
pub(super) struct ClosedSockets {
    cookies: HashSet<u64>,
    /// Keys of the connections whose cookies are unknown.
    without_cookie: HashSet<Endpoint>,
    /// Keys of all connections, without device.
    endpoints: HashSet<Endpoint>,
    shares: SharedLimit,
    /// The users who have closed more connections than are kept: the owners of the sockets, and their openers.
    users_with_more: UserSet,
}

/// Whether a socket that a snapshot lists was closed meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListedSocket {
    Open,
    Closed,
    /// It may be one of those beyond the share of its owner.
    Uncertain,
}

impl Default for ClosedSockets {
    fn default() -> Self {
        Self {
            cookies: HashSet::new(),
            without_cookie: HashSet::new(),
            endpoints: HashSet::new(),
            shares: SharedLimit::new(MAX_CLOSED_DURING_SNAPSHOT),
            users_with_more: UserSet::default(),
        }
    }
}

impl ClosedSockets {
    pub(super) fn insert(&mut self, connection: &Connection) {
        let payer = connection.payer();
        if !self.shares.try_take(payer, 1) {
            // The snapshot may list the socket without its opener.
            self.users_with_more.insert(payer.uid);
            self.users_with_more.insert(connection.uid.unwrap_or(payer.uid));
            return;
        }
        match connection.cookie {
            Some(cookie) => self.cookies.insert(cookie),
            None => self.without_cookie.insert(connection.endpoint.table_key()),
        };
        self.endpoints.insert(connection.endpoint.deviceless_key());
    }

    /// What is known of this socket of a snapshot that began at `began_ns`. Its entry in the connect table must have
    /// been looked up after the snapshot.
    pub(super) fn find(&self, entry: &SocketEntry, began_ns: u64) -> ListedSocket {
        let is_closed = match entry.cookie {
            Some(cookie) => {
                self.cookies.contains(&cookie) || self.without_cookie.contains(&entry.endpoint.table_key())
            }
            None => self.endpoints.contains(&entry.endpoint.deviceless_key()),
        };
        // The programs remove the entry of a socket that is closed. A later entry may be that of the next socket there.
        let is_still_connected = entry.connect_entry.as_ref().is_some_and(|entry| entry.1.at_ns < began_ns);
        let may_be_one_of_more = match entry.uid {
            Some(uid) => self.users_with_more.contains(uid),
            None => !self.users_with_more.is_empty(),
        };
        if is_closed {
            ListedSocket::Closed
        } else if may_be_one_of_more && !is_still_connected {
            ListedSocket::Uncertain
        } else {
            ListedSocket::Open
        }
    }
}

/// Keys of tracked connections, by what the entries of a snapshot can be matched with.
pub(super) struct TrackedKeys {
    by_cookie: HashMap<u64, u64>,
    /// Those whose cookies are unknown.
    without_cookie: HashMap<Endpoint, u64>,
    by_endpoint: HashMap<Endpoint, u64>,
}

impl TrackedKeys {
    /// Of these connections. The tables have their size at once, because one that grows is there twice.
    pub(super) fn of<'a>(connections: impl Iterator<Item = (u64, &'a Connection)> + Clone) -> Self {
        let count = connections.clone().count();
        let with_cookie = connections.clone().filter(|(_, connection)| connection.cookie.is_some()).count();
        let mut keys = Self {
            by_cookie: HashMap::with_capacity(with_cookie),
            without_cookie: HashMap::with_capacity(count - with_cookie),
            by_endpoint: HashMap::with_capacity(count),
        };
        connections.for_each(|(key, connection)| keys.insert(connection, key));
        keys
    }

    fn insert(&mut self, connection: &Connection, key: u64) {
        match connection.cookie {
            Some(cookie) => self.by_cookie.insert(cookie, key),
            None => self.without_cookie.insert(connection.endpoint.table_key(), key),
        };
        self.by_endpoint.insert(connection.endpoint.deviceless_key(), key);
    }

    /// The key of the connection that can be this entry. If the connection has no cookie, the caller must check that
    /// the entry [agrees](agrees) with it.
    pub(super) fn find(&self, entry: &SocketEntry) -> Option<u64> {
        match entry.cookie {
            Some(cookie) => self
                .by_cookie
                .get(&cookie)
                .or_else(|| self.without_cookie.get(&entry.endpoint.table_key()))
                .copied(),
            None => self.by_endpoint.get(&entry.endpoint.deviceless_key()).copied(),
        }
    }
}

/// How certain it is that an entry at the endpoint of a connection is its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreement {
    /// Inode and owner are known and equal.
    Proven,
    /// Nothing contradicts it.
    Possible,
    /// It is another socket.
    Refuted,
}

pub(super) fn agreement(connection: &Connection, entry: &SocketEntry) -> Agreement {
    if connection.cookie.is_some() && connection.cookie == entry.cookie {
        return Agreement::Proven;
    }
    match (connection.inode, connection.uid) {
        // A socket without a file has inode 0 in the table, too.
        (Some(_), _) if entry.inode == 0 => Agreement::Possible,
        (Some(inode), uid) if inode == entry.inode && uid == entry.uid => Agreement::Proven,
        (Some(_), _) => Agreement::Refuted,
        (None, _) => Agreement::Possible,
    }
}
