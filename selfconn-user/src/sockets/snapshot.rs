//! A snapshot of the socket tables of all network namespaces: the self-connections, and the connection
//! attempts in progress, and the processes that hold the self-connections. What a process holds comes from the
//! iterator over descriptors where it is attached; sock_diag lists the rest, such as TIME_WAIT, in the
//! namespaces that can be entered.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap, HashSet},
    io, panic, thread,
};

use selfconn_ebpf::Endpoint;

use super::{
    by_socket::{BySocket, SocketRef, unique_inodes},
    descriptor_pass,
    devices::DeviceNames,
    entry::{Coverage, SocketEntry, in_netns},
    existing::{self, ExistingNamespaces},
    held::HeldSockets,
    holders::{HolderSearch, Holders, find_holders},
    limit::{LeftOut, SnapshotLimit},
    netns::{self, Namespace, NetnsId, VisitOptions},
    netns_search::SearchLimits,
    netns_selection::NamespaceSelection,
    netns_turns::VisitTurns,
    table::Tables,
};
use crate::{
    bpf::{descriptors::DescriptorIter, namespaces::NamespaceIter},
    budget::memory::MAX_HOLDERS,
    system::{clock, process::Holder},
};

/// The options of a snapshot.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotOptions<'a> {
    /// Also list connection attempts in progress; this needs another walk through each table.
    pub attempts: bool,
    /// Read `/proc/net/tcp` even if sock_diag is available.
    pub procfs_only: bool,
    /// Also search for the holders. The walk over the descriptors of all processes is expensive, so it is
    /// left out if there is no self-connection.
    pub holders: Option<HolderSearch>,
    /// Maximum number of sockets that are kept, which users share. `None`: no limit.
    pub max_sockets: Option<usize>,
    /// The iterator over descriptors. With it, the holders are always known and cost no search.
    pub descriptors: Option<&'a DescriptorIter>,
    /// Opens that iterator, if there is none and a namespace exists to which nothing else leads: for a command, because
    /// to load it takes as long as to read the tables of most hosts.
    pub open_descriptors: Option<fn() -> Result<DescriptorIter, String>>,
    /// The iterator over network namespaces. With it, it is known which exist.
    pub namespaces: Option<&'a NamespaceIter>,
    /// The namespaces to read.
    pub selection: Option<&'a NamespaceSelection>,
    /// The order and the time in which the namespaces are visited. `None`: this is a command, which visits all, and whose
    /// search goes further.
    pub turns: Option<VisitTurns<'a>>,
}

/// The self-connections found in the socket tables.
#[derive(Debug, Default)]
pub struct SocketSnapshot {
    /// All self-connections, each once, TIME_WAIT included.
    pub entries: Vec<SocketEntry>,
    /// Connection attempts in progress from an address to itself: their destinations, each once; empty unless
    /// requested.
    pub attempts: Vec<Endpoint>,
    /// The processes that hold the self-connections; empty unless requested.
    pub holders: Holders,
    /// The network namespaces whose tables were read: inodes and cookies. A cookie of 0 is unknown. A self-connection
    /// that a process holds may be listed in another one, but only here a missing one has ended.
    pub namespaces: HashMap<u32, u64>,
    /// The network namespaces that exist. `None`: they could not be listed.
    pub existing: Option<ExistingNamespaces>,
    /// The sockets beyond the limit.
    pub left_out: LeftOut,
    /// The inodes of the namespaces that exist, and that nothing leads to.
    pub unfound: HashSet<u32>,
    /// The inodes of the namespaces for which there was no time. What has no descriptor there is unknown.
    pub unvisited: BTreeSet<u32>,
    /// What could not be read, and the reason: one line of text for people each.
    pub unseen: Vec<String>,
    /// The reason why `/proc/net/tcp` was read instead of sock_diag; cookies and interfaces are unknown in
    /// this case.
    pub without_sock_diag: Option<String>,
    /// The time when reading began, in nanoseconds of `CLOCK_BOOTTIME`. Connections made later may be
    /// missing.
    pub began_ns: u64,
    /// The time when reading ended. Connections that ended earlier may be listed.
    pub ended_ns: u64,
}

impl SocketSnapshot {
    /// True if the snapshot includes the network namespace of this endpoint.
    #[must_use]
    pub fn covers(&self, endpoint: &Endpoint) -> bool {
        self.visited(endpoint).is_some_and(|id| id.may_be(NetnsId::from(endpoint)))
    }

