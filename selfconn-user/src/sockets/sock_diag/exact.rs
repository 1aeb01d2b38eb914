//! Looks up one socket by its addresses and ports, or destroys one socket by its cookie, through sock_diag in
//! the network namespace of the calling thread.
//!
//! The kernel applies a request without a cookie (`INET_DIAG_NOCOOKIE`) to any matching socket. If no
//! connection matches, a listener on the port matches: the kernel would destroy it and report success
//! (`inet_diag_find_one_icsk`, net/ipv4/inet_diag.c, and `sock_diag_check_cookie`, net/core/sock_diag.c at
//! v5.10). The states in a request do not prevent this. Therefore every request here needs a [`Cookie`],
//! which never has that value.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_core::{ErrorBuffer, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use selfconn_ebpf::Endpoint;
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    message::{self, DiagMessage},
    parse,
};
use crate::sockets::entry::DumpedSocket;

/// Both halves of `INET_DIAG_NOCOOKIE`, include/uapi/linux/inet_diag.h at v5.10.
const NOCOOKIE: u64 = u64::MAX;

/// A reply describes one socket, with few attributes.
const REPLY_BUFFER_LEN: usize = 4_096;

const ENOENT: i32 = 2;
const ESTALE: i32 = 116;

/// The cookie of a socket. It is unique for this boot: no other socket ever has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(u64);

impl Cookie {
    /// `None`: the value is not a valid cookie.
    #[must_use]
    pub const fn new(cookie: u64) -> Option<Self> {
        match cookie {
            0 | NOCOOKIE => None,
            _ => Some(Self(cookie)),
        }
    }

    /// The value as it appears in events.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The socket with this cookie, if the kernel finds it by its endpoint. `None`: the kernel finds no socket there, or
/// another one. For the endpoint of a socket that is bound to a device, the kernel takes the first socket with these
/// addresses and ports that is bound to the same device or to none (`inet_sk_bound_dev_eq`,
/// include/net/inet_sock.h at v6.12). For one without a device, it takes only one without.
pub(crate) fn look_up(endpoint: &Endpoint, cookie: Cookie) -> io::Result<Option<DumpedSocket>> {
    none_if_another(request_socket(SOCK_DIAG_BY_FAMILY, self_connection(endpoint, cookie)))
}

/// Destroys the socket with this cookie. Returns true if the kernel found it: see [`look_up`]. The socket is gone
/// when this returns true.
pub(crate) fn destroy(endpoint: &Endpoint, cookie: Cookie) -> io::Result<bool> {
    // The kernel's acknowledgement has no socket.
    let acknowledged = request_socket(SOCK_DESTROY, self_connection(endpoint, cookie));
    none_if_another(acknowledged.map(|_| Some(()))).map(|found| found.is_some())
}

/// Creates a listener and destroys it with SOCK_DESTROY, because the kernel checks the permission only for a
/// socket that exists.
pub(crate) fn probe_destroy() -> io::Result<()> {
    let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let Some(listener) = addresses.into_iter().find_map(|addr| listen(addr).ok()) else {
        // `lo` is down, so only the kernel's support for the request can be checked.
        let nothing = id(Ipv4Addr::LOCALHOST.into(), 0, 0, 1);
        return none_if_another(request_socket(SOCK_DESTROY, nothing)).map(drop);
    };
    let local = listener.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    let cookie = Cookie::new(listener.cookie()?).ok_or(io::ErrorKind::Unsupported)?;
    let unspecified =
        if local.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let listening = SocketId {
        destination_address: unspecified,
        destination_port: 0,
        ..id(local.ip(), local.port(), 0, cookie.get())
    };
    request_socket(SOCK_DESTROY, listening).map(drop)
}

fn listen(addr: IpAddr) -> io::Result<Socket> {
    let address = SocketAddr::new(addr, 0);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&address.into())?;
    socket.listen(1)?;
    Ok(socket)
}

/// The kernel's answers for no socket (ENOENT) and for a socket with another cookie (ESTALE,
/// `sock_diag_check_cookie`, net/core/sock_diag.c at v5.10) are no errors.
fn none_if_another<T>(result: io::Result<Option<T>>) -> io::Result<Option<T>> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ESTALE)) => Ok(None),
        outcome => outcome,
    }
}

fn self_connection(endpoint: &Endpoint, cookie: Cookie) -> SocketId {
    let addr = match endpoint.ip() {
        IpAddr::V4(addr) if endpoint.is_ipv6() => addr.to_ipv6_mapped().into(),
        addr => addr,
    };
    id(addr, endpoint.port, endpoint.ifindex, cookie.get())
}

fn id(addr: IpAddr, port: u16, ifindex: u32, cookie: u64) -> SocketId {
    let (low, high) = (cookie as u32, (cookie >> 32) as u32);
    let mut halves = [0; 8];
    halves[..4].copy_from_slice(&low.to_ne_bytes());
    halves[4..].copy_from_slice(&high.to_ne_bytes());
    SocketId {
        source_port: port,
        destination_port: port,
        source_address: addr,
        destination_address: addr,
        interface_id: ifindex,
        cookie: halves,
    }
}

