//! The processes that hold the listed sockets, and the public fields of their connections.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use crate::{
    detect::connection::{Connection, Source},
    event::ConnectionFields,
    sockets::{HolderSearch, SocketEntry, find_holders},
    system::process::{self, Attribution, Holder, ProcessInfo},
};

/// The processes that hold the sockets.
#[derive(Debug, Default)]
pub(super) struct SocketHolders {
    /// Holders of each socket that has any, by socket inode.
    pub(super) by_inode: HashMap<u64, Vec<Holder>>,
    pub(super) processes: HashMap<u32, Rc<ProcessInfo>>,
    /// True if all holders were found.
    pub(super) is_complete: bool,
    pub(super) unseen: Vec<String>,
}

impl SocketHolders {
    pub(super) fn collect(entries: &[SocketEntry], is_complete_search: bool) -> Self {
        let inodes: HashSet<_> =
            entries.iter().map(|entry| entry.inode).filter(|inode| *inode != 0).collect();
        if inodes.is_empty() {
            return Self::default();
        }
        if !process::is_in_initial_pid_ns() {
            let why = "holders: their pids are unknown outside the initial pid namespace".to_owned();
            return Self { unseen: vec![why], ..Self::default() };
        }
        let holders = find_holders(
            &inodes,
            if is_complete_search { HolderSearch::Complete } else { HolderSearch::Quick },
        );
        let unseen = holders.unseen.into_iter().collect();
        Self { by_inode: holders.by_inode, is_complete: holders.complete, unseen, ..Self::default() }
    }

    /// The holders of a socket. A socket without an inode has none. `None` if the holders are unknown.
    pub(super) fn holders(&self, entry: &SocketEntry) -> Option<&[Holder]> {
        if entry.inode == 0 { Some(&[]) } else { self.by_inode.get(&entry.inode).map(Vec::as_slice) }
    }

    /// The public fields of a socket's connection, without its id.
    pub(super) fn connection_fields(&mut self, entry: &SocketEntry) -> ConnectionFields {
        let holders = self.holders(entry).map(<[_]>::to_vec);
        let process = holders.as_ref().and_then(|holders| holders.first()).map(|first| {
            let read = || Rc::new(process::read(first.pid).unwrap_or_default());
            self.processes.entry(first.pid).or_insert_with(read).clone()
        });
        let attribution = Attribution { process: process.unwrap_or_default(), holders };
        let mut fields = ConnectionFields::new(&connection(entry), 0, &attribution);
        if entry.inode != 0 && !self.is_complete {
            fields.holders = None;
        }
        fields
    }
}

/// All that the socket table says about a connection.
fn connection(entry: &SocketEntry) -> Connection {
    Connection {
        number: 0,
        source: Source::Scan,
        cookie: entry.cookie,
        addr: entry.addr,
        port: entry.port,
        is_ipv6: entry.is_ipv6,
        netns: Some(entry.netns),
        ifindex: entry.ifindex,
        uid: entry.uid,
        opener: None,
        isns: None,
        closer: None,
        established_ns: None,
    }
}
