//! Dumps the socket table of one network namespace through sock_diag.
//!
//! A host can have hundreds of thousands of sockets, so a comparison of a few raw bytes skips all other
//! sockets; only matching sockets are parsed.

use std::{
    io::{self, Read as _},
    ops::Range,
    time::Duration,
};

use netlink_packet_core::{
    DefaultNla, DoneBuffer, ErrorBuffer, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NLMSG_OVERRUN, NetlinkBuffer, Parseable as _,
};
use netlink_packet_sock_diag::{
    AF_INET6,
    inet::{InetResponseHeader, StateFlags, Timer},
};
use selfconn_ebpf::BindOptions;

use super::{
    entry::{DumpedSocket, STATES, SocketEntry, dumped_endpoint},
    limit::RowSink,
    port_use::PortUseSink,
};
use message::{AllFamiliesRequest, DiagMessage, TCPDIAG_GETSOCK};

mod bytecode;
pub(super) mod exact;
mod message;

/// `INET_DIAG_REQ_BYTECODE`, include/uapi/linux/inet_diag.h at v5.10.
const BYTECODE: u16 = 1;

/// The length of the fixed part of a response, `struct inet_diag_msg`, include/uapi/linux/inet_diag.h at
/// v5.10.
const DIAG_MSG_LEN: usize = 72;
const FAMILY: usize = 0;
const SOURCE_PORT: Range<usize> = 4..6;
const DESTINATION_PORT: Range<usize> = 6..8;
const SOURCE: usize = 8;
const DESTINATION: usize = 24;
const EXPIRES_MS: Range<usize> = 52..56;

/// The kernel fills at most 32 KiB at a time (`netlink_recvmsg`, net/netlink/af_netlink.c at v5.10).
const BUFFER_LEN: usize = 1 << 16;

const ENOBUFS: i32 = 105;

/// Every state, with the bit that asks for sockets that are bound and idle (`TCP_BOUND_INACTIVE`,
/// include/net/tcp_states.h at v6.8). Older kernels ignore that bit.
const PORT_STATES: u32 = (1 << 14) - 2;

/// The maximum number of attempts at a dump, if the kernel reports it as inconsistent or the receive buffer
/// overflows.
const MAX_DUMP_TRIES: u32 = 3;

/// Reads the socket tables of the network namespace of the calling thread.
pub(super) struct DiagReader {
    filter: Vec<u8>,
    buffer: Vec<u8>,
}

/// The parameters of a dump.
#[derive(Clone, Copy)]
struct DumpRequest {
    states: u32,
    filter: DumpFilter,
}

/// Selects sockets among those in the requested states.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DumpFilter {
    /// Sockets whose two addresses and two ports are equal.
    SelfConnections,
    /// Sockets whose two addresses are equal.
    EqualAddresses,
    /// Sockets with this local port.
    LocalPort(u16),
    /// All sockets.
    All,
}

impl DiagReader {
    pub(super) fn new() -> Self {
        Self { filter: bytecode::same_range(), buffer: vec![0; BUFFER_LEN] }
    }

    /// Appends the self-connections and, if requested, the connection attempts in progress.
    pub(super) fn read(&mut self, attempts: bool, rows: &mut impl RowSink) -> io::Result<()> {
        let syn_sent = StateFlags::SYN_SENT.bits();
        let mut dump = |states, filter| self.dump_with_retry(DumpRequest { states, filter }, rows);
        if !attempts {
            return dump(STATES, DumpFilter::SelfConnections);
        }
        // SYN_SENT comes first, so that an attempt that becomes a connection in the meantime is still found.
        dump(syn_sent, DumpFilter::EqualAddresses)?;
        dump(STATES & !syn_sent, DumpFilter::SelfConnections)
    }

    /// Appends the listeners. For this dump the kernel does not walk the table of connections.
    pub(super) fn read_listeners(&mut self, rows: &mut impl RowSink) -> io::Result<()> {
        let states = StateFlags::LISTEN.bits();
        self.dump_with_retry(DumpRequest { states, filter: DumpFilter::All }, rows)
    }

    /// Reads the sockets with this local port, in any state. Kernels from v6.8 on have those that are bound and idle
    /// among them.
    pub(super) fn read_port(&mut self, port: u16, sockets: &mut PortUseSink<'_>) -> io::Result<()> {
        // Listeners first: for them the kernel does not walk the table of connections.
        let listening = StateFlags::LISTEN.bits();
        for states in [listening, PORT_STATES & !listening] {
            self.dump_with_retry(DumpRequest { states, filter: DumpFilter::LocalPort(port) }, sockets)?;
            if !sockets.is_unused() {
                break;
            }
        }
        Ok(())
    }

