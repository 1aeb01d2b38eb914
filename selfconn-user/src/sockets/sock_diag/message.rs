//! A request to sock_diag as a netlink message, and the socket that carries it.

use std::io;

use netlink_packet_core::{DefaultNla, Emitable, NetlinkMessage, NetlinkPayload, NetlinkSerializable};
use socket2::{Domain, Protocol, Socket, Type};

/// `AF_NETLINK` and `NETLINK_SOCK_DIAG`, include/linux/socket.h and include/uapi/linux/netlink.h at v5.10.
const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;

/// A netlink socket for sock_diag, in the network namespace of the calling thread.
pub(super) fn open() -> io::Result<Socket> {
    Socket::new(Domain::from(AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_SOCK_DIAG)))
}

/// `TCPDIAG_GETSOCK`, include/uapi/linux/inet_diag.h at v5.10.
pub(super) const TCPDIAG_GETSOCK: u16 = 18;

/// The length of `struct inet_diag_req`, include/uapi/linux/inet_diag.h at v5.10, and where its states are.
const ALL_FAMILIES_LEN: usize = 60;
const STATES_AT: usize = 52;

/// The older request for a dump of TCP sockets. It has no family: the kernel lists the sockets of both families in one
/// walk over its table (`inet_diag_dump_compat`, net/ipv4/inet_diag.c at v5.10), which is what a dump costs.
pub(super) struct AllFamiliesRequest {
    pub(super) states: u32,
}

impl Emitable for AllFamiliesRequest {
    fn buffer_len(&self) -> usize {
        ALL_FAMILIES_LEN
    }

    fn emit(&self, buffer: &mut [u8]) {
        buffer.fill(0);
        buffer[STATES_AT..STATES_AT + 4].copy_from_slice(&self.states.to_ne_bytes());
    }
}

/// The request, and the bytecode filter of a dump.
pub(super) struct DiagMessage<R> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) request: R,
    pub(super) filter: Option<DefaultNla>,
}

impl<R: Emitable> DiagMessage<R> {
    pub(super) fn encode(self) -> Vec<u8> {
        let flags = self.flags;
        let mut message = NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(self));
        message.header.flags = flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }
}

impl<R: Emitable> NetlinkSerializable for DiagMessage<R> {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.request.buffer_len() + self.filter.as_ref().map_or(0, Emitable::buffer_len)
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (request, filter) = buffer.split_at_mut(self.request.buffer_len());
        self.request.emit(request);
        if let Some(attribute) = &self.filter {
            attribute.emit(filter);
        }
    }
}
