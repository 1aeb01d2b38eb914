//! What a pass of the iterator over descriptors finds: the self-connections that processes hold, with their holders, of
//! every network namespace, also of one that only a socket, a descriptor or a thread leads to. What has no descriptor is
//! not among them: TIME_WAIT, a socket whose process has closed it, a descriptor in flight through a unix socket, a file
//! that only io_uring has.

use std::collections::{HashMap, HashSet, hash_map};

use selfconn_ebpf::{COMM_LEN, Endpoint, SocketDescriptor, descriptor_kind, state};

use super::{
    by_socket::SocketRef, entry::SocketEntry, holders::Holders, limit::SnapshotLimit,
    netns_search::NamespaceDescriptors,
};
use crate::{
    budget::memory::{self, MAX_HOLDERS},
    system::process::{self, Holder},
};

/// Maximum number of tasks that are kept as hints.
const MAX_TASKS: usize = 4_096;

/// Maximum number of namespaces of which a descriptor is kept.
const MAX_NAMESPACES: usize = 16_384;

// At the end of a pass a socket is in the table of the pass, which is three quarters full with as many as there may be,
// and in two lists that have grown. A holder has a name. An allocation has up to 16 bytes more.
const _: () = {
    let collected = (size_of::<((u64, u64), HeldSocket)>() + 1) * 4 / 3;
    let listed = (size_of::<SocketEntry>() + size_of::<(SocketRef, Vec<Holder>)>()) * 4 / 3;
    let holder = size_of::<Holder>() + COMM_LEN + 16;
    assert!(collected + listed + holder + 16 <= memory::SNAPSHOT_SOCKET_BYTES);
    assert!(size_of::<HolderRecord>() + holder <= memory::MORE_HOLDER_BYTES);
};

/// The result of a pass.
#[derive(Debug, Default)]
pub(super) struct HeldSockets {
    /// Self-connections, each once.
    pub(super) entries: Vec<SocketEntry>,
    /// The destinations of the connection attempts from an address to itself.
    pub(super) attempts: Vec<Endpoint>,
    pub(super) holders: Holders,
    /// The tasks that hold any of them. One of them may be in the namespace of its socket.
    pub(super) tasks: HashSet<u32>,
    /// A descriptor of each namespace that has one. `None`: there are too many, or their threads have other ids in
    /// our `/proc`.
    pub(super) namespaces: Option<NamespaceDescriptors>,
}

impl HeldSockets {
    /// Removes what is at an endpoint for which `is_selected` is false.
    pub(super) fn select(&mut self, is_selected: impl Fn(&Endpoint) -> bool) {
        self.entries.retain(|entry| is_selected(&entry.endpoint));
        self.attempts.retain(is_selected);
    }
}

/// The sockets so far, by kernel address and cookie: an address alone may belong to another socket when the
/// walk comes to it again.
pub(super) struct Collector<'a> {
    limit: &'a mut SnapshotLimit,
    sockets: HashMap<(u64, u64), HeldSocket>,
    tasks: HashSet<u32>,
    namespaces: Option<NamespaceDescriptors>,
}

struct HeldSocket {
    record: SocketDescriptor,
    /// Each process once. Nearly every socket has one.
    holders: Vec<HolderRecord>,
}

struct HolderRecord {
    /// When the process started.
    start_ns: u64,
    pid: u32,
    comm: [u8; COMM_LEN],
}

impl<'a> Collector<'a> {
    pub(super) fn new(limit: &'a mut SnapshotLimit) -> Self {
        let namespaces = Some(NamespaceDescriptors::new());
        Self { limit, sockets: HashMap::new(), tasks: HashSet::new(), namespaces }
    }

    /// Adds the record of a socket if it is wanted, and that of a namespace.
    pub(super) fn add_any(
        &mut self,
        record: &SocketDescriptor,
        mut is_wanted: impl FnMut(&SocketRef) -> bool,
    ) {
        match record.kind {
            descriptor_kind::NAMESPACE => self.add_namespace(record),
            _ if is_wanted(&socket_ref(record)) => self.add(record),
            _ => {}
        }
    }