    fn dump_with_retry(&mut self, request: DumpRequest, rows: &mut impl RowSink) -> io::Result<()> {
        let mark = rows.mark();
        for _ in 0..MAX_DUMP_TRIES {
            rows.restore(&mark);
            match self.dump(request, rows) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("the socket dump was incomplete or inconsistent on each attempt"))
    }

    /// Returns true if the dump is consistent.
    fn dump(&mut self, request: DumpRequest, rows: &mut impl RowSink) -> io::Result<bool> {
        // Each dump uses a new netlink socket, so that messages left over from an aborted dump are never read
        // as part of the next one.
        let mut socket = message::open()?;
        let local_port;
        let filter = match request.filter {
            DumpFilter::SelfConnections => Some(&self.filter),
            DumpFilter::LocalPort(port) => {
                local_port = bytecode::local_port(port);
                Some(&local_port)
            }
            DumpFilter::EqualAddresses | DumpFilter::All => None,
        };
        let message = request.encode(filter);
        socket.send(&message)?;
        let mut is_consistent = true;
        loop {
            let len = match socket.read(&mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            match request.parse_batch(&self.buffer[..len], rows)? {
                BatchEnd::More { inconsistent } => is_consistent &= !inconsistent,
                BatchEnd::Done { inconsistent } => return Ok(is_consistent && !inconsistent),
            }
        }
    }
}

/// The state of the dump after a batch of messages.
#[derive(Debug, PartialEq, Eq)]
enum BatchEnd {
    More { inconsistent: bool },
    Done { inconsistent: bool },
}

impl DumpRequest {
    fn encode(self, filter: Option<&Vec<u8>>) -> Vec<u8> {
        let request = AllFamiliesRequest { states: self.states };
        let filter = filter.map(|code| DefaultNla::new(BYTECODE, code.clone()));
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        DiagMessage { kind: TCPDIAG_GETSOCK, flags, request, filter }.encode()
    }

    /// Appends the matching sockets of a batch of messages.
    fn parse_batch(self, mut bytes: &[u8], rows: &mut impl RowSink) -> io::Result<BatchEnd> {
        let malformed =
            |_| io::Error::new(io::ErrorKind::InvalidData, "sock_diag returned a truncated message");
        let mut inconsistent = false;
        while !bytes.is_empty() {
            let message = NetlinkBuffer::new_checked(bytes).map_err(malformed)?;
            inconsistent |= message.flags() & NLM_F_DUMP_INTR != 0;
            let payload = message.payload();
            match message.message_type() {
                TCPDIAG_GETSOCK if self.matches(payload) => {
                    rows.push(parse(payload).map_err(malformed)?);
                }
                // The kernel reports an error during the dump in the final message.
                NLMSG_DONE => {
                    let code = DoneBuffer::new_checked(payload).map_or(0, |done| done.code());
                    return if code < 0 {
                        Err(io::Error::from_raw_os_error(-code))
                    } else {
                        Ok(BatchEnd::Done { inconsistent })
                    };
                }
                NLMSG_ERROR => {
                    let code = ErrorBuffer::new_checked(payload).map_err(malformed)?.code();
                    return Err(io::Error::from_raw_os_error(code.map_or(0, |code| -code.get())));
                }
                NLMSG_OVERRUN => inconsistent = true,
                _ => {}
            }
            let next = (message.length() as usize).next_multiple_of(4);
            bytes = bytes.get(next..).unwrap_or_default();
        }
        Ok(BatchEnd::More { inconsistent })
    }

    /// True if the socket of this response matches the filter. This is the only work that is done for every
    /// socket.
    fn matches(self, response: &[u8]) -> bool {
        let Some(fixed) = response.first_chunk::<DIAG_MSG_LEN>() else { return false };
        let len = if fixed[FAMILY] == AF_INET6 { 16 } else { 4 };
        let (source, destination) = (SOURCE..SOURCE + len, DESTINATION..DESTINATION + len);
        match self.filter {
            DumpFilter::SelfConnections => {
                fixed[SOURCE_PORT] == fixed[DESTINATION_PORT] && fixed[source] == fixed[destination]
            }
            DumpFilter::EqualAddresses => fixed[source] == fixed[destination],
            DumpFilter::LocalPort(port) => fixed[SOURCE_PORT] == port.to_be_bytes(),
            DumpFilter::All => true,
        }
    }
}

/// Parses the response that describes one socket.
pub(super) fn parse(response: &[u8]) -> Result<DumpedSocket, netlink_packet_core::DecodeError> {
    let header = InetResponseHeader::parse(response)?;
    let id = header.socket_id;
    let word = |at: Range<usize>| {
        let bytes = response.get(at).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u32::from_ne_bytes)
    };
    // `idiag_cookie[2]`: the low half first, each in the machine's order.
    let (low, high) = (word(44..48), word(48..52));
    // The crate does not provide the remaining time of this timer.
    let left =
        (header.timer == Some(Timer::TimeWait)).then(|| Duration::from_millis(word(EXPIRES_MS).into()));
    let entry = SocketEntry {
        endpoint: dumped_endpoint(id.source_address, id.source_port, id.interface_id),
        state: header.state,
        cookie: Some(u64::from(low) | u64::from(high) << 32),
        inode: header.inode.into(),
        uid: (header.inode != 0).then_some(header.uid),
        time_wait_left: left,
        options: BindOptions::UNKNOWN,
        sock: None,
        connect_entry: None,
        is_held: false,
        device: None,
    };
    let destination = dumped_endpoint(id.destination_address, id.destination_port, id.interface_id);
    Ok(DumpedSocket { entry, destination })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use netlink_packet_sock_diag::AF_INET;
    use selfconn_ebpf::state;

