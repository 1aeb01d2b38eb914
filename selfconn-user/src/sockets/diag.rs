//! The socket table of one network namespace through sock_diag.
//!
//! A host can have hundreds of thousands of sockets, so what is not ours is passed over by a comparison of a few raw
//! bytes; only a match is parsed.

use std::{
    io::{self, Read as _},
    ops::Range,
    time::Duration,
};

use netlink_packet_core::{
    DefaultNla, DoneBuffer, Emitable, ErrorBuffer, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_OVERRUN, NetlinkBuffer, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    Parseable as _,
};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DIAG_BY_FAMILY,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags, Timer},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Row, STATES, filter};

/// `AF_NETLINK` and `NETLINK_SOCK_DIAG`, include/linux/socket.h and include/uapi/linux/netlink.h at v5.10.
pub(super) const AF_NETLINK: i32 = 16;
pub(super) const NETLINK_SOCK_DIAG: i32 = 4;

/// `INET_DIAG_REQ_BYTECODE`, include/uapi/linux/inet_diag.h at v5.10.
const BYTECODE: u16 = 1;

/// The fixed part of an answer, `struct inet_diag_msg`, include/uapi/linux/inet_diag.h at v5.10.
const ANSWER_LEN: usize = 72;
const FAMILY: usize = 0;
const SOURCE_PORT: Range<usize> = 4..6;
const DESTINATION_PORT: Range<usize> = 6..8;
const SOURCE: usize = 8;
const DESTINATION: usize = 24;
const EXPIRES_MS: Range<usize> = 52..56;

/// The kernel fills at most 32 KiB at a time (`netlink_recvmsg`, net/netlink/af_netlink.c at v5.10).
const BUFFER_LEN: usize = 1 << 16;

const ENOBUFS: i32 = 105;

/// How often a dump that was disturbed is begun again.
const TRIES: u32 = 3;

/// Reads the tables of whatever namespace the calling thread is in.
pub(super) struct Reader {
    filter: Vec<u8>,
    buffer: Vec<u8>,
}

/// What a dump asks for.
#[derive(Clone, Copy)]
struct Question {
    family: u8,
    states: u32,
    wanted: Wanted,
}

