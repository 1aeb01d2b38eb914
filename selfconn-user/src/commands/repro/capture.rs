//! Captures the segments of this process's own self-connection on `lo`, by a packet socket. A classic BPF filter
//! passes only TCP segments whose source is their destination, and only those of its port, so refused attempts
//! and other connections do not fill the buffer.
//!
//! The kernel hands a packet socket each packet of `lo` twice, when it leaves and when it comes back. As tcpdump
//! does, this keeps the second one: then the segment has reached the socket.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant, SystemTime},
};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};

use super::segment::{CapturedSegment, Packet, has_end};

/// The index of `lo` in every network namespace: `LOOPBACK_IFINDEX`, include/net/flow.h at v6.12.
const LO_IFINDEX: libc::c_int = 1;
/// Longer than every segment on `lo`, whose MTU is at most 65,536.
const SNAP_LENGTH: usize = 0x1_0000 + 64;
/// `SIOCGSTAMPNS`: when the last received packet came. include/uapi/asm-generic/sockios.h at v6.12.
const SIOCGSTAMPNS: libc::Ioctl = 0x8907;
/// How long the kernel may take until it stamps packets.
const STAMPS_DEADLINE: Duration = Duration::from_secs(2);
/// How long the last segments may take after `close()`: another CPU may still have them.
const END_DEADLINE: Duration = Duration::from_millis(500);

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
        request_stamps(&self.0);
        wait_for_stamps()
    }

    /// The packets of this self-connection, which is closed.
    ///
    /// # Errors
    /// Also if the kernel had no room for some of them.
    pub(super) fn packets(&self, endpoint: SocketAddr) -> io::Result<Vec<Packet>> {
        let mut packets = Vec::new();
        let mut buffer = vec![0; SNAP_LENGTH];
        let deadline = Instant::now() + END_DEADLINE;
        loop {
            let length = match (&self.0).read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if has_end(&packets) || Instant::now() > deadline {
                        break;
                    }
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let time = stamp(&self.0)?;
            let bytes = &buffer[..length];
            if let Some(segment) = CapturedSegment::parse(bytes, time).filter(|is| is.endpoint == endpoint) {
                packets.push(Packet { segment, bytes: bytes.to_owned() });
            }
        }
        match dropped(&self.0)? {
            0 => Ok(packets),
            count => Err(io::Error::other(format!("the kernel had no room for {count} of its segments"))),
        }
    }
}

/// Number of packets that passed the filter and found the receive buffer full: `tpacket_rcv` and `packet_rcv`,
/// net/packet/af_packet.c at v6.12.
fn dropped(socket: &Socket) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: this option writes at most `length` bytes of a struct tpacket_stats, which lives on.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    match outcome {
        0 => Ok(statistics.tp_drops),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the kernel stamp packets. The request fails, because no packet has come yet.
fn request_stamps(socket: &Socket) {
    let _ = stamp(socket);
}

/// Waits until the kernel stamps packets: a worker switches that on after the first request (`net_enable_timestamp`,
/// net/core/dev.c at v6.12). The stamp of an earlier packet is the time of its reading (`sock_gettstamp`,
/// net/core/sock.c).
fn wait_for_stamps() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.connect(&socket.local_addr()?)?;
    socket.set_read_timeout(Some(STAMPS_DEADLINE))?;
    request_stamps(&socket);
    let deadline = Instant::now() + STAMPS_DEADLINE;
    while Instant::now() < deadline {
        (&socket).write_all(&[0])?;
        thread::sleep(Duration::from_millis(1));
        let before_reading = SystemTime::UNIX_EPOCH.elapsed().map_err(io::Error::other)?;
        (&socket).read_exact(&mut [0])?;
        if stamp(&socket)? < before_reading {
            return Ok(());
        }
    }
    Err(io::Error::other("the kernel does not stamp packets"))
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn packets_without_room_are_counted() {
        let Ok(Capture(socket)) = Capture::open() else { return eprintln!("skipped: only root may capture") };
        socket.set_recv_buffer_size(1).unwrap();
        assert_eq!(dropped(&socket).unwrap(), 0);
        socket.bind(&lo_address()).unwrap();
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for _ in 0..100 {
            sender.send_to(&[0; 1_000], sender.local_addr().unwrap()).unwrap();
        }
        assert!(dropped(&socket).unwrap() > 0);
    }
}
