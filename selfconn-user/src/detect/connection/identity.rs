//! The identity of a socket: when a socket of the kernel's table and a tracked connection are the same. Pure, too.
//!
//! The cookie decides. Two sockets can have the same addresses and ports at the same time if they are bound to
//! different devices, and one after the other, so an endpoint identifies a socket only if its cookie is unknown: if the
//! programs could not read it, or if the table is that of procfs, which has neither cookies nor devices.

use std::collections::{HashMap, HashSet};

use selfconn_ebpf::Endpoint;

use super::Connection;
use crate::{budget::memory::MAX_CLOSED_DURING_SNAPSHOT, sockets::SocketEntry};

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

/// Closed connections, to recognize them in a snapshot that still lists them.
#[derive(Debug, Default)]
pub(super) struct ClosedSockets {
    cookies: HashSet<u64>,
    /// Keys of the connections whose cookies are unknown.
    without_cookie: HashSet<Endpoint>,
    /// Keys of all connections, without device.
    endpoints: HashSet<Endpoint>,
    /// True if there were more than are kept. Any listed connection may be closed then.
    has_more: bool,
}

impl ClosedSockets {
    pub(super) fn insert(&mut self, connection: &Connection) {
        if self.cookies.len() + self.without_cookie.len() >= MAX_CLOSED_DURING_SNAPSHOT {
            self.has_more = true;
            return;
        }
        match connection.cookie {
            Some(cookie) => self.cookies.insert(cookie),
            None => self.without_cookie.insert(connection.endpoint.table_key()),
        };
        self.endpoints.insert(connection.endpoint.deviceless_key());
    }

    pub(super) fn contains(&self, entry: &SocketEntry) -> bool {
        if self.has_more {
            return true;
        }
        match entry.cookie {
            Some(cookie) => {
                self.cookies.contains(&cookie) || self.without_cookie.contains(&entry.endpoint.table_key())
            }
            None => self.endpoints.contains(&entry.endpoint.deviceless_key()),
        }
    }
}

/// Keys of tracked connections, by what the entries of a snapshot can be matched with.
#[derive(Default)]
pub(super) struct TrackedKeys {
    by_cookie: HashMap<u64, u64>,
    /// Those whose cookies are unknown.
    without_cookie: HashMap<Endpoint, u64>,
    by_endpoint: HashMap<Endpoint, u64>,
}

impl TrackedKeys {
    pub(super) fn insert(&mut self, connection: &Connection, key: u64) {
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
