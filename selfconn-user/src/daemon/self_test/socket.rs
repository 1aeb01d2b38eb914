//! The daemon's own self-connection, which proves that the hooks work: one socket in a private network
//! namespace, without processes and without a route to it, that is connected to itself again and again.
//!
//! A socket stays in the namespace in which it was created, and keeps that namespace alive. Creating the
//! socket needs privileges, once. Using it needs no privileges, no thread and no change of namespace.

use std::{
    fs,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::MetadataExt as _,
    panic, thread,
};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use selfconn_ebpf::Transition;
use socket2::{Domain, Protocol, Socket, Type};

/// Endpoint of the self-test. No other server uses it in any namespace. The self-tests of other daemons are
/// recognized by this endpoint, and ignored like our own.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 83, 67, 84);
const PORT: u16 = 50_883;

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
    netns: u32,
    uid: u32,
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
            let netns = fs::metadata("/proc/thread-self/ns/net")?.ino();
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
            // Bound to a port number, so that the port stays the same from one connect() to the next.
            socket.bind(&SocketAddrV4::new(ADDRESS, PORT).into())?;
            let uid = rustix::process::getuid().as_raw();
            Ok(Self { socket, netns: u32::try_from(netns).unwrap_or(0), uid })
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

    /// Connects the socket to itself. The connection is usually established when this returns, but on a busy
    /// host it may take longer.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn connect(&self) -> io::Result<()> {
        const EINPROGRESS: i32 = 115;
        match self.socket.connect(&SocketAddrV4::new(ADDRESS, PORT).into()) {
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

    /// True if the transition belongs to this socket.
    #[must_use]
    pub fn owns(&self, t: &Transition) -> bool {
        match t.endpoint.netns {
            // Without BTF the probes do not know the namespace.
            0 => is_self_test(t, self.uid),
            netns => netns == self.netns,
        }
    }
}

/// True if the transition belongs to the self-test of any daemon. Such transitions are not reported. A
/// self-test is recognized by its endpoint and its user: root, or the user of this daemon. A socket of
/// another user at the same endpoint is reported like any other.
#[must_use]
pub fn is_self_test(t: &Transition, own_uid: u32) -> bool {
    t.endpoint.ip() == ADDRESS
        && t.endpoint.port == PORT
        // The second probe's last record may have no opener, because the entry is already removed.
        && (t.opener.at_ns == 0 || [0, own_uid].contains(&t.opener.uid))
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
    use selfconn_ebpf::{Endpoint, Opener, state};

    use super::*;
    use crate::detect::samples;

    fn transition(addr: Ipv4Addr, port: u16, uid: u32, opened_ns: u64, netns: u32) -> Transition {
        Transition {
            endpoint: Endpoint::new(netns, addr.into(), port, false),
            opener: Opener { at_ns: opened_ns, uid, ..Opener::UNKNOWN },
            ..samples::transition(1, 2, state::SYN_RECV, state::ESTABLISHED)
        }
    }

    #[test]
    fn only_sockets_of_root_and_the_same_user_at_the_self_test_endpoint_are_hidden() {
        let elsewhere = Ipv4Addr::new(127, 0, 0, 1);
        for (addr, port, uid, opened_ns, is_self_test_socket) in [
            (ADDRESS, PORT, 0, 1, true),
            (ADDRESS, PORT, 65_534, 1, true),
            (ADDRESS, PORT, 1_000, 1, false),
            (ADDRESS, PORT, 0, 0, true),
            (ADDRESS, PORT + 1, 0, 1, false),
            (elsewhere, PORT, 0, 1, false),
        ] {
            let t = transition(addr, port, uid, opened_ns, 7);
            assert_eq!(is_self_test(&t, 65_534), is_self_test_socket, "{addr} {port} {uid} {opened_ns}");
        }
    }

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
