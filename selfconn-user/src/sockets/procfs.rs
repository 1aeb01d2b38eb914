//! Reads the socket table of one network namespace from `/proc/net/tcp` and `tcp6`, for kernels without
//! sock_diag. This is slower by an order of magnitude, and provides no cookies and no interfaces.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use selfconn_ebpf::BindOptions;

use super::{
    entry::{DumpedSocket, SocketEntry, dumped_endpoint},
    limit::RowSink,
};

/// The files show the network namespace of the calling thread.
const IPV4: &str = "/proc/thread-self/net/tcp";
const IPV6: &str = "/proc/thread-self/net/tcp6";

/// `USER_HZ`, the unit of the timers in these files.
const TICKS_PER_SECOND: u64 = 100;

/// The number of the timer that runs in TIME_WAIT (`get_timewait4_sock`, net/ipv4/tcp_ipv4.c at v5.10).
const TIME_WAIT_TIMER: &str = "03";

/// `TCP_LISTEN` as printed in these files.
const LISTEN: &str = "0A";

/// Appends the sockets whose two addresses are equal.
pub(super) fn read(rows: &mut impl RowSink) -> io::Result<()> {
    read_files(rows, |line| parse(line, |source, destination, _| source == destination))
}

/// Appends the listeners.
pub(super) fn read_listeners(rows: &mut impl RowSink) -> io::Result<()> {
    read_files(rows, |line| parse(line, |_, _, state| state == LISTEN))
}

/// Appends the sockets with this local port, in any state.
pub(super) fn read_port(port: u16, rows: &mut impl RowSink) -> io::Result<()> {
    read_files(rows, |line| parse(line, |_, _, _| true).filter(|row| row.entry.endpoint.port == port))
}

fn read_files(rows: &mut impl RowSink, parse: impl Fn(&str) -> Option<DumpedSocket>) -> io::Result<()> {
    read_file(IPV4, rows, &parse)?;
    match read_file(IPV6, rows, &parse) {
        // The kernel has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn read_file(
    path: &str,
    rows: &mut impl RowSink,
    parse: &impl Fn(&str) -> Option<DumpedSocket>,
) -> io::Result<()> {
    let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
    let mut line = String::new();
    while file.read_line(&mut line)? != 0 {
        if let Some(row) = parse(&line) {
            rows.push(row);
        }
        line.clear();
    }
    Ok(())
}

/// Parses a line of the table if `filter` accepts its source address, destination address and state. `None`:
/// `filter` rejects the line, or it is the header line.
pub(super) fn parse(line: &str, filter: impl Fn(&str, &str, &str) -> bool) -> Option<DumpedSocket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (source, destination) = (words.next()?.split_once(':')?, words.next()?.split_once(':')?);
    let state = words.next()?;
    if !filter(source.0, destination.0, state) {
        return None;
    }
    let port = |text| u16::from_str_radix(text, 16).ok();
    let state = u8::from_str_radix(state, 16).ok()?;
    let (timer, ticks) = words.nth(1)?.split_once(':')?;
    let ticks = u64::from_str_radix(ticks, 16).ok()?;
    let uid = words.nth(1)?.parse().ok()?;
    let inode = words.nth(1)?.parse().ok()?;
    let entry = SocketEntry {
        endpoint: dumped_endpoint(address(source.0)?, port(source.1)?, 0),
        state,
        cookie: None,
        inode,
        uid: (inode != 0).then_some(uid),
        time_wait_left: (timer == TIME_WAIT_TIMER)
            .then(|| Duration::from_millis(ticks.saturating_mul(1_000 / TICKS_PER_SECOND))),
        options: BindOptions::UNKNOWN,
        sock: None,
        connect_entry: None,
        is_held: false,
        device: None,
    };
    Some(DumpedSocket {
        entry,
        destination: dumped_endpoint(address(destination.0)?, port(destination.1)?, 0),
    })
}

