//! TCP segments of a self-connection as bytes and as fields, and the file format pcap. Pure.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde::Serialize;

/// A captured packet, from its IP header on.
pub(super) struct Packet {
    pub(super) segment: CapturedSegment,
    pub(super) bytes: Vec<u8>,
}

/// The fields of a segment whose source is its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct CapturedSegment {
    #[serde(skip)]
    pub(super) endpoint: SocketAddr,
    #[serde(skip)]
    pub(super) time: Duration,
    /// Nanoseconds since the first segment.
    pub(super) time_ns: u64,
    pub(super) seq: u32,
    /// `None`: the segment has no ACK flag.
    pub(super) ack: Option<u32>,
    pub(super) syn: bool,
    pub(super) fin: bool,
    pub(super) rst: bool,
    /// Bytes of data.
    pub(super) len: usize,
}

const TCP: u8 = 6;
const IPV6_HEADER: usize = 40;

impl CapturedSegment {
    /// `None`: another protocol, a fragment, a broken header, or two different ends.
    pub(super) fn parse(packet: &[u8], time: Duration) -> Option<Self> {
        let half =
            |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let address = |at: usize, len: usize| -> Option<IpAddr> {
            let bytes = packet.get(at..at + len)?;
            <[u8; 4]>::try_from(bytes)
                .map(IpAddr::from)
                .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
                .ok()
        };
        let (protocol, source, destination, begin, end) = match packet.first()? >> 4 {
            4 => {
                let header = usize::from(packet[0] & 0xf) * 4;
                let is_fragment = half(packet, 6)? & 0x3fff != 0;
                let protocol = packet.get(9).filter(|_| !is_fragment)?;
                (protocol, address(12, 4)?, address(16, 4)?, header, usize::from(half(packet, 2)?))
            }
            6 => {
                let end = IPV6_HEADER + usize::from(half(packet, 4)?);
                (packet.get(6)?, address(8, 16)?, address(24, 16)?, IPV6_HEADER, end)
            }
            _ => return None,
        };
        let tcp = packet.get(begin..end)?;
        let (sport, dport) = (half(tcp, 0)?, half(tcp, 2)?);
        if *protocol != TCP || source != destination || sport != dport {
            return None;
        }
        let word = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
        let flags = *tcp.get(13)?;
        let has = |bit: u8| flags & bit != 0;
        Some(Self {
            endpoint: SocketAddr::new(source, sport),
            time,
            time_ns: 0,
            seq: word(4)?,
            ack: word(8).filter(|_| has(0x10)),
            syn: has(0x02),
            fin: has(0x01),
            rst: has(0x04),
            len: tcp.len().checked_sub(usize::from(tcp[12] >> 4) * 4)?,
        })
    }

    /// The flags as a person names the segment.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self { rst: true, .. } => "RST",
            Self { syn: true, ack: None, .. } => "SYN",
            Self { syn: true, .. } => "SYN+ACK",
            Self { fin: true, .. } => "FIN",
            Self { len: 0, .. } => "ACK",
            _ => "data",
        }
    }
}

/// True if nothing more comes: a FIN and its acknowledgement are there, or a RST.
pub(super) fn has_end(packets: &[Packet]) -> bool {
    let segments = || packets.iter().map(|packet| &packet.segment);
    let is_acknowledged = |fin: &CapturedSegment| {
        let end = fin.seq.wrapping_add(fin.len as u32).wrapping_add(1);
        segments().any(|segment| segment.ack == Some(end))
    };
    segments().any(|segment| segment.rst || (segment.fin && is_acknowledged(segment)))
}

/// The segments with their time since the first one.
pub(super) fn segments(packets: &[Packet]) -> Vec<CapturedSegment> {
    let first = packets.first().map_or(Duration::ZERO, |packet| packet.segment.time);
    let since = |time: Duration| time.saturating_sub(first).as_nanos().try_into().unwrap_or(u64::MAX);
    let relative =
        |packet: &Packet| CapturedSegment { time_ns: since(packet.segment.time), ..packet.segment.clone() };
    packets.iter().map(relative).collect()
}

