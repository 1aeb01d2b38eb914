//! A snapshot of the socket tables of all network namespaces: the self-connections, and the connection
//! attempts in progress.

use std::{collections::HashSet, io, net::IpAddr, panic, thread};

use super::{
    netns::{self, Namespace},
    table::{SocketEntry, Tables},
};
use crate::system::clock;

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

#[cfg(test)]
mod tests {
    use super::*;

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
