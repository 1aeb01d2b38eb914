//! Who holds certain sockets now, and what they are: for the event about a failed bind.

use std::collections::HashSet;

use super::{
    by_socket::{BySocket, SocketRef},
    descriptor_pass,
    entry::SocketEntry,
    holders::{HolderSearch, Holders, find_holders},
};
use crate::{bpf::descriptors::DescriptorIter, budget::memory::MAX_HOLDERS, system::process::Holder};

/// What is known now of certain sockets.
#[derive(Debug, Default)]
pub struct CurrentHolders {
    /// The processes that have each of them open.
    holders: Holders,
    /// The sockets as they are now; empty without the iterator.
    entries: BySocket<SocketEntry>,
}

impl CurrentHolders {
    /// The processes that have this socket open. `None`: unknown. None was found, and not every process could be
    /// checked; or it is not certain which socket it is.
    #[must_use]
    pub fn of_socket(&self, socket: &SocketRef) -> Option<Vec<Holder>> {
        let has_none = || self.holders.has_none(socket) && self.holders.unseen.is_none();
        self.holders.of(socket).map(<[Holder]>::to_vec).or_else(|| has_none().then(Vec::new))
    }

    /// Sockets that nobody holds.
    #[cfg(test)]
    pub(crate) fn of_entries(entries: impl Iterator<Item = SocketEntry>) -> Self {
        let entries = entries.filter_map(|entry| Some((entry.socket_ref()?, entry))).collect();
        Self { holders: Holders::default(), entries }
    }

    /// The socket as it is now. `None`: unknown.
    #[must_use]
    pub fn entry(&self, socket: &SocketRef) -> Option<&SocketEntry> {
        self.entries.get(socket)
    }
}

/// Looks for the holders of these sockets: by a pass of the iterator, or without one by a search in `/proc`. A thread
/// that has the iterator has no capability for the search.
#[must_use]
pub fn find_current_holders(sockets: &HashSet<SocketRef>, iter: Option<&DescriptorIter>) -> CurrentHolders {
    let held = match iter.map(|iter| descriptor_pass::read_holders(iter, sockets)) {
        Some(Ok(held)) => held,
        Some(Err(error)) => {
            log::info!(
                "who holds the port of a failed bind is unknown: the iterator over descriptors: {error}"
            );
            return CurrentHolders::default();
        }
        None => {
            let inodes = sockets.iter().map(|socket| socket.inode).collect();
            let holders = find_holders(&inodes, HolderSearch::Complete, MAX_HOLDERS);
            return CurrentHolders { holders, ..CurrentHolders::default() };
        }
    };
    let entries = held.entries.into_iter().filter_map(|entry| Some((entry.socket_ref()?, entry)));
    CurrentHolders { holders: held.holders, entries: entries.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_holds_a_socket_only_if_every_process_was_checked() {
        let [socket, other, same_inode] = [(5, 1), (6, 1), (5, 2)]
            .map(|(inode, cookie)| SocketRef { cookie: Some(cookie), ..SocketRef::of_inode(inode) });
        assert_eq!(CurrentHolders::default().of_socket(&socket), None, "after an error");
        let holder = Holder { pid: 7, comm: None, start_ticks: None };
        for (complete, unseen, nobody) in
            [(true, None, Some(vec![])), (true, Some("open files"), None), (false, None, None)]
        {
            let by_socket = [(socket, vec![holder.clone()])].into_iter().collect();
            let holders = Holders { by_socket, complete, unseen: unseen.map(str::to_owned) };
            let now = CurrentHolders { holders, ..CurrentHolders::default() };
            let of = |socket| now.of_socket(socket);
            assert_eq!(
                (of(&socket), of(&other), of(&same_inode)),
                (Some(vec![holder.clone()]), nobody.clone(), nobody)
            );
        }
    }
}