/// Parses an address, which the kernel prints as 32-bit numbers in the byte order of the machine.
fn address(text: &str) -> Option<IpAddr> {
    let mut bytes = [0; 16];
    for (word, bytes) in text.as_bytes().chunks(8).zip(bytes.chunks_exact_mut(4)) {
        let word = u32::from_str_radix(str::from_utf8(word).ok()?, 16).ok()?;
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    match text.len() {
        8 => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        32 => Some(Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// Runs every parser of text in this folder on arbitrary bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let _ = super::netns_search::mount_points(bytes);
    let _ = std::str::from_utf8(bytes).map(|line| parse(line, |_, _, _| true));
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use selfconn_ebpf::state;

    use super::*;
    use crate::detect::samples;

    #[test]
    fn a_line_is_parsed_as_the_kernel_prints_it() {
        let row = |source: (&str, u16), destination: (&str, u16), state, uid, inode, left_ms: Option<u64>| {
            let end = |(ip, port): (&str, u16)| dumped_endpoint(ip.parse().unwrap(), port, 0);
            let entry = SocketEntry {
                cookie: None,
                inode,
                uid,
                time_wait_left: left_ms.map(Duration::from_millis),
                ..samples::entry(end(source), state)
            };
            DumpedSocket { entry, destination: end(destination) }
        };
        let loopback = ("127.0.0.1", 40_029);
        let mapped = ("::ffff:127.0.0.1", 40_029);
        for (line, expected) in [
            (
                "   1: 0100007F:9C5D 0100007F:9C5D 01 00000000:00000000 00:00000000 00000000  1000        0 23584 2 0000000000000000 20 4 30 10 -1",
                Some(row(loopback, loopback, state::ESTABLISHED, Some(1_000), 23_584, None)),
            ),
            (
                "   1: 0100007F:9C5D 0100007F:9C5D 06 00000000:00000000 03:00001770 00000000     0        0 0 3 0000000000000000",
                Some(row(loopback, loopback, state::TIME_WAIT, None, 0, Some(60_000))),
            ),
            (
                "   2: 0000000000000000FFFF00000100007F:9C5D 0000000000000000FFFF00000100007F:9C5D 0B 00000000:00000000 01:00000014 00000000     0        0 77 1 0000000000000000",
                Some(row(mapped, mapped, state::CLOSING, Some(0), 77, None)),
            ),
            (
                "   3: 00000000000000000000000001000000:0050 00000000000000000000000001000000:0050 02 00000000:00000001 01:00000014 00000000     0        0 78 1 0",
                Some(row(("::1", 80), ("::1", 80), state::SYN_SENT, Some(0), 78, None)),
            ),
            // A connection attempt in progress.
            (
                "   4: 0100007F:9C5E 0100007F:9C5D 02 00000000:00000001 01:00000014 00000000     0        0 79 1 0",
                Some(row(("127.0.0.1", 40_030), loopback, state::SYN_SENT, Some(0), 79, None)),
            ),
            ("   5: 0100007F:9C5D 0200007F:9C5D 01 00000000:00000000 00:00000000 00000000 0 0 80 1 0", None),
            (
                "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
                None,
            ),
            ("   6: 0100007F:9C5D 0100007F:9C5D 01 00000000:00000000 00:00000000", None),
            ("   7: 0100007:9C5D 0100007:9C5D 01 0:0 00:0 0 0 0 1", None),
            ("", None),
        ] {
            let equal = parse(line, |source, destination, _| source == destination);
            assert_eq!(equal, expected, "{line}");
        }
    }

    #[test]
    fn a_listener_is_parsed_without_a_destination() {
        let is_listener = |_: &str, _: &str, state: &str| state == LISTEN;
        let line = "   0: 0100007F:9C5D 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 812 1 0";
        let row = parse(line, is_listener).unwrap();
        assert_eq!(row.entry.endpoint, dumped_endpoint("127.0.0.1".parse().unwrap(), 40_029, 0));
        assert_eq!(row.entry.inode, 812);
        let other = line.replace(" 0A ", " 01 ");
        assert_eq!(parse(&other, is_listener), None);
    }
}
