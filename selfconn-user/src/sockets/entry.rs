//! An entry of the kernel's socket table, from the dump to the event.

use std::{net::IpAddr, sync::Arc, time::Duration};

use selfconn_ebpf::{BindOptions, Endpoint, Opener, state};

use super::{by_socket::SocketRef, netns::NetnsId};

/// A socket in the kernel's table: a self-connection, or a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketEntry {
    /// Source and destination; of a listener, the local end.
    pub endpoint: Endpoint,
    /// The TCP state: one of [`state`].
    pub state: u8,
    /// The socket cookie; procfs does not provide it. Then the device of the endpoint is unknown, too.
    pub cookie: Option<u64>,
    /// The socket's address in the kernel. Only the iterator over descriptors knows it.
    pub sock: Option<u64>,
    /// The inode of the socket, used to find its holders. 0: no process holds the socket, as in TIME_WAIT.
    pub inode: u64,
    /// The owner of the socket. `None` if it has no inode, because the kernel reports 0 for such a socket.
    pub uid: Option<u32>,
    /// The time for which TIME_WAIT still holds the port. `None`: the socket is not in TIME_WAIT.
    pub time_wait_left: Option<Duration>,
    /// Only the iterator over descriptors knows them.
    pub options: BindOptions,
    /// The socket's kernel address and its opener, if the probes' connect table has an entry for it. Only
    /// [`super::ConnectMatch`] sets it.
    pub connect_entry: Option<Box<(u64, Opener)>>,
    /// True if a process is known to have the socket open. The tables don't say so.
    pub is_held: bool,
    /// The name of the device that the socket is bound to. Only [`super::snapshot()`] sets it.
    pub device: Option<Arc<str>>,
}

impl SocketEntry {
    /// What the socket is recognized by. `None`: it has no file, so no process has it open.
    #[must_use]
    pub fn socket_ref(&self) -> Option<SocketRef> {
        let Self { cookie, inode, endpoint, .. } = *self;
        (inode != 0).then_some(SocketRef { cookie, inode, endpoint: Some(endpoint) })
    }
}

/// What it means that a snapshot does not list a connection that was open before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Nothing: its namespace was not read.
    Unknown,
    /// Its namespace was read, so it is probably gone.
    Read,
    /// Its namespace has ended, so it is gone.
    NetnsEnded,
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

    pub(super) fn into_entry(self, netns: NetnsId) -> SocketEntry {
        let mut entry = self.entry;
        entry.endpoint = in_netns(entry.endpoint, netns);
        entry
    }
}

/// An end of a dumped socket. `ifindex` is the device that the socket is bound to, or 0.
pub(super) fn dumped_endpoint(ip: IpAddr, port: u16, ifindex: u32) -> Endpoint {
    Endpoint { ifindex, ..Endpoint::new(0, ip, port, ip.is_ipv6()) }
}

/// An end of a socket that was dumped in this network namespace.
pub(super) fn in_netns(endpoint: Endpoint, netns: NetnsId) -> Endpoint {
    Endpoint { netns: netns.inode, netns_cookie: netns.cookie, ..endpoint }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::detect::samples;

    pub(in crate::sockets) fn row(source: &str, destination: &str, state: u8) -> DumpedSocket {
        let end = |text: &str| {
            let end: std::net::SocketAddr = text.parse().unwrap();
            dumped_endpoint(end.ip(), end.port(), 0)
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