/// A file for Wireshark and tcpdump: the format pcap with nanoseconds, in the byte order of big endian.
/// <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html>
pub(super) fn pcap(packets: &[Packet]) -> Vec<u8> {
    const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
    const SNAP_LENGTH: u32 = 262_144;
    /// Packets begin with the header of IPv4 or IPv6.
    const LINKTYPE_RAW: u32 = 101;
    let mut file =
        [&MAGIC_NANOSECONDS.to_be_bytes()[..], &2_u16.to_be_bytes(), &4_u16.to_be_bytes()].concat();
    let put_words =
        |words: [u32; 4], file: &mut Vec<u8>| file.extend(words.map(u32::to_be_bytes).as_flattened());
    put_words([0, 0, SNAP_LENGTH, LINKTYPE_RAW], &mut file);
    for Packet { segment, bytes } in packets {
        let length = bytes.len() as u32;
        // Seconds are unsigned: until 2106.
        put_words([segment.time.as_secs() as u32, segment.time.subsec_nanos(), length, length], &mut file);
        file.extend(bytes);
    }
    file
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A segment of 127.0.0.1:40029 or `[::1]:40029` to itself.
    fn packet(is_ipv6: bool, flags: u8, data: &[u8]) -> Vec<u8> {
        let port = 40_029_u16.to_be_bytes();
        let mut tcp = [&port[..], &port, &1_000_u32.to_be_bytes(), &2_000_u32.to_be_bytes()].concat();
        tcp.extend([0x60, flags, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]);
        tcp.extend(data);
        let length = tcp.len() as u16;
        let mut packet = match is_ipv6 {
            false => {
                let mut header = vec![0x45, 0];
                header.extend((20 + length).to_be_bytes());
                header.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1]);
                header
            }
            true => {
                let mut header = vec![0x60, 0, 0, 0];
                header.extend(length.to_be_bytes());
                header.extend([6, 64]);
                for _ in 0..2 {
                    header.extend(std::net::Ipv6Addr::LOCALHOST.octets());
                }
                header
            }
        };
        packet.extend(tcp);
        packet
    }

    pub(in crate::commands::repro) fn segment(flags: u8, len: usize) -> CapturedSegment {
        CapturedSegment::parse(&packet(false, flags, &vec![0; len]), Duration::ZERO).unwrap()
    }

    #[test]
    fn the_fields_of_both_families_are_read() {
        for is_ipv6 in [false, true] {
            let parse = |flags, data: &[u8]| {
                CapturedSegment::parse(&packet(is_ipv6, flags, data), Duration::ZERO).unwrap()
            };
            let data = parse(0x18, b"hello");
            assert_eq!((data.seq, data.ack, data.len, data.kind()), (1_000, Some(2_000), 5, "data"));
            assert_eq!((data.endpoint.port(), data.endpoint.is_ipv6()), (40_029, is_ipv6));
            for (flags, kind) in
                [(0x02, "SYN"), (0x12, "SYN+ACK"), (0x10, "ACK"), (0x11, "FIN"), (0x14, "RST")]
            {
                assert_eq!(parse(flags, &[]).kind(), kind);
            }
            assert_eq!(parse(0x02, &[]).ack, None);
        }
    }

    #[test]
    fn what_is_no_whole_segment_of_a_self_connection_is_none() {
        let parse = |packet: &[u8]| CapturedSegment::parse(packet, Duration::ZERO);
        for is_ipv6 in [false, true] {
            let good = packet(is_ipv6, 0x10, b"x");
            assert!(parse(&good).is_some());
            for length in 0..good.len() {
                assert_eq!(parse(&good[..length]), None, "{length} bytes");
            }
            let header = if is_ipv6 { 40 } else { 20 };
            let changed = |at: usize, value: u8| {
                let mut packet = good.clone();
                packet[at] = value;
                parse(&packet)
            };
            // Another version, protocol, address or port; a header that is longer than the segment.
            for (at, value) in
                [(0, 0x10), (if is_ipv6 { 6 } else { 9 }, 17), (15, 9), (header, 1), (header + 12, 0xf0)]
            {
                assert_eq!(changed(at, value), None, "byte {at}");
            }
        }
        let mut fragment = packet(false, 0x10, b"x");
        fragment[6] = 0x20;
        assert_eq!(parse(&fragment), None);
    }

    #[test]
    fn a_fin_and_its_acknowledgement_are_the_end_or_a_rst() {
        let packet = |(flags, seq, ack)| {
            let segment = CapturedSegment { seq, ack: Some(ack), ..segment(flags, 0) };
            Packet { segment, bytes: vec![] }
        };
        for (segments, is_end) in [
            (&[][..], false),
            (&[(0x10, 25, 26)], false),
            (&[(0x11, 25, 25)], false),
            (&[(0x11, 25, 25), (0x10, 25, 25)], false),
            (&[(0x11, 25, 25), (0x10, 26, 26)], true),
            (&[(0x10, 26, 26), (0x11, 25, 25)], true),
            (&[(0x11, u32::MAX, u32::MAX), (0x10, 0, 0)], true),
            (&[(0x14, 25, 25)], true),
        ] {
            let packets: Vec<_> = segments.iter().copied().map(packet).collect();
            assert_eq!(has_end(&packets), is_end, "{segments:?}");
        }
    }

    #[test]
    fn a_pcap_file_has_a_header_and_each_packet_with_its_time() {
        let bytes = packet(false, 0x02, &[]);
        let time = Duration::new(0x6543_2101, 999_999_999);
        let segment = CapturedSegment::parse(&bytes, time).unwrap();
        let file = pcap(&[Packet { segment, bytes: bytes.clone() }]);
        let word = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(4), word(16), word(20)], [0xa1b2_3c4d, 0x0002_0004, 262_144, 101]);
        assert_eq!([word(24), word(28), word(32), word(36)], [0x6543_2101, 999_999_999, 44, 44]);
        assert_eq!(file[40..], bytes);
        assert_eq!(pcap(&[]).len(), 24);
    }
}
