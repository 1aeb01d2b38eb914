//! The processes that hold the listed sockets, and the public fields of their connections.

use std::{collections::HashMap, rc::Rc};

use crate::{
    detect::connection::Connection,
    event::ConnectionFields,
    lookup::blocking::BlockingLookups,
    sockets::{Holders, SocketEntry},
    system::process::{Attribution, Holder, ProcessInfo, Subject},
};

/// The processes that hold the sockets.
#[derive(Debug, Default)]
pub(super) struct SocketHolders {
    pub(super) found: Holders,
    pub(super) processes: HashMap<(u32, Option<u64>), Rc<ProcessInfo>>,
    pub(super) lookups: BlockingLookups,
}

impl SocketHolders {
    /// The holders of a socket. A socket without an inode has none. `None` if the holders are unknown.
    pub(super) fn holders(&self, entry: &SocketEntry) -> Option<&[Holder]> {
        match entry.socket_ref() {
            Some(socket) => self.found.of(&socket),
            None => Some(&[]),
        }
    }

    /// True if no process has the socket open.
    pub(super) fn has_none(&self, entry: &SocketEntry) -> bool {
        entry.socket_ref().is_some_and(|socket| self.found.has_none(&socket))
    }

    /// The public fields of a socket's connection, without its id.
    pub(super) fn connection_fields(&mut self, entry: &SocketEntry) -> ConnectionFields {
        let holders = self.holders(entry).map(<[_]>::to_vec);
        let process = holders.as_ref().and_then(|holders| holders.first()).map(|first| {
            let read = || {
                let started = first.start_ticks;
                let process = started.and_then(|start_ticks| self.lookups.read(first.pid, start_ticks));
                Rc::new(process.unwrap_or_default())
            };
            self.processes.entry((first.pid, first.start_ticks)).or_insert_with(read).clone()
        });
        let mut attribution = Attribution { holders, ..Attribution::default() };
        if let Some((first, process)) = attribution.first_holder().cloned().zip(process) {
            attribution.set_process(Subject::Holder(Rc::new(first)), process);
        }
        let mut fields = ConnectionFields::new(&Connection::from_entry(0, entry), 0, &attribution);
        if entry.inode != 0 && !self.found.complete {
            fields.holders = None;
        }
        fields
    }
}
