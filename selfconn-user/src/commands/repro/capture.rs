//! Captures the segments of this process's own self-connection on `lo`, by a packet socket. A classic BPF filter
//! passes only TCP segments whose source is their destination, and only those of its port, so refused attempts
//! and other connections do not fill the buffer.
//!
//! The kernel hands a packet socket each packet of `lo` twice, when it leaves and when it comes back. As tcpdump
//! does, this keeps the second one: then the segment has reached the socket.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    os::fd::AsRawFd as _,
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};

use super::segment::{CapturedSegment, Packet};

/// The index of `lo` in every network namespace: `LOOPBACK_IFINDEX`, include/net/flow.h at v6.12.
const LO_IFINDEX: libc::c_int = 1;
/// Longer than every segment on `lo`, whose MTU is at most 65,536.
const SNAP_LENGTH: usize = 0x1_0000 + 64;
/// `SIOCGSTAMPNS`: when the last received packet came. include/uapi/asm-generic/sockios.h at v6.12.
const SIOCGSTAMPNS: libc::Ioctl = 0x8907;

/// A packet socket. It receives from [`Self::begin`] on.
pub(super) struct Capture(Socket);

impl Capture {
    /// # Errors
    /// Without CAP_NET_RAW in this network namespace, or on a kernel without packet sockets.
    pub(super) fn open() -> io::Result<Self> {
        // Without a protocol nothing arrives before the filter is attached.
        let socket =
            Socket::new(Domain::PACKET, Type::DGRAM.cloexec().nonblocking(), Some(Protocol::from(0)))?;
        Ok(Self(socket))
    }

    /// Captures self-connections of this port. Called before the first connect.
    pub(super) fn begin(&self, port: u16) -> io::Result<()> {
        self.0.attach_filter(&filter(port))?;
        self.0.bind(&lo_address())?;
        // The first request makes the kernel stamp packets from now on. It fails, because none has come yet.
        let _ = stamp(&self.0);
        Ok(())
    }

    /// The packets of this self-connection that have arrived until now.
    pub(super) fn packets(&self, endpoint: SocketAddr) -> io::Result<Vec<Packet>> {
        let mut packets = Vec::new();
        let mut buffer = vec![0; SNAP_LENGTH];
        loop {
            let length = match (&self.0).read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(packets),
                Err(error) => return Err(error),
            };
            let time = stamp(&self.0)?;
            let bytes = &buffer[..length];
            if let Some(segment) = CapturedSegment::parse(bytes, time).filter(|is| is.endpoint == endpoint) {
                packets.push(Packet { segment, bytes: bytes.to_owned() });
            }
        }
    }
}

/// When the last received packet came, since 1970.
fn stamp(socket: &Socket) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: this request writes a struct timespec, which lives on.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSTAMPNS, &raw mut time) } {
        0 => Ok(Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Every protocol on `lo`. The filter selects.
fn lo_address() -> SockAddr {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: LO_IFINDEX,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a sockaddr_ll is an address of its family, and is shorter than the storage.
    unsafe {
        *storage.view_as::<libc::sockaddr_ll>() = address;
        SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    }
}

/// Passes TCP segments that came in, from this port to this port, and whose addresses are equal; of IPv6
/// addresses it compares the last 32 bits. Our own segments have no IP options and no extension headers.
fn filter(port: u16) -> Vec<SockFilter> {
    // include/uapi/linux/{bpf_common,filter}.h and if_packet.h at v6.12.
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const TO_X: u16 = 0x07;
    const AND: u16 = 0x54;
    const IF_EQUAL: u16 = 0x15;
    const IF_EQUAL_X: u16 = 0x1d;
    const RETURN: u16 = 0x06;
    const PACKET_TYPE: u32 = 0xffff_f000 + 4;
    const PACKET_HOST: u32 = 0;
    const TCP: u32 = 6;
    let port = u32::from(port);
    let rows: [(u16, u32); 28] = [
        (LOAD_BYTE, PACKET_TYPE),
        (IF_EQUAL, PACKET_HOST),
        (LOAD_BYTE, 0),
        // IPv4 with a header of 20 bytes; else the rows of IPv6.
        (IF_EQUAL, 0x45),
        (LOAD_BYTE, 9),
        (IF_EQUAL, TCP),
        (LOAD_WORD, 12),
        (TO_X, 0),
        (LOAD_WORD, 16),
        (IF_EQUAL_X, 0),
        (LOAD_HALF, 20),
        (IF_EQUAL, port),
        (LOAD_HALF, 22),
        (IF_EQUAL, port),
        (RETURN, u32::MAX),
        (AND, 0xf0),
        (IF_EQUAL, 0x60),
        (LOAD_BYTE, 6),
        (IF_EQUAL, TCP),
        (LOAD_WORD, 20),
        (TO_X, 0),
        (LOAD_WORD, 36),
        (IF_EQUAL_X, 0),
        (LOAD_HALF, 40),
        (IF_EQUAL, port),
        (LOAD_HALF, 42),
        (IF_EQUAL, port),
        (RETURN, u32::MAX),
    ];
    const IS_IPV4: usize = 3;
    const IPV6_BEGINS: usize = 15;
    let row = |(at, (code, value)): (usize, (u16, u32))| {
        // A comparison that fails goes to the last row, which drops the packet.
        let other = if at == IS_IPV4 { IPV6_BEGINS } else { rows.len() };
        let skip = match code {
            IF_EQUAL | IF_EQUAL_X => (other - at - 1) as u8,
            _ => 0,
        };
        SockFilter::new(code, 0, skip, value)
    };
    rows.into_iter().enumerate().map(row).chain([SockFilter::new(RETURN, 0, 0, 0)]).collect()
}
