//! Reads the kernel's socket tables: the self-connections that exist now in every network namespace, and
//! their holders.
//!
//! This module does not emit events; the caller compares snapshots. The kernel does not dump a table
//! atomically: a socket that is hashed or unhashed while its bucket is read may be missing, so one absence
//! proves nothing.
//!
//! Some namespaces are not found: a namespace that only non-main threads are in, unless the caller passes one
//! of these threads as a hint (reading `/proc/PID/task/*/ns/net` for every thread of the host is too
//! expensive), a namespace that is kept alive only by an open descriptor, and a namespace that is mounted
//! only in another mount namespace.

use std::{collections::HashSet, io, net::IpAddr, panic, thread, time::Duration};

use selfconn_ebpf::state;

use crate::system::clock;

mod destroy;
mod holders;
mod listeners;
mod netns;
mod on_port;
mod procfs;
mod sock_diag;

pub use destroy::Target;
pub use destroy::can_destroy;
pub use destroy::can_enter;
pub use destroy::destroy;
pub use destroy::destroy_all;
pub use destroy::look_up;
pub use holders::HolderSearch;
pub use holders::Holders;
pub use holders::find_holders;
pub use listeners::Listener;
pub use listeners::ListenerInspection;
pub use listeners::NamespaceSelection;
pub use listeners::inspect;
pub use netns::Namespace;
pub use netns::run_in_namespace;
pub use on_port::PortSocket;
pub use on_port::on_port;
pub use sock_diag::exact::Cookie;

/// The hint for processes that this process may not inspect.
const NEEDS_PTRACE: &str = "looking into them needs CAP_SYS_PTRACE, which root has";

/// The options of a snapshot.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotOptions {
    /// Also list connection attempts in progress; this needs another walk through each table.
    pub attempts: bool,
    /// Read `/proc/net/tcp` even if sock_diag is available.
    pub procfs_only: bool,
}

/// The self-connections found in the socket tables.
#[derive(Debug, Default)]
pub struct SocketSnapshot {
    /// All self-connections, each once, TIME_WAIT included.
    pub entries: Vec<SocketEntry>,
    /// Connection attempts in progress from an address to itself; empty unless requested.
    pub attempts: Vec<ConnectAttempt>,
    /// The inodes of the network namespaces that were read.
    pub namespaces: HashSet<u32>,
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

/// A self-connection in a socket table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketEntry {
    /// The source and destination address. It is IPv4 also if the socket is IPv6 and the address is
    /// v4-mapped.
    pub addr: IpAddr,
    /// The source and destination port.
    pub port: u16,
    /// True if the socket is IPv6.
    pub is_ipv6: bool,
    /// The TCP state: one of [`state`].
    pub state: u8,
    /// The inode of the network namespace.
    pub netns: u32,
    /// The interface of a link-local address; procfs does not provide it.
    pub ifindex: Option<u32>,
    /// The socket cookie; procfs does not provide it.
    pub cookie: Option<u64>,
    /// The inode of the socket, used to find its holders. 0: no process holds the socket, as in TIME_WAIT.
    pub inode: u64,
    /// The owner of the socket. `None` if it has no inode, because the kernel reports 0 for such a socket.
    pub uid: Option<u32>,
    /// The time for which TIME_WAIT still holds the port. `None`: the socket is not in TIME_WAIT.
    pub time_wait_left: Option<Duration>,
}

/// A connection attempt in progress: a socket in SYN_SENT whose two addresses are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectAttempt {
    /// The inode of the network namespace.
    pub netns: u32,
    /// The source and destination address, as in [`SocketEntry`].
    pub addr: IpAddr,
    /// The destination port.
    pub dport: u16,
    /// True if the socket is IPv6.
    pub is_ipv6: bool,
}