    use super::*;
    use crate::detect::samples;

    const SELF_CONNECTIONS: DumpRequest = DumpRequest { states: STATES, filter: DumpFilter::SelfConnections };
    const ATTEMPTS: DumpRequest = DumpRequest { filter: DumpFilter::EqualAddresses, ..SELF_CONNECTIONS };
    const ALL: DumpRequest = DumpRequest { filter: DumpFilter::All, ..SELF_CONNECTIONS };

    /// A message as the kernel writes it.
    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((16 + payload.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn response(source: (&str, u16), destination: (&str, u16), state: u8) -> Vec<u8> {
        let mut bytes = vec![0; DIAG_MSG_LEN];
        let ends = [(SOURCE, SOURCE_PORT, source), (DESTINATION, DESTINATION_PORT, destination)];
        for (address_at, port_at, (address, port)) in ends {
            bytes[port_at].copy_from_slice(&port.to_be_bytes());
            match address.parse().unwrap() {
                IpAddr::V4(address) => {
                    bytes[FAMILY] = AF_INET;
                    bytes[address_at..address_at + 4].copy_from_slice(&address.octets());
                }
                IpAddr::V6(address) => {
                    bytes[FAMILY] = AF_INET6;
                    bytes[address_at..address_at + 16].copy_from_slice(&address.octets());
                }
            }
        }
        bytes[1] = state;
        bytes[40..44].copy_from_slice(&3_u32.to_ne_bytes());
        bytes[44..48].copy_from_slice(&0x1234_5678_u32.to_ne_bytes());
        bytes[48..52].copy_from_slice(&0x9abc_u32.to_ne_bytes());
        bytes[64..68].copy_from_slice(&1_000_u32.to_ne_bytes());
        bytes[68..72].copy_from_slice(&4_711_u32.to_ne_bytes());
        // An attribute: INET_DIAG_SHUTDOWN.
        bytes.extend([5, 0, 8, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn only_matching_sockets_are_parsed() {
        for (source, destination, is_self_connection, is_attempt) in [
            (("127.0.0.1", 40_000), ("127.0.0.1", 40_000), true, true),
            (("::1", 40_000), ("::1", 40_000), true, true),
            (("::ffff:127.0.0.1", 40_000), ("::ffff:127.0.0.1", 40_000), true, true),
            (("127.0.0.1", 40_001), ("127.0.0.1", 40_000), false, true),
            (("127.0.0.1", 40_000), ("127.0.0.2", 40_000), false, false),
            (("::ffff:127.0.0.1", 40_000), ("::ffff:127.0.0.2", 40_000), false, false),
            (("2001:db8::1", 40_000), ("2001:db8::2", 40_000), false, false),
        ] {
            let bytes = message(TCPDIAG_GETSOCK, 2, &response(source, destination, state::ESTABLISHED));
            for (request, expected) in
                [(SELF_CONNECTIONS, is_self_connection), (ATTEMPTS, is_attempt), (ALL, true)]
            {
                let mut rows = Vec::new();
                assert_eq!(
                    request.parse_batch(&bytes, &mut rows).unwrap(),
                    BatchEnd::More { inconsistent: false }
                );
                assert_eq!(rows.len(), usize::from(expected), "{source:?} {destination:?}");
            }
        }
    }

    #[test]
    fn bytes_after_an_ipv4_address_are_ignored() {
        let mut bytes = response(("127.0.0.1", 4), ("127.0.0.1", 4), state::ESTABLISHED);
        bytes[SOURCE + 4..SOURCE + 16].fill(0xaa);
        assert!(SELF_CONNECTIONS.matches(&bytes));
    }

    #[test]
    fn every_field_of_a_response_is_parsed() {
        let mut time_wait = response(("::1", 40_000), ("::1", 40_000), state::TIME_WAIT);
        time_wait[2] = 3;
        time_wait[EXPIRES_MS].copy_from_slice(&59_876_u32.to_ne_bytes());
        let destination = dumped_endpoint("::1".parse().unwrap(), 40_000, 3);
        let entry = SocketEntry {
            cookie: Some(0x9abc_1234_5678),
            inode: 4_711,
            uid: Some(1_000),
            time_wait_left: Some(Duration::from_millis(59_876)),
            ..samples::entry(destination, state::TIME_WAIT)
        };
        assert_eq!(parse(&time_wait).unwrap(), DumpedSocket { entry, destination });
        time_wait[2] = 1;
        assert_eq!(parse(&time_wait).unwrap().entry.time_wait_left, None, "the time of another timer");
    }

    #[test]
    fn the_device_is_part_of_the_endpoint_and_a_uid_needs_an_inode() {
        let mut local = response(("fe80::1", 4), ("fe80::1", 4), state::ESTABLISHED);
        let held = parse(&local).unwrap().entry;
        assert_eq!((held.endpoint.device(), held.uid), (Some(3), Some(1_000)));
        local[68..72].fill(0);
        assert_eq!(parse(&local).unwrap().entry.uid, None);
        let mapped = response(("::ffff:127.0.0.1", 4), ("::ffff:127.0.0.1", 4), state::ESTABLISHED);
        let mapped = parse(&mapped).unwrap().entry;
        assert_eq!((mapped.endpoint.device(), mapped.endpoint.is_ipv6()), (Some(3), true));
        assert_eq!(mapped.endpoint.ip(), IpAddr::from([127, 0, 0, 1]));
    }

    #[test]
    fn a_batch_reports_the_end_or_the_error_of_the_dump() {
        let socket = message(TCPDIAG_GETSOCK, 2, &response(("::1", 4), ("::1", 4), state::ESTABLISHED));
        let inconsistent =
            message(TCPDIAG_GETSOCK, 2 | NLM_F_DUMP_INTR, &response(("::1", 4), ("::1", 4), state::CLOSING));
        let done = message(NLMSG_DONE, 2, &0_i32.to_ne_bytes());
        let failed = message(NLMSG_DONE, 2, &(-2_i32).to_ne_bytes());
        let mut refused = (-1_i32).to_ne_bytes().to_vec();
        refused.extend([0; 16]);
        let refused = message(NLMSG_ERROR, 0, &refused);
        for (bytes, expected, count) in [
            ([&socket[..], &socket].concat(), Ok(BatchEnd::More { inconsistent: false }), 2),
            ([&socket[..], &done].concat(), Ok(BatchEnd::Done { inconsistent: false }), 1),
            ([&inconsistent[..], &done].concat(), Ok(BatchEnd::Done { inconsistent: true }), 1),
            (message(NLMSG_DONE, 2, &[]), Ok(BatchEnd::Done { inconsistent: false }), 0),
            (message(NLMSG_OVERRUN, 0, &[]), Ok(BatchEnd::More { inconsistent: true }), 0),
            (failed, Err(Some(2)), 0),
            (refused, Err(Some(1)), 0),
            (socket[..socket.len() - 8].to_vec(), Err(None), 0),
            (vec![1, 2, 3], Err(None), 0),
            (vec![], Ok(BatchEnd::More { inconsistent: false }), 0),
        ] {
            let mut rows = Vec::new();
            let outcome =
                SELF_CONNECTIONS.parse_batch(&bytes, &mut rows).map_err(|error| error.raw_os_error());
            assert_eq!((outcome, rows.len()), (expected, count), "{bytes:?}");
        }
    }

    #[test]
    fn a_request_is_encoded_as_the_kernel_expects() {
        let bytes = SELF_CONNECTIONS.encode(Some(&vec![1, 4, 4, 0]));
        assert_eq!(bytes.len(), 16 + 60 + 4 + 4);
        assert_eq!(bytes[..4], 84_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], TCPDIAG_GETSOCK.to_ne_bytes());
        assert_eq!(bytes[6..8], 0x301_u16.to_ne_bytes());
        assert_eq!(bytes[16..68], [0; 52]);
        assert_eq!(bytes[68..72], STATES.to_ne_bytes());
        assert_eq!(bytes[72..76], [0; 4]);
        assert_eq!(bytes[80..], [1, 4, 4, 0]);
        assert_eq!(ATTEMPTS.encode(None).len(), 16 + 60);
    }
}
