//! The daemon's own self-connection, which proves that the hooks work: one socket in a private network
//! namespace, without processes and without a route to it, that is connected to itself again and again.
//!
//! A socket stays in the namespace in which it was created, and keeps that namespace alive. Creating the
//! socket needs privileges, once. Using it needs no privileges, no thread and no change of namespace. A descriptor of
//! the namespace stays open beside it, so that `scan` and `lsns` can find where it is.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    panic, thread,
};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sockets::CURRENT_NETNS;

/// Endpoint of the self-test. No other server uses it in any namespace.
pub(super) const ENDPOINT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 83, 67, 84), 50_883);

/// The message that brings `lo` up, `struct nlmsghdr` and `struct ifinfomsg`: RTM_NEWLINK with IFF_UP in
/// flags and change mask (include/uapi/linux/rtnetlink.h at v5.10). `lo` has index 1 in every namespace.
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 5;
const LOOPBACK: u32 = 1;
const IFF_UP: u32 = 1;
const NLMSG_ERROR: u16 = 2;

/// `AF_NETLINK` and `NETLINK_ROUTE`.
const AF_NETLINK: i32 = 16;
const NETLINK_ROUTE: i32 = 0;

/// The socket of the self-test.
#[derive(Debug)]
pub struct SelfTestSocket {
    socket: Socket,
    #[expect(dead_code, reason = "open for others to see")]
    netns: File,
    cookie: u64,
}

impl SelfTestSocket {
    /// Creates the namespace and the socket.
    ///
    /// # Errors
    /// A message, if this process lacks the privileges.
    pub fn prepare() -> Result<Self, String> {
        let create = || {
            // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            bring_up_loopback()?;
            Self::bind(ENDPOINT)
        };
        let created = thread::scope(|scope| {
            let thread = thread::Builder::new().name("namespace".to_owned()).spawn_scoped(scope, create)?;
            thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
        });
        created.map_err(|error: io::Error| {
            format!(
                "cannot create a network namespace: {error} (needs CAP_SYS_ADMIN and CAP_NET_ADMIN at start)"
            )
        })
    }

    /// Creates the socket in the network namespace of the calling thread.
    pub(super) fn bind(endpoint: SocketAddrV4) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        // Bound to a port number, so that the port stays the same from one connect() to the next.
        socket.bind(&endpoint.into())?;
        // The kernel assigns the cookie now, so every probe that knows the field reads it in every record.
        let cookie = socket.cookie()?;
        Ok(Self { socket, netns: File::open(CURRENT_NETNS)?, cookie })
    }

    /// Connects the socket to itself. The connection is usually established when this returns, but on a busy
    /// host it may take longer.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn connect(&self) -> io::Result<()> {
        const EINPROGRESS: i32 = 115;
        match self.socket.local_addr().and_then(|own| self.socket.connect(&own)) {
            Err(error) if error.raw_os_error() != Some(EINPROGRESS) => Err(error),
            _ => Ok(()),
        }
    }

    /// Resets the connection, so that the socket can be connected again. No TIME_WAIT is left.
    pub fn disconnect(&self) {
        if let Err(error) = rustix::net::connect_unspec(&self.socket) {
            log::debug!("cannot disconnect the self-test's socket: {error}");
        }
    }

    /// The socket cookie, which no other socket of this boot has.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// True from SYN_RECV or ESTABLISHED on (`inet_getname`, net/ipv4/af_inet.c at v5.10).
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.socket.peer_addr().is_ok()
    }
}

/// Brings `lo` up in the network namespace of the calling thread.
fn bring_up_loopback() -> io::Result<()> {
    let mut socket = Socket::new(Domain::from(AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_ROUTE)))?;
    socket.send(&link_up_request())?;
    let mut response = [0; 128];
    let len = socket.read(&mut response)?;
    match ack_errno(&response[..len]) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "rtnetlink sent a truncated response")),
    }
}

fn link_up_request() -> Vec<u8> {
    let mut link_up_request = Vec::with_capacity(32);
    link_up_request.extend(32_u32.to_ne_bytes());
    link_up_request.extend(RTM_NEWLINK.to_ne_bytes());
    link_up_request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    // Sequence number, port id, family and type.
    link_up_request.extend([0; 12]);
    for word in [LOOPBACK, IFF_UP, IFF_UP] {
        link_up_request.extend(word.to_ne_bytes());
    }
    link_up_request
}

/// The errno in a netlink acknowledgement. `None`: the message is not an acknowledgement, or is truncated.
fn ack_errno(response: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(*response.get(4..)?.first_chunk()?);
    let code = i32::from_ne_bytes(*response.get(16..)?.first_chunk()?);
    (kind == NLMSG_ERROR).then_some(code.saturating_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_and_refusals_are_distinguished() {
        assert_eq!(link_up_request().len(), 32);
        let response = |kind: u16, code: i32| {
            let mut response = vec![0; 20];
            response[4..6].copy_from_slice(&kind.to_ne_bytes());
            response[16..20].copy_from_slice(&code.to_ne_bytes());
            response
        };
        assert_eq!(ack_errno(&response(NLMSG_ERROR, 0)), Some(0));
        assert_eq!(ack_errno(&response(NLMSG_ERROR, -1)), Some(1));
        assert_eq!(ack_errno(&response(3, 0)), None);
        assert_eq!(ack_errno(&response(NLMSG_ERROR, 0)[..18]), None);
        assert_eq!(ack_errno(&[]), None);
    }
}
