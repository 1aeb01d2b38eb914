//! What has a local port, in the network namespace of the calling thread.

use std::io;

use selfconn_ebpf::{Endpoint, state};

use super::{entry::DumpedSocket, limit::RowSink, table::Tables};

/// What has a local port, as far as the socket table shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortUse {
    /// A listener, or a socket that is bound and idle, at any address and of either family.
    pub is_bound: bool,
    /// A connection, or a TIME_WAIT, also that of a self-connection.
    pub is_connected: bool,
    /// An open self-connection at the address in question, so that `connect()` can't make another one.
    pub is_self_connected: bool,
}

/// True if a socket with the destination's device can't connect to the address and port that this one has at both ends:
/// one that is bound to a device is another connection for a socket that is bound to none (`inet_match`,
/// include/net/inet_hashtables.h at v6.12).
fn excludes(row: &DumpedSocket, destination: &Endpoint) -> bool {
    let endpoint = &row.entry.endpoint;
    row.is_self_connection()
        && endpoint.addr == destination.addr
        && (endpoint.ifindex == 0 || endpoint.ifindex == destination.ifindex)
}

impl PortUse {
    fn add(&mut self, row: &DumpedSocket, destination: &Endpoint) {
        match row.entry.state {
            // Idle sockets are in CLOSE.
            state::LISTEN | state::CLOSE => self.is_bound = true,
            // connect() takes over a TIME_WAIT of a loopback address after a second (`tcp_twsk_unique`,
            // net/ipv4/tcp_ipv4.c at v6.12; tcp_tw_reuse is 2 by default). So the port can be hit again.
            state::TIME_WAIT => self.is_connected = true,
            _ if excludes(row, destination) => self.is_self_connected = true,
            _ => self.is_connected = true,
        }
    }
}

/// What the sockets with a local port say about it. None of them is kept, because anybody can have any number of
/// TIME_WAIT entries at one port.
pub(super) struct PortUseSink<'a> {
    destination: &'a Endpoint,
    port_use: PortUse,
}

impl PortUseSink<'_> {
    /// True if no socket has the port.
    pub(super) fn is_unused(&self) -> bool {
        self.port_use == PortUse::default()
    }
}

impl RowSink for PortUseSink<'_> {
    type Mark = PortUse;

    fn push(&mut self, row: DumpedSocket) {
        self.port_use.add(&row, self.destination);
    }

    fn mark(&self) -> PortUse {
        self.port_use
    }

    fn restore(&mut self, mark: &PortUse) {
        self.port_use = *mark;
    }
}

/// Looks at the port of each destination. The kernel walks its table of connections only for a port that has no
/// listener.
///
/// # Errors
/// If neither sock_diag nor `/proc/net/tcp` can be read.
pub fn port_uses(destinations: &[Endpoint]) -> io::Result<Vec<PortUse>> {
    let mut tables = Tables::new(false);
    let mut look = |destination: &Endpoint| {
        let mut sink = PortUseSink { destination, port_use: PortUse::default() };
        tables.read_port(destination.port, &mut sink)?;
        Ok(sink.port_use)
    };
    destinations.iter().map(&mut look).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;
    use crate::sockets::entry::tests::row;

    #[test]
    fn sockets_are_counted_in_and_out_again() {
        let destination = Endpoint::new(1, Ipv4Addr::LOCALHOST.into(), 4, false);
        let mut sink = PortUseSink { destination: &destination, port_use: PortUse::default() };
        assert!(sink.is_unused());
        let unused = sink.mark();
        sink.push(row("127.0.0.1:4", "127.0.0.1:5", state::TIME_WAIT));
        assert_eq!(sink.port_use, PortUse { is_connected: true, ..PortUse::default() });
        let connected = sink.mark();
        sink.push(row("127.0.0.9:4", "0.0.0.0:0", state::LISTEN));
        sink.push(row("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED));
        assert_eq!(sink.port_use, PortUse { is_bound: true, is_connected: true, is_self_connected: true });
        sink.restore(&connected);
        assert!(!sink.is_unused() && sink.port_use == connected);
        sink.restore(&unused);
        assert!(sink.is_unused());
    }

    #[test]
    fn a_self_connection_has_the_port_until_it_is_closed() {
        let of_state = |state| {
            let destination = Endpoint::new(1, Ipv4Addr::LOCALHOST.into(), 4, false);
            let mut port_use = PortUse::default();
            port_use.add(&row("127.0.0.1:4", "127.0.0.1:4", state), &destination);
            (port_use.is_self_connected, port_use.is_connected)
        };
        for open in [state::ESTABLISHED, state::FIN_WAIT1, state::CLOSE_WAIT, state::LAST_ACK, state::CLOSING]
        {
            assert_eq!(of_state(open), (true, false), "{open:?}");
        }
        assert_eq!(of_state(state::TIME_WAIT), (false, true));
    }

    #[test]
    fn a_self_connection_of_another_device_does_not_keep_the_port_from_being_hit() {
        for (of_connection, of_connect, is_excluded) in
            [(0, 0, true), (0, 1, true), (1, 1, true), (1, 0, false), (1, 2, false)]
        {
            let unbound = Endpoint::new(1, Ipv4Addr::LOCALHOST.into(), 4, false);
            let destination = Endpoint { ifindex: of_connect, ..unbound };
            let mut open = row("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED);
            open.entry.endpoint.ifindex = of_connection;
            open.destination = open.entry.endpoint;
            let mut port_use = PortUse::default();
            port_use.add(&open, &destination);
            let expected =
                PortUse { is_self_connected: is_excluded, is_connected: !is_excluded, is_bound: false };
            assert_eq!(port_use, expected, "{of_connection} {of_connect}");
        }
    }

    fn look(port: u16) -> PortUse {
        port_uses(&[Endpoint::new(0, Ipv4Addr::LOCALHOST.into(), port, false)]).unwrap()[0]
    }

    #[test]
    fn a_listener_a_connection_and_nothing_are_distinguished() {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 9), 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(look(port), PortUse { is_bound: true, ..PortUse::default() }, "at another address");
        let connected = look(client.local_addr().unwrap().port());
        assert_eq!(connected, PortUse { is_connected: true, ..PortUse::default() });
        assert_eq!(look(1), PortUse::default());
    }
}