    /// The namespace with the inode of this endpoint, if its table was read.
    fn visited(&self, endpoint: &Endpoint) -> Option<NetnsId> {
        let (&inode, &cookie) = self.namespaces.get_key_value(&endpoint.netns)?;
        Some(NetnsId { inode, cookie })
    }

    /// True if the network namespace of this endpoint has ended, because it is not in the kernel's list, or because
    /// its inode is that of another namespace. Without the list, a namespace that was only not found may still exist.
    /// The endpoint must be from before the snapshot.
    #[must_use]
    pub fn proves_end_of_netns(&self, endpoint: &Endpoint) -> bool {
        self.existing.as_ref().is_some_and(|existing| existing.prove_end_of_netns(endpoint))
            || self.visited(endpoint).is_some_and(|id| !id.may_be(NetnsId::from(endpoint)))
    }

    /// True if this endpoint is in a namespace that was asked for.
    fn selects(&self, selection: Option<&NamespaceSelection>, endpoint: &Endpoint) -> bool {
        match selection {
            None | Some(NamespaceSelection::All) => true,
            Some(NamespaceSelection::Inode(inode)) => endpoint.netns == *inode,
            // Only that one was visited.
            Some(NamespaceSelection::Current | NamespaceSelection::At(_)) => self.covers(endpoint),
        }
    }

    /// What the snapshot says about a connection at this endpoint that it does not list.
    #[must_use]
    pub fn coverage(&self, endpoint: &Endpoint) -> Coverage {
        if self.proves_end_of_netns(endpoint) {
            Coverage::NetnsEnded
        } else if self.covers(endpoint) {
            Coverage::Read
        } else {
            Coverage::Unknown
        }
    }

    /// Adds what the iterator over descriptors has found. It knows more of a held socket than the socket table,
    /// which procfs may have read.
    fn add_held(&mut self, held: HeldSockets, attempts: bool) {
        let sockets = held.entries.iter().filter_map(SocketEntry::socket_ref);
        let listed: BySocket<()> = sockets.map(|socket| (socket, ())).collect();
        self.entries.retain(|entry| entry.socket_ref().is_none_or(|socket| !listed.may_have(&socket)));
        self.entries.extend(held.entries);
        self.holders = held.holders;
        if attempts {
            self.attempts.extend(held.attempts);
            self.attempts.sort_unstable();
            self.attempts.dedup();
        }
    }

    /// The processes that have this socket open. `None`: there is no such process, none was found, or it is not certain
    /// which socket it is.
    #[must_use]
    pub fn holders_of(&self, socket: Option<SocketRef>) -> Option<&[Holder]> {
        self.holders.of(&socket?)
    }
}

/// Reads the socket tables of all network namespaces that can be found and entered. It runs on a separate
/// thread and returns when the thread has ended, so the namespace of the caller does not change.
/// `netns_hints` are thread ids as in this process's `/proc`; they help to find namespaces that only non-main
/// threads are in.
///
/// # Errors
/// If no thread can be started, or if the only requested namespace cannot be read.
pub fn snapshot(options: SnapshotOptions<'_>, netns_hints: &[u32]) -> io::Result<SocketSnapshot> {
    let began_ns = clock::boot_ns();
    let mut limit = SnapshotLimit::new(options.max_sockets);
    let (held, refusal) = match options.descriptors.map(|iter| descriptor_pass::read(iter, &mut limit)) {
        Some(Ok(held)) => (Some(held), None),
        Some(Err(error)) => {
            // What it had found by then is read by other ways, but for the holders: that would take longer.
            limit = SnapshotLimit::new(options.max_sockets);
            (None, Some(format!("the iterator over descriptors: {error}")))
        }
        None => (None, None),
    };
    limit.begin_next_pass();
    let has_no_pass = refusal.is_some();
    let (existing, existing_refusal) = match options.namespaces.map(existing::list) {
        Some(Ok(existing)) => (Some(existing), None),
        Some(Err(error)) => (None, Some(existing::refusal(&error))),
        None => (None, None),
    };
    let holders = held.iter().flat_map(|held| held.tasks.iter());
    let netns_hints: &[u32] = &netns_hints.iter().chain(holders).copied().collect::<Vec<_>>();
    let existing_namespaces = existing.as_ref().map(ExistingNamespaces::inodes);
    let (mut snapshot, devices, held) = thread::scope(|scope| -> io::Result<_> {
        let thread = thread::Builder::new().name("namespaces".to_owned());
        let limit = &mut limit;
        let thread = thread.spawn_scoped(scope, move || {
            snapshot_all(options, existing_namespaces, netns_hints, held, limit)
        })?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })?;
    snapshot.began_ns = began_ns;
    snapshot.existing = existing;
    snapshot.unseen.extend(refusal.into_iter().chain(existing_refusal));
    snapshot.left_out = limit.left_out;
    if let Some(mut held) = held {
        held.select(|endpoint| snapshot.selects(options.selection, endpoint));
        snapshot.unseen.extend(held.holders.unseen.clone());
        snapshot.add_held(held, options.attempts);
    } else if let Some(search) = options.holders.filter(|_| !has_no_pass) {
        let inodes = unique_inodes(snapshot.entries.iter().filter_map(SocketEntry::socket_ref)).collect();
        snapshot.holders =
            find_holders(&inodes, search, options.max_sockets.map_or(usize::MAX, |_| MAX_HOLDERS));
        for entry in &mut snapshot.entries {
            entry.is_held = entry.socket_ref().is_some_and(|socket| snapshot.holders.of(&socket).is_some());
        }
    }
    for entry in &mut snapshot.entries {
        entry.device = devices.get(&entry.endpoint);
    }
    Ok(snapshot)
}

