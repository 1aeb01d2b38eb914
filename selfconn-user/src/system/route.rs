//! Asks the kernel about an address in the network namespace of the calling thread. UDP sockets are used,
//! because they send no packet.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Socket, Type};

/// The source address that the kernel chooses for an unbound `connect()`.
///
/// # Errors
/// If there is no route.
pub fn source(destination: SocketAddr) -> io::Result<IpAddr> {
    let socket = socket(destination, Type::DGRAM)?;
    socket.connect(&destination.into())?;
    let source = socket.local_addr()?.as_socket();
    source.map(|source| source.ip()).ok_or_else(|| io::Error::other("the kernel returned no source address"))
}

/// Binds the address with port 0.
///
/// # Errors
/// `AddrNotAvailable` if this network namespace does not have the address.
pub fn bind(mut addr: SocketAddr) -> io::Result<()> {
    addr.set_port(0);
    socket(addr, Type::DGRAM)?.bind(&addr.into())
}

/// A new socket of the family of this address.
///
/// # Errors
/// As `socket(2)`.
pub fn socket(addr: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind, None)?;
    if addr.is_ipv6() {
        // An IPv4-mapped address needs a dual-stack socket, also if net.ipv6.bindv6only is set.
        socket.set_only_v6(false)?;
    }
    Ok(socket)
}
