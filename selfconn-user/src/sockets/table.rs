//! The socket table of one network namespace: its entries, and how they are read, through sock_diag or, on a
//! kernel without it, through procfs.

use std::{io, net::IpAddr, time::Duration};

use selfconn_ebpf::state;

use super::{procfs, snapshot::ConnectAttempt, sock_diag};

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

/// A socket as dumped by sock_diag or procfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DumpedSocket {
    pub(super) source: (IpAddr, u16),
    pub(super) destination: (IpAddr, u16),
    pub(super) state: u8,
    pub(super) ifindex: u32,
    pub(super) cookie: Option<u64>,
    pub(super) inode: u64,
    pub(super) uid: u32,
    pub(super) time_wait_left: Option<Duration>,
}

impl DumpedSocket {
    pub(super) fn is_self_connection(&self) -> bool {
        self.source == self.destination && self.source.1 != 0 && STATES & 1 << self.state != 0
    }

    pub(super) fn is_attempt(&self) -> bool {
        self.source.0 == self.destination.0 && self.state == state::SYN_SENT
    }

    pub(super) fn entry(&self, netns: u32) -> SocketEntry {
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

    pub(super) fn link_local_ifindex(&self) -> Option<u32> {
        let is_link_local = matches!(self.source.0, IpAddr::V6(addr) if addr.is_unicast_link_local());
        (self.ifindex != 0 && is_link_local).then_some(self.ifindex)
    }

    pub(super) fn attempt(&self, netns: u32) -> ConnectAttempt {
        let (addr, dport) = self.destination;
        ConnectAttempt { netns, addr: addr.to_canonical(), dport, is_ipv6: addr.is_ipv6() }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::sockets) fn row(source: &str, destination: &str, state: u8) -> DumpedSocket {
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
}