/// The endpoints of these sockets, by the inode of their namespace.
fn by_netns(entries: &[SocketEntry]) -> HashMap<u32, Vec<Endpoint>> {
    let mut by_netns: HashMap<u32, Vec<Endpoint>> = HashMap::new();
    for SocketEntry { endpoint, .. } in entries {
        by_netns.entry(endpoint.netns).or_default().push(*endpoint);
    }
    by_netns
}

/// Must be called on a thread that ends afterwards, because the thread stays in the last namespace.
fn snapshot_all(
    options: SnapshotOptions<'_>,
    existing: Option<&BTreeSet<u32>>,
    netns_hints: &[u32],
    held: Option<HeldSockets>,
    limit: &mut SnapshotLimit,
) -> io::Result<(SocketSnapshot, DeviceNames, Option<HeldSockets>)> {
    let held = RefCell::new(held);
    let descriptors = || {
        let is_read = held.borrow().is_some();
        if let (false, Some(open)) = (is_read, options.open_descriptors) {
            let read = |iter| descriptor_pass::read(&iter, &mut SnapshotLimit::new(None)).ok();
            // Of a part only, the holders would be searched for in /proc for nothing.
            *held.borrow_mut() = open().ok().and_then(read).filter(|held| held.holders.complete);
        }
        held.borrow().as_ref().and_then(|held| held.namespaces.clone())
    };
    let mut held_by_netns: Option<HashMap<u32, Vec<Endpoint>>> = None;
    let (mut snapshot, mut devices) = (SocketSnapshot::default(), DeviceNames::default());
    let mut tables = Tables::new(options.procfs_only);
    let search = if options.turns.is_some() { SearchLimits::DAEMON } else { SearchLimits::COMMAND };
    // Without the list the daemon does not know for what to search.
    let search = (options.turns.is_none() || existing.is_some()).then_some(search);
    let visit = VisitOptions {
        netns_hints,
        only: None,
        existing,
        turns: options.turns,
        search,
        descriptors: Some(&descriptors),
    };
    let visited = netns::visit_selected(options.selection, visit, |&Namespace { id, .. }| {
        let is_held = |entry: &SocketEntry| {
            let endpoint = Some(in_netns(entry.endpoint, id));
            let socket = entry.socket_ref().map(|socket| SocketRef { endpoint, ..socket });
            let held = held.borrow();
            socket.zip(held.as_ref()).is_some_and(|(socket, held)| held.holders.by_socket.may_have(&socket))
        };
        limit.begin_netns(id.inode);
        tables.read(options.attempts, limit, &is_held)?;
        let mut cookies = HashSet::new();
        let listed_before = snapshot.entries.len();
        for row in tables.rows.drain(..) {
            if row.is_attempt() && options.attempts {
                snapshot.attempts.push(in_netns(row.destination, id));
            }
            // If a hash chain changes while it is read, a socket can appear twice.
            if row.is_self_connection() && row.entry.cookie.is_none_or(|cookie| cookies.insert(cookie)) {
                snapshot.entries.push(row.into_entry(id));
            }
        }
        let listed = snapshot.entries[listed_before..].iter().map(|entry| &entry.endpoint);
        let held = held.borrow();
        let held_here = held
            .as_ref()
            .and_then(|held| held_by_netns.get_or_insert_with(|| by_netns(&held.entries)).remove(&id.inode));
        devices.look_up(listed.chain(held_here.iter().flatten()));
        Ok(())
    })?;
    snapshot.namespaces = visited.namespaces;
    snapshot.unfound = visited.unfound.into_iter().collect();
    snapshot.unvisited = visited.unvisited;
    snapshot.unseen = visited.unseen;
    snapshot.without_sock_diag = tables.without_diag;
    snapshot.attempts.sort_unstable();
    snapshot.attempts.dedup();
    snapshot.ended_ns = clock::boot_ns();
    Ok((snapshot, devices, held.into_inner()))
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::state;

    use super::*;
    use crate::detect::samples;

    #[test]
    fn a_held_socket_is_listed_once_and_one_without_a_descriptor_stays() {
        let entry = |port, state, inode| {
            let endpoint = Endpoint::new(1, [127, 0, 0, 1].into(), port, false);
            SocketEntry { inode, ..samples::entry(endpoint, state) }
        };
        let mut snapshot = SocketSnapshot {
            entries: vec![
                SocketEntry { cookie: None, ..entry(4, state::ESTABLISHED, 40) },
                // Its process holds another socket there by now.
                entry(5, state::ESTABLISHED, 50),
                entry(6, state::TIME_WAIT, 0),
                entry(7, state::ESTABLISHED, 70),
            ],
            attempts: vec![samples::endpoint("::1", 9)],
            ..SocketSnapshot::default()
        };
        let elsewhere = Endpoint { netns: 2, ..samples::endpoint("::1", 8) };
        let held = HeldSockets {
            entries: vec![
                entry(4, state::CLOSE_WAIT, 40),
                entry(5, state::ESTABLISHED, 51),
                SocketEntry { inode: 80, ..samples::entry(elsewhere, state::ESTABLISHED) },
            ],
            attempts: vec![samples::endpoint("::1", 9), elsewhere],
            ..HeldSockets::default()
        };
        snapshot.add_held(held, true);
        let listed: HashSet<_> =
            snapshot.entries.iter().map(|entry| (entry.endpoint.port, entry.inode, entry.state)).collect();
        let [established, close_wait, time_wait] = [state::ESTABLISHED, state::CLOSE_WAIT, state::TIME_WAIT];
        assert_eq!(snapshot.entries.len(), 6);
        assert_eq!(
            listed,
            HashSet::from([
                (4, 40, close_wait),
                (5, 50, established),
                (5, 51, established),
                (6, 0, time_wait),
                (7, 70, established),
                (8, 80, established),
            ])
        );
        assert_eq!(snapshot.attempts.len(), 2);
        assert!(!snapshot.covers(&elsewhere), "only the socket table shows that a socket is gone");
    }

    #[test]
    fn a_socket_of_the_table_that_has_the_inode_of_a_held_one_stays_unless_it_is_that_one() {
        let at = |port| Endpoint::new(1, [127, 0, 0, 1].into(), port, false);
        let entry =
            |port, cookie| SocketEntry { cookie, inode: 40, ..samples::entry(at(port), state::ESTABLISHED) };
        for (held, listed, stays) in [
            (entry(4, Some(7)), entry(4, Some(7)), false),
            (entry(4, Some(7)), entry(4, Some(8)), true),
            (entry(4, Some(7)), entry(5, Some(8)), true),
            (entry(4, Some(7)), entry(4, None), false),
            (entry(4, Some(7)), entry(5, None), true),
            (entry(4, None), entry(4, Some(8)), false),
            (entry(4, None), entry(5, Some(8)), true),
        ] {
            let mut snapshot = SocketSnapshot { entries: vec![listed.clone()], ..SocketSnapshot::default() };
            let entries = vec![held.clone()];
            snapshot.add_held(HeldSockets { entries, ..HeldSockets::default() }, false);
            assert_eq!(snapshot.entries.len() == 2, stays, "{held:?} {listed:?}");
        }
    }

    #[test]
    fn a_snapshot_does_not_change_the_namespace_of_the_caller() {
        let current_netns = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = current_netns();
        let snapshot = snapshot(SnapshotOptions::default(), &[]).unwrap();
        assert_eq!(current_netns(), before);
        assert!(!snapshot.namespaces.is_empty(), "{snapshot:?}");
        assert!(snapshot.began_ns < snapshot.ended_ns);
    }
}