/// Which of the sockets in these states.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Those whose ports are equal, too.
    Selves,
    /// Those whose addresses are equal.
    EqualAddresses,
    All,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self { filter: filter::same_range(), buffer: vec![0; BUFFER_LEN] }
    }

    /// Appends the self-connections, and where they are wanted the dials in flight.
    pub(super) fn read(&mut self, dials: bool, rows: &mut Vec<Row>) -> io::Result<()> {
        let dialling = StateFlags::SYN_SENT.bits();
        for family in [AF_INET, AF_INET6] {
            let mut ask = |states, wanted| self.ask(Question { family, states, wanted }, rows);
            if dials {
                // First, for a dial that has meanwhile become a connection is then found as that.
                ask(dialling, Wanted::EqualAddresses)?;
                ask(STATES & !dialling, Wanted::Selves)?;
            } else {
                ask(STATES, Wanted::Selves)?;
            }
        }
        Ok(())
    }

    /// Appends the listeners. For these alone the kernel leaves the table of connections alone.
    pub(super) fn read_listeners(&mut self, rows: &mut Vec<Row>) -> io::Result<()> {
        let states = StateFlags::LISTEN.bits();
        for family in [AF_INET, AF_INET6] {
            self.ask(Question { family, states, wanted: Wanted::All }, rows)?;
        }
        Ok(())
    }

    fn ask(&mut self, question: Question, rows: &mut Vec<Row>) -> io::Result<()> {
        let before = rows.len();
        for _ in 0..TRIES {
            rows.truncate(before);
            match self.dump(question, rows) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("the dump was disturbed again and again"))
    }

    /// Whether nothing disturbed the dump.
    fn dump(&mut self, question: Question, rows: &mut Vec<Row>) -> io::Result<bool> {
        // A socket for each dump: what a disturbed one leaves behind is never taken for the next one's.
        let mut socket =
            Socket::new(Domain::from(AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
        let request = question.encode((question.wanted == Wanted::Selves).then_some(&self.filter));
        socket.send(&request)?;
        let mut calm = true;
        loop {
            let len = match socket.read(&mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            match question.take(&self.buffer[..len], rows)? {
                Taken::More { disturbed } => calm &= !disturbed,
                Taken::All { disturbed } => return Ok(calm && !disturbed),
            }
        }
    }
}

/// What a batch of answers came to.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    More { disturbed: bool },
    All { disturbed: bool },
}

impl Question {
    fn encode(self, filter: Option<&Vec<u8>>) -> Vec<u8> {
        let any = if self.family == AF_INET6 { SocketId::new_v6() } else { SocketId::new_v4() };
        let request = InetRequest {
            family: self.family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::from_bits_retain(self.states),
            socket_id: any,
        };
        let filter = filter.map(|code| DefaultNla::new(BYTECODE, code.clone()));
        let mut message = NetlinkMessage::new(
            Default::default(),
            NetlinkPayload::InnerMessage(Request { request, filter }),
        );
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    /// Appends those of a batch of answers that are asked for.
    fn take(self, mut bytes: &[u8], rows: &mut Vec<Row>) -> io::Result<Taken> {
        let malformed =
            |_| io::Error::new(io::ErrorKind::InvalidData, "sock_diag gave a message that is cut off");
        let mut disturbed = false;
        while !bytes.is_empty() {
            let message = NetlinkBuffer::new_checked(bytes).map_err(malformed)?;
            disturbed |= message.flags() & NLM_F_DUMP_INTR != 0;
            let payload = message.payload();
            match message.message_type() {
                SOCK_DIAG_BY_FAMILY if self.wants(payload) => {
                    rows.push(parse(payload).map_err(malformed)?);
                }
                // An error in mid-dump comes with the end of it.
                NLMSG_DONE => {
                    let code = DoneBuffer::new_checked(payload).map_or(0, |done| done.code());
                    return if code < 0 {
                        Err(io::Error::from_raw_os_error(-code))
                    } else {
                        Ok(Taken::All { disturbed })
                    };
                }
                NLMSG_ERROR => {
                    let code = ErrorBuffer::new_checked(payload).map_err(malformed)?.code();
                    return Err(io::Error::from_raw_os_error(code.map_or(0, |code| -code.get())));
                }
                NLMSG_OVERRUN => disturbed = true,
                _ => {}
            }
            let next = (message.length() as usize).next_multiple_of(4);
            bytes = bytes.get(next..).unwrap_or_default();
        }
        Ok(Taken::More { disturbed })
    }

    /// The one thing that is done for every socket.
    fn wants(self, answer: &[u8]) -> bool {
        let Some(fixed) = answer.first_chunk::<ANSWER_LEN>() else { return false };
        let len = if fixed[FAMILY] == AF_INET6 { 16 } else { 4 };
        let (source, destination) = (SOURCE..SOURCE + len, DESTINATION..DESTINATION + len);
        match self.wanted {
            Wanted::Selves => {
                fixed[SOURCE_PORT] == fixed[DESTINATION_PORT] && fixed[source] == fixed[destination]
            }
            Wanted::EqualAddresses => fixed[source] == fixed[destination],
            Wanted::All => true,
        }
    }
}

/// A request with its filter.
struct Request {
    request: InetRequest,
    filter: Option<DefaultNla>,
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        SOCK_DIAG_BY_FAMILY
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

/// A socket, as an answer describes it.
pub(super) fn parse(answer: &[u8]) -> Result<Row, netlink_packet_core::DecodeError> {
    let header = InetResponseHeader::parse(answer)?;
    let id = header.socket_id;
    let word = |at: Range<usize>| {
        let bytes = answer.get(at).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u32::from_ne_bytes)
    };
    // `idiag_cookie[2]`: the low half first, each in the machine's order.
    let (low, high) = (word(44..48), word(48..52));
    // The crate gives no time with this timer.
    let left =
        (header.timer == Some(Timer::TimeWait)).then(|| Duration::from_millis(word(EXPIRES_MS).into()));
    Ok(Row {
        source: (id.source_address, id.source_port),
        destination: (id.destination_address, id.destination_port),
        state: header.state,
        ifindex: id.interface_id,
        cookie: Some(u64::from(low) | u64::from(high) << 32),
        inode: header.inode.into(),
        uid: header.uid,
        time_wait_left: left,
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use selfconn_ebpf::state;

    use super::*;

    const ANY: Question = Question { family: AF_INET, states: STATES, wanted: Wanted::Selves };
    const DIALS: Question = Question { wanted: Wanted::EqualAddresses, ..ANY };
    const ALL: Question = Question { wanted: Wanted::All, ..ANY };

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

    fn answer(source: (&str, u16), destination: (&str, u16), state: u8) -> Vec<u8> {
        let mut bytes = vec![0; ANSWER_LEN];
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
    fn of_all_answers_only_ours_are_parsed() {
        for (source, destination, is_self, is_dial) in [
            (("127.0.0.1", 40_000), ("127.0.0.1", 40_000), true, true),
            (("::1", 40_000), ("::1", 40_000), true, true),
            (("::ffff:127.0.0.1", 40_000), ("::ffff:127.0.0.1", 40_000), true, true),
            (("127.0.0.1", 40_001), ("127.0.0.1", 40_000), false, true),
            (("127.0.0.1", 40_000), ("127.0.0.2", 40_000), false, false),
            (("::ffff:127.0.0.1", 40_000), ("::ffff:127.0.0.2", 40_000), false, false),
            (("2001:db8::1", 40_000), ("2001:db8::2", 40_000), false, false),
        ] {
            let bytes = message(SOCK_DIAG_BY_FAMILY, 2, &answer(source, destination, state::ESTABLISHED));
            for (question, expected) in [(ANY, is_self), (DIALS, is_dial), (ALL, true)] {
                let mut rows = Vec::new();
                assert_eq!(question.take(&bytes, &mut rows).unwrap(), Taken::More { disturbed: false });
                assert_eq!(rows.len(), usize::from(expected), "{source:?} {destination:?}");
            }
        }
    }

    #[test]
    fn what_lies_behind_an_ipv4_address_is_nothing() {
        let mut bytes = answer(("127.0.0.1", 4), ("127.0.0.1", 4), state::ESTABLISHED);
        bytes[SOURCE + 4..SOURCE + 16].fill(0xaa);
        assert!(ANY.wants(&bytes));
    }

    #[test]
    fn a_match_has_every_field() {
        let mut time_wait = answer(("::1", 40_000), ("::1", 40_000), state::TIME_WAIT);
        time_wait[2] = 3;
        time_wait[EXPIRES_MS].copy_from_slice(&59_876_u32.to_ne_bytes());
        let expected = Row {
            source: ("::1".parse().unwrap(), 40_000),
            destination: ("::1".parse().unwrap(), 40_000),
            state: state::TIME_WAIT,
            ifindex: 3,
            cookie: Some(0x9abc_1234_5678),
            inode: 4_711,
            uid: 1_000,
            time_wait_left: Some(Duration::from_millis(59_876)),
        };
        assert_eq!(parse(&time_wait).unwrap(), expected);
        time_wait[2] = 1;
        assert_eq!(parse(&time_wait).unwrap().time_wait_left, None, "the time of another timer");
    }

    #[test]
    fn a_dump_ends_or_fails_as_the_kernel_says() {
        let socket = message(SOCK_DIAG_BY_FAMILY, 2, &answer(("::1", 4), ("::1", 4), state::ESTABLISHED));
        let disturbed = message(
            SOCK_DIAG_BY_FAMILY,
            2 | NLM_F_DUMP_INTR,
            &answer(("::1", 4), ("::1", 4), state::CLOSING),
        );
        let done = message(NLMSG_DONE, 2, &0_i32.to_ne_bytes());
        let failed = message(NLMSG_DONE, 2, &(-2_i32).to_ne_bytes());
        let mut refused = (-1_i32).to_ne_bytes().to_vec();
        refused.extend([0; 16]);
        let refused = message(NLMSG_ERROR, 0, &refused);
        for (bytes, expected, count) in [
            ([&socket[..], &socket].concat(), Ok(Taken::More { disturbed: false }), 2),
            ([&socket[..], &done].concat(), Ok(Taken::All { disturbed: false }), 1),
            ([&disturbed[..], &done].concat(), Ok(Taken::All { disturbed: true }), 1),
            (message(NLMSG_DONE, 2, &[]), Ok(Taken::All { disturbed: false }), 0),
            (message(NLMSG_OVERRUN, 0, &[]), Ok(Taken::More { disturbed: true }), 0),
            (failed, Err(Some(2)), 0),
            (refused, Err(Some(1)), 0),
            (socket[..socket.len() - 8].to_vec(), Err(None), 0),
            (vec![1, 2, 3], Err(None), 0),
            (vec![], Ok(Taken::More { disturbed: false }), 0),
        ] {
            let mut rows = Vec::new();
            let outcome = ANY.take(&bytes, &mut rows).map_err(|error| error.raw_os_error());
            assert_eq!((outcome, rows.len()), (expected, count), "{bytes:?}");
        }
    }

    #[test]
    fn a_request_is_what_the_kernel_takes() {
        let bytes = ANY.encode(Some(&vec![1, 4, 4, 0]));
        assert_eq!(bytes.len(), 16 + 56 + 4 + 4);
        assert_eq!(bytes[..4], 80_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        assert_eq!(bytes[6..8], 0x301_u16.to_ne_bytes());
        assert_eq!(bytes[16..20], [AF_INET, IPPROTO_TCP, 0, 0]);
        assert_eq!(bytes[20..24], STATES.to_ne_bytes());
        assert_eq!(bytes[24..72], [0; 48]);
        assert_eq!(bytes[76..], [1, 4, 4, 0]);
        assert_eq!(DIALS.encode(None).len(), 16 + 56);
    }
}
