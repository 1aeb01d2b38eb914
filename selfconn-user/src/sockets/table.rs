//! The socket table of one network namespace: its entries, and how they are read, through sock_diag or, on a
//! kernel without it, through procfs.

use std::{io, net::IpAddr, time::Duration};

use selfconn_ebpf::{Endpoint, Opener, state};

use super::{procfs, sock_diag};

/// A socket in the kernel's table: a self-connection, or a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketEntry {
    /// Source and destination; of a listener, the local end.
    pub endpoint: Endpoint,
    /// The TCP state: one of [`state`].
    pub state: u8,
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
    /// The socket's kernel address and its opener, if the probes' connect table has an entry for it. Only
    /// [`super::SocketSnapshot::add_connect_entries`] sets it.
    pub connect_entry: Option<(u64, Opener)>,
}

/// Reads the socket tables of the network namespace that the calling thread is in.
pub(super) struct Tables {
    /// `None`: not requested, or not available on this kernel. It is not tried again then, because the kernel
    /// would run modprobe each time.
    diag: Option<sock_diag::DiagReader>,
    pub(super) without_diag: Option<String>,
    pub(super) rows: Vec<DumpedSocket>,
}

impl Tables {
    pub(super) fn new(procfs_only: bool) -> Self {
        let diag = (!procfs_only).then(sock_diag::DiagReader::new);
        Self { diag, without_diag: None, rows: Vec::new() }
    }

    /// Fills `rows` with the self-connections and, if requested, the connection attempts in progress.
    pub(super) fn read(&mut self, attempts: bool) -> io::Result<()> {
        self.fill(|diag, rows| diag.read(attempts, rows), procfs::read)
    }

    /// Fills `rows` with the listeners.
    pub(super) fn read_listeners(&mut self) -> io::Result<()> {
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
pub(super) const STATES: u32 = {
    let all = (1 << (state::CLOSING + 1)) - 1;
    all & !(1 | 1 << state::CLOSE | 1 << state::LISTEN)
};

/// A socket as dumped by sock_diag or procfs. The kernel reports no network namespace here, so it is 0 in
/// both endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DumpedSocket {
    /// The source, and everything else.
    pub(super) entry: SocketEntry,
    pub(super) destination: Endpoint,
}

impl DumpedSocket {
    pub(super) fn is_self_connection(&self) -> bool {
        let SocketEntry { endpoint, state, .. } = &self.entry;
        *endpoint == self.destination && endpoint.port != 0 && STATES & 1 << state != 0
    }

    pub(super) fn is_attempt(&self) -> bool {
        self.entry.endpoint.addr == self.destination.addr && self.entry.state == state::SYN_SENT
    }

    pub(super) fn into_entry(self, netns: u32) -> SocketEntry {
        let mut entry = self.entry;
        entry.endpoint.netns = netns;
        entry
    }
}

/// An end of a dumped socket.
pub(super) fn dumped_endpoint(ip: IpAddr, port: u16) -> Endpoint {
    Endpoint::new(0, ip, port, ip.is_ipv6())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::detect::samples;

    pub(in crate::sockets) fn row(source: &str, destination: &str, state: u8) -> DumpedSocket {
        let end = |text: &str| {
            let end: std::net::SocketAddr = text.parse().unwrap();
            dumped_endpoint(end.ip(), end.port())
        };
        DumpedSocket { entry: samples::entry(end(source), state), destination: end(destination) }
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
}