/// Reads the socket tables of all network namespaces that can be found and entered. It runs on a separate
/// thread and returns when the thread has ended, so the namespace of the caller does not change.
/// `netns_hints` are thread ids as in this process's `/proc`; they help to find namespaces that only non-main
/// threads are in.
///
/// # Errors
/// If no thread can be started.
pub fn snapshot(options: SnapshotOptions, netns_hints: &[u32]) -> io::Result<SocketSnapshot> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespaces".to_owned());
        let thread = thread.spawn_scoped(scope, move || snapshot_all(options, netns_hints))?;
        Ok(thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause)))
    })
}

/// Runs every text parser of this module on arbitrary bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let _ = netns::mount_points(bytes);
    let _ = std::str::from_utf8(bytes).map(|line| procfs::parse(line, |_, _, _| true));
}

/// Must be called on a thread that ends afterwards, because the thread stays in the last namespace.
fn snapshot_all(options: SnapshotOptions, netns_hints: &[u32]) -> SocketSnapshot {
    let mut snapshot = SocketSnapshot { began_ns: clock::boot_ns(), ..SocketSnapshot::default() };
    let mut tables = Tables::new(options.procfs_only);
    let visited = netns::visit(netns_hints, |&Namespace { inode: netns, .. }| {
        tables.read(options.attempts)?;
        let mut cookies = HashSet::new();
        for row in &tables.rows {
            if row.is_attempt() && options.attempts {
                snapshot.attempts.push(row.attempt(netns));
            }
            // If a hash chain changes while it is read, a socket can appear twice.
            if row.is_self_connection() && row.cookie.is_none_or(|cookie| cookies.insert(cookie)) {
                snapshot.entries.push(row.entry(netns));
            }
        }
        Ok(())
    });
    snapshot.namespaces = visited.namespaces;
    snapshot.unseen = visited.unseen;
    snapshot.without_sock_diag = tables.without_diag;
    snapshot
        .attempts
        .sort_unstable_by_key(|attempt| (attempt.netns, attempt.addr, attempt.dport, attempt.is_ipv6));
    snapshot.attempts.dedup();
    snapshot.ended_ns = clock::boot_ns();
    snapshot
}

/// Reads the socket tables of the network namespace that the calling thread is in.
struct Tables {
    /// `None`: not requested, or not available on this kernel. It is not tried again then, because the kernel
    /// would run modprobe each time.
    diag: Option<sock_diag::DiagReader>,
    without_diag: Option<String>,
    rows: Vec<DumpedSocket>,
}

impl Tables {
    fn new(procfs_only: bool) -> Self {
        let diag = (!procfs_only).then(sock_diag::DiagReader::new);
        Self { diag, without_diag: None, rows: Vec::new() }
    }

    /// Fills `rows` with the self-connections and, if requested, the connection attempts in progress.
    fn read(&mut self, attempts: bool) -> io::Result<()> {
        self.fill(|diag, rows| diag.read(attempts, rows), procfs::read)
    }

    /// Fills `rows` with the listeners.
    fn read_listeners(&mut self) -> io::Result<()> {
        self.fill(sock_diag::DiagReader::read_listeners, procfs::read_listeners)
    }

    /// Fills `rows` through sock_diag. If that fails for any reason, through procfs.
    fn fill(
        &mut self,
        by_diag: impl Fn(&mut sock_diag::DiagReader, &mut Vec<DumpedSocket>) -> io::Result<()>,
        by_procfs: impl Fn(&mut Vec<DumpedSocket>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.rows.clear();
        if let Some(diag) = &mut self.diag {
            match by_diag(diag, &mut self.rows) {
                Ok(()) => return Ok(()),
                Err(error) => self.without_diag = Some(error.to_string()),
            }
            self.diag = None;
            self.rows.clear();
        }
        by_procfs(&mut self.rows)
    }
}

/// The listed states as a mask: all states in which a socket is connected or connecting. Because LISTEN is
/// not included, the kernel does not walk the table of listeners.
const STATES: u32 = {
    let all = (1 << (state::CLOSING + 1)) - 1;
    all & !(1 | 1 << state::CLOSE | 1 << state::LISTEN)
};

/// A socket as dumped by sock_diag or procfs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DumpedSocket {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    state: u8,
    ifindex: u32,
    cookie: Option<u64>,
    inode: u64,
    uid: u32,
    time_wait_left: Option<Duration>,
}

