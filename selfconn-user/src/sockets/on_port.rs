//! Lists the sockets that have one local port, in the network namespace of the calling thread. It reads the
//! whole table of `/proc/net/tcp`, and keeps any number of sockets: for a command, not to watch a host.

use std::{io, net::IpAddr, time::Duration};

use super::{entry::DumpedSocket, procfs};

/// A socket that has the port.
#[derive(Clone, Copy, Debug)]
pub struct PortSocket {
    /// The local address. It is IPv4 also if the socket is IPv6 and the address is v4-mapped, because both
    /// compete for the same ports.
    pub addr: IpAddr,
    /// True if source and destination are equal.
    pub is_self_connection: bool,
    pub state: u8,
    /// The inode of the socket. 0: no process holds it, as in TIME_WAIT.
    pub inode: u64,
    /// The time for which TIME_WAIT still holds the port. `None`: the socket is not in TIME_WAIT.
    pub time_wait_left: Option<Duration>,
}

/// The sockets with this local port.
///
/// # Errors
/// If `/proc/net/tcp` cannot be read.
pub fn on_port(port: u16) -> io::Result<Vec<PortSocket>> {
    let mut rows = Vec::new();
    procfs::read_port(port, &mut rows)?;
    let socket = |row: &DumpedSocket| PortSocket {
        addr: row.entry.endpoint.ip(),
        is_self_connection: row.entry.endpoint == row.destination,
        state: row.entry.state,
        inode: row.entry.inode,
        time_wait_left: row.entry.time_wait_left,
    };
    Ok(rows.iter().map(socket).collect())
}