    fn add_namespace(&mut self, record: &SocketDescriptor) {
        let (Some(namespaces), Ok(inode)) = (&mut self.namespaces, u32::try_from(record.inode)) else {
            return;
        };
        namespaces.entry(inode).or_insert((record.tid, record.fd));
        if namespaces.len() > MAX_NAMESPACES {
            self.namespaces = None;
        }
    }

    fn add(&mut self, record: &SocketDescriptor) {
        self.learn_cookie(record);
        let held = match self.sockets.entry((record.sock, record.cookie)) {
            hash_map::Entry::Occupied(held) => held.into_mut(),
            hash_map::Entry::Vacant(new) => {
                // An attempt becomes an entry, too, if its ports are equal.
                let is_attempt = record.endpoint.port != record.destination_port;
                if !self.limit.take(Some(record.uid), is_attempt, &record.endpoint) {
                    return;
                }
                new.insert(HeldSocket { record: *record, holders: Vec::with_capacity(1) })
            }
        };
        let &SocketDescriptor { start_ns, pid, comm, .. } = record;
        if self.tasks.len() < MAX_TASKS {
            self.tasks.insert(record.tid);
        }
        if held.holders.len() < MAX_HOLDERS
            && held.holders.iter().all(|known| known.pid != pid)
            && (held.holders.is_empty() || self.limit.take_holder(record.uid))
        {
            held.holders.reserve_exact(1);
            held.holders.push(HolderRecord { start_ns, pid, comm });
        }
    }

    /// Somebody may have asked for the cookie of a socket since its first record.
    fn learn_cookie(&mut self, record: &SocketDescriptor) {
        let is_same =
            |held: &HeldSocket| (held.record.inode, held.record.endpoint) == (record.inode, record.endpoint);
        if record.cookie != 0
            && self.sockets.get(&(record.sock, 0)).is_some_and(is_same)
            && let Some(mut held) = self.sockets.remove(&(record.sock, 0))
        {
            held.record.cookie = record.cookie;
            self.sockets.insert((record.sock, record.cookie), held);
        }
    }

    pub(super) fn finish(self) -> HeldSockets {
        let mut held =
            HeldSockets { tasks: self.tasks, namespaces: self.namespaces, ..HeldSockets::default() };
        let mut holders_of = Vec::new();
        for HeldSocket { record, mut holders } in self.sockets.into_values() {
            if record.state == state::SYN_SENT {
                held.attempts.push(Endpoint { port: record.destination_port, ..record.endpoint });
            }
            if record.endpoint.port == record.destination_port {
                held.entries.push(entry(&record));
                // The process that started first is probably the one that the others have it from.
                holders.sort_unstable_by_key(|holder| (holder.start_ns, holder.pid));
                let holder = |HolderRecord { start_ns, pid, comm }| {
                    let start_ticks = Some(process::start_ticks_of(start_ns));
                    Holder { pid, comm: Some(text(&comm)), start_ticks }
                };
                holders_of.push((socket_ref(&record), holders.into_iter().map(holder).collect()));
            }
        }
        held.holders.by_socket = holders_of.into_iter().collect();
        held
    }
}

fn socket_ref(record: &SocketDescriptor) -> SocketRef {
    let &SocketDescriptor { cookie, inode, endpoint, .. } = record;
    SocketRef { cookie: (cookie != 0).then_some(cookie), inode, endpoint: Some(endpoint) }
}

/// The entry of a self-connection.
fn entry(record: &SocketDescriptor) -> SocketEntry {
    let SocketRef { cookie, inode, .. } = socket_ref(record);
    SocketEntry {
        endpoint: record.endpoint,
        state: record.state,
        cookie,
        sock: Some(record.sock),
        inode,
        uid: Some(record.uid),
        time_wait_left: None,
        options: record.options,
        connect_entry: None,
        is_held: true,
        device: None,
    }
}