impl DumpedSocket {
    fn is_self_connection(&self) -> bool {
        self.source == self.destination && self.source.1 != 0 && STATES & 1 << self.state != 0
    }

    fn is_attempt(&self) -> bool {
        self.source.0 == self.destination.0 && self.state == state::SYN_SENT
    }

    fn entry(&self, netns: u32) -> SocketEntry {
        let (addr, port) = self.source;
        SocketEntry {
            addr: addr.to_canonical(),
            port,
            is_ipv6: addr.is_ipv6(),
            state: self.state,
            netns,
            ifindex: self.link_local_ifindex(),
            cookie: self.cookie,
            inode: self.inode,
            uid: (self.inode != 0).then_some(self.uid),
            time_wait_left: self.time_wait_left,
        }
    }

    fn link_local_ifindex(&self) -> Option<u32> {
        let is_link_local = matches!(self.source.0, IpAddr::V6(addr) if addr.is_unicast_link_local());
        (self.ifindex != 0 && is_link_local).then_some(self.ifindex)
    }

    fn attempt(&self, netns: u32) -> ConnectAttempt {
        let (addr, dport) = self.destination;
        ConnectAttempt { netns, addr: addr.to_canonical(), dport, is_ipv6: addr.is_ipv6() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn row(source: &str, destination: &str, state: u8) -> DumpedSocket {
        let end = |text: &str| {
            let end: std::net::SocketAddr = text.parse().unwrap();
            (end.ip(), end.port())
        };
        DumpedSocket {
            source: end(source),
            destination: end(destination),
            state,
            ifindex: 3,
            cookie: Some(9),
            inode: 0,
            uid: 0,
            time_wait_left: None,
        }
    }

    #[test]
    fn a_self_connection_has_equal_source_and_destination() {
        for (source, destination, state, is_self_connection, is_attempt) in [
            ("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED, true, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::TIME_WAIT, true, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::SYN_SENT, true, true),
            ("[::1]:4", "[::1]:4", state::CLOSING, true, false),
            ("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::SYN_RECV, true, false),
            ("127.0.0.1:5", "127.0.0.1:4", state::SYN_SENT, false, true),
            ("127.0.0.1:5", "127.0.0.1:4", state::ESTABLISHED, false, false),
            ("127.0.0.1:4", "127.0.0.2:4", state::SYN_SENT, false, false),
            ("0.0.0.0:0", "0.0.0.0:0", state::LISTEN, false, false),
            ("0.0.0.0:0", "0.0.0.0:0", state::ESTABLISHED, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::CLOSE, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::LISTEN, false, false),
        ] {
            let row = row(source, destination, state);
            let case = format!("{source} {destination} {}", state::name(state));
            assert_eq!(
                (row.is_self_connection(), row.is_attempt()),
                (is_self_connection, is_attempt),
                "{case}"
            );
        }
    }

    #[test]
    fn an_interface_needs_a_link_local_address_and_a_uid_needs_an_inode() {
        let local = row("[fe80::1]:4", "[fe80::1]:4", state::ESTABLISHED).entry(1);
        assert_eq!((local.ifindex, local.uid), (Some(3), None));
        let held = DumpedSocket {
            inode: 5,
            ..row("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::ESTABLISHED)
        };
        let held = held.entry(1);
        assert_eq!((held.ifindex, held.uid, held.is_ipv6), (None, Some(0), true));
        assert_eq!(held.addr, IpAddr::from([127, 0, 0, 1]));
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