/// Sends one request and returns the socket in the reply. `None`: success without a socket.
fn request_socket(kind: u16, socket_id: SocketId) -> io::Result<Option<DumpedSocket>> {
    let mut socket = message::open()?;
    socket.send(&encode(kind, socket_id))?;
    let mut buffer = [0; REPLY_BUFFER_LEN];
    let len = loop {
        match socket.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => break outcome?,
        }
    };
    parse_reply(&buffer[..len])
}

fn encode(kind: u16, socket_id: SocketId) -> Vec<u8> {
    let request = InetRequest {
        family: if socket_id.source_address.is_ipv6() { AF_INET6 } else { AF_INET },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    };
    // Without NLM_F_ACK the kernel sends no reply after it has destroyed a socket.
    let flags = NLM_F_REQUEST | if kind == SOCK_DESTROY { NLM_F_ACK } else { 0 };
    DiagMessage { kind, flags, request, filter: None }.encode()
}

fn parse_reply(reply: &[u8]) -> io::Result<Option<DumpedSocket>> {
    let malformed = |_| io::Error::new(io::ErrorKind::InvalidData, "sock_diag returned a truncated reply");
    let message = NetlinkBuffer::new_checked(reply).map_err(malformed)?;
    match message.message_type() {
        SOCK_DIAG_BY_FAMILY => parse(message.payload()).map(Some).map_err(malformed),
        NLMSG_ERROR => {
            let code = ErrorBuffer::new_checked(message.payload()).map_err(malformed)?.code();
            code.map_or(Ok(None), |code| Err(io::Error::from_raw_os_error(-code.get())))
        }
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("sock_diag sent an unexpected message type {other}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(ip: &str, is_ipv6: bool) -> Endpoint {
        Endpoint::new(1, ip.parse().unwrap(), 40_000, is_ipv6)
    }

    #[test]
    fn a_request_to_destroy_always_has_a_cookie() {
        for none in [0, NOCOOKIE] {
            assert_eq!(Cookie::new(none), None);
        }
        // Either half alone may be all ones.
        for cookie in [1, 0xffff_ffff, 0xffff_ffff_0000_0000, NOCOOKIE - 1] {
            let request = self_connection(&endpoint("127.0.0.1", false), Cookie::new(cookie).unwrap());
            let bytes = encode(SOCK_DESTROY, request);
            assert_ne!(bytes[64..72], [0xff; 8], "{cookie:#x}");
            assert_eq!(bytes[64..68], (cookie as u32).to_ne_bytes());
            assert_eq!(bytes[68..72], ((cookie >> 32) as u32).to_ne_bytes());
        }
    }

    #[test]
    fn a_request_identifies_one_socket() {
        let v4 = [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let v6 = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1];
        let fe80 = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        for (ip, ifindex, family, address) in
            [("127.0.0.1", 0, AF_INET, v4), ("127.0.0.1", 7, AF_INET6, v6), ("fe80::9", 3, AF_INET6, fe80)]
        {
            let endpoint = Endpoint { ifindex, ..endpoint(ip, family == AF_INET6) };
            for (kind, flags) in [(SOCK_DIAG_BY_FAMILY, 1_u16), (SOCK_DESTROY, 5)] {
                let bytes = encode(kind, self_connection(&endpoint, Cookie::new(7).unwrap()));
                assert_eq!(bytes.len(), 72);
                assert_eq!(bytes[4..6], kind.to_ne_bytes());
                assert_eq!(bytes[6..8], flags.to_ne_bytes());
                assert_eq!(bytes[16..18], [family, IPPROTO_TCP]);
                assert_eq!(bytes[24..28], [40_000_u16.to_be_bytes(); 2].concat());
                assert_eq!(bytes[28..44], address);
                assert_eq!(bytes[44..60], address);
                assert_eq!(bytes[60..64], u32::to_ne_bytes(ifindex));
                assert_eq!(bytes[64..72], 7_u64.to_ne_bytes());
            }
        }
    }

    #[test]
    fn a_reply_is_a_socket_or_success_or_an_errno() {
        let message = |kind: u16, payload: &[u8]| {
            let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(payload);
            bytes
        };
        let code = |code: i32| [&code.to_ne_bytes()[..], &[0; 16]].concat();
        let errno = |reply: &[u8]| parse_reply(reply).map_err(|error| error.raw_os_error());
        assert_eq!(errno(&message(NLMSG_ERROR, &code(0))), Ok(None));
        assert_eq!(errno(&message(NLMSG_ERROR, &code(-2))), Err(Some(ENOENT)));
        assert_eq!(errno(&message(SOCK_DIAG_BY_FAMILY, &[2; 10])), Err(None));
        assert_eq!(errno(&message(99, &[])), Err(None));
        assert_eq!(errno(&[]), Err(None));
        let mut socket = vec![0; 72];
        (socket[0], socket[1]) = (AF_INET, 1);
        assert_eq!(parse_reply(&message(SOCK_DIAG_BY_FAMILY, &socket)).unwrap().unwrap().entry.state, 1);
    }
}