/// A NUL-padded name.
fn text(name: &[u8]) -> String {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::budget::memory::{MAX_MORE_HOLDERS, MAX_SNAPSHOT_SOCKETS};

    fn record(sock: u64, pid: u32, fd: u32) -> SocketDescriptor {
        let mut record = SocketDescriptor {
            pid,
            tid: pid,
            fd,
            uid: 1_000,
            start_ns: u64::from(1_000 - pid) * 1_000_000_000,
            sock,
            cookie: sock + 1,
            inode: sock + 2,
            endpoint: Endpoint::new(5, [127, 0, 0, 1].into(), 4, false),
            destination_port: 4,
            state: state::ESTABLISHED,
            ..SocketDescriptor::new_zeroed()
        };
        record.comm[..4].copy_from_slice(b"idle");
        record
    }

    fn collect(records: &[SocketDescriptor]) -> HeldSockets {
        collect_within(&mut SnapshotLimit::new(None), records)
    }

    fn collect_within(limit: &mut SnapshotLimit, records: &[SocketDescriptor]) -> HeldSockets {
        let mut collector = Collector::new(limit);
        records.iter().for_each(|record| collector.add(record));
        collector.finish()
    }

    #[test]
    fn a_socket_is_one_entry_and_a_process_one_holder_however_many_descriptors_and_threads_there_are() {
        let thread = SocketDescriptor { tid: 71, ..record(3, 7, 9) };
        let held = collect(&[record(3, 7, 9), record(3, 7, 10), thread, record(3, 8, 9), record(30, 8, 1)]);
        assert_eq!(held.entries.len(), 2);
        let entry = held.entries.iter().find(|entry| entry.inode == 5).unwrap();
        assert_eq!(entry.endpoint, Endpoint::new(5, [127, 0, 0, 1].into(), 4, false));
        assert_eq!((entry.cookie, entry.uid), (Some(4), Some(1_000)));
        let holders = |inode| {
            let holders = held.holders.of(&SocketRef::of_inode(inode)).unwrap();
            holders.iter().map(|holder| (holder.pid, holder.comm.as_deref().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(holders(5), [(8, "idle"), (7, "idle")], "8 started first");
        assert_eq!(holders(32), [(8, "idle")]);
        let ticks = process::start_ticks_of(record(3, 8, 9).start_ns);
        assert_eq!(held.holders.of(&SocketRef::of_inode(32)).unwrap()[0].start_ticks, Some(ticks));
        assert!(held.attempts.is_empty());
        assert_eq!(held.tasks, [7, 8, 71].into());
    }

    #[test]
    fn sockets_in_many_processes_take_the_second_holders_of_their_users_sockets_only() {
        let of = |uid, sock, pid| SocketDescriptor { uid, ..record(sock, pid, 9) };
        let mut records = Vec::new();
        for sock in 1..=1_000 {
            records.extend((1..=20).map(|pid| of(1_000, sock, pid)));
        }
        records.extend((1..=3).map(|pid| of(0, 2_000, pid)));
        let held = collect_within(&mut SnapshotLimit::new(Some(MAX_SNAPSHOT_SOCKETS)), &records);
        let holders = |sock: u64| held.holders.of(&SocketRef::of_inode(sock + 2)).unwrap().len();
        let of_flood: usize = (1..=1_000).map(holders).sum();
        assert_eq!(of_flood, 1_000 + MAX_MORE_HOLDERS * 3 / 4);
        assert!((1..=1_000).all(|sock| (1..=MAX_HOLDERS).contains(&holders(sock))));
        assert_eq!(holders(2_000), 3, "another user's");
        let of_command = collect(&records).holders;
        let all = of_command.of(&SocketRef::of_inode(1_002)).unwrap().len();
        assert_eq!(all, MAX_HOLDERS, "a command has no such limit");
    }

    #[test]
    fn one_descriptor_of_a_namespace_is_kept_unless_there_are_too_many() {
        let namespace = |inode, fd| SocketDescriptor {
            inode,
            kind: descriptor_kind::NAMESPACE,
            ..SocketDescriptor { fd, ..record(0, 7, 9) }
        };
        let limit = &mut SnapshotLimit::new(None);
        let mut collector = Collector::new(limit);
        for (inode, fd) in [(0xf000_0001, 3), (0xf000_0001, 4), (0xffff_ffff, 5)] {
            collector.add_namespace(&namespace(inode, fd));
        }
        let known = [(0xf000_0001, (7, 3)), (0xffff_ffff, (7, 5))].into();
        assert_eq!(collector.namespaces, Some(known));
        for inode in 0..=MAX_NAMESPACES as u64 {
            collector.add_namespace(&namespace(0xf000_0000 + inode, 6));
        }
        assert_eq!(collector.finish().namespaces, None);
    }

    #[test]
    fn an_attempt_is_no_self_connection_unless_its_ports_are_equal() {
        let connecting = SocketDescriptor { state: state::SYN_SENT, ..record(3, 7, 9) };
        let other_port = Endpoint { port: 5, ..connecting.endpoint };
        let elsewhere = SocketDescriptor { endpoint: other_port, sock: 4, ..connecting };
        let held = collect(&[connecting, elsewhere]);
        assert_eq!(held.attempts.len(), 2);
        assert!(held.attempts.iter().all(|destination| destination.port == 4));
        assert_eq!(held.entries.len(), 1);
        assert_eq!(held.entries[0].endpoint.port, 4);
    }

    #[test]
    fn an_address_that_two_sockets_had_one_after_the_other_is_two_sockets() {
        let later = SocketDescriptor { cookie: 99, inode: 98, ..record(3, 8, 9) };
        let held = collect(&[record(3, 7, 9), later]);
        let of_inode = |inode| held.holders.of(&SocketRef::of_inode(inode)).is_some();
        assert_eq!((held.entries.len(), of_inode(5), of_inode(98)), (2, true, true));
    }

    #[test]
    fn two_sockets_of_one_inode_have_their_own_holders() {
        let later = SocketDescriptor {
            inode: record(3, 7, 9).inode,
            endpoint: Endpoint { port: 40_000, ..record(3, 7, 9).endpoint },
            destination_port: 40_000,
            ..record(30, 8, 9)
        };
        for cookies in [[4, 31], [0, 0], [4, 0]] {
            let [first, later] = [
                SocketDescriptor { cookie: cookies[0], ..record(3, 7, 9) },
                SocketDescriptor { cookie: cookies[1], ..later },
            ];
            let held = collect(&[first, later]);
            let pids =
                |socket: &SocketRef| Some(held.holders.of(socket)?.iter().map(|holder| holder.pid).collect());
            let of = |record| pids(&socket_ref(record));
            assert_eq!((of(&first), of(&later)), (Some(vec![7]), Some(vec![8])), "{cookies:?}");
            assert_eq!(pids(&SocketRef::of_inode(first.inode)), None, "{cookies:?}: it is not known which");
            // Nobody has a third one, and a search for one does not end with another.
            let third = SocketRef { cookie: Some(99), ..socket_ref(&first) };
            assert_eq!(pids(&third).is_none(), cookies[0] != 0);
        }
    }

    #[test]
    fn a_socket_whose_cookie_is_made_during_the_pass_is_one_socket() {
        let before = SocketDescriptor { cookie: 0, ..record(3, 7, 9) };
        let held = collect(&[before, record(3, 8, 9)]);
        assert_eq!((held.entries.len(), held.entries[0].cookie), (1, Some(4)));
        assert_eq!(held.holders.of(&socket_ref(&before)).unwrap().len(), 2);
    }
}
