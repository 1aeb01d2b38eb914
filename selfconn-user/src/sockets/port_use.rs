//! What has a local port, in the network namespace of the calling thread.

use std::io;

use selfconn_ebpf::{Endpoint, state};

use super::{entry::DumpedSocket, table::Tables};

/// What has a local port, as far as the socket table shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortUse {
    /// A listener, or a socket that is bound and idle, at any address and of either family.
    pub is_bound: bool,
    /// A connection, or what is left of one (TIME_WAIT).
    pub is_connected: bool,
    /// A self-connection at the address in question, or its TIME_WAIT.
    pub is_self_connected: bool,
}

impl PortUse {
    fn add(&mut self, row: &DumpedSocket, destination: &Endpoint) {
        match row.entry.state {
            // Idle sockets are in CLOSE.
            state::LISTEN | state::CLOSE => self.is_bound = true,
            _ if row.is_self_connection() && row.entry.endpoint.addr == destination.addr => {
                self.is_self_connected = true;
            }
            _ => self.is_connected = true,
        }
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
        tables.read_port(destination.port)?;
        let mut port_use = PortUse::default();
        tables.rows.iter().for_each(|row| port_use.add(row, destination));
        Ok(port_use)
    };
    destinations.iter().map(&mut look).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

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
