//! Reads the sockets of one port from `/proc/net/tcp` and `/proc/net/tcp6` of this network namespace, and
//! finds the process that holds a socket. This is fine for one port now and then, but too slow to watch a
//! host.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// The unit of the timers in `/proc/net/tcp` (USER_HZ), on every architecture that the BPF tools of Rust
/// support.
const TICKS_PER_SECOND: u64 = 100;

const PROC_NET_TCP: &str = "/proc/net/tcp";
const PROC_NET_TCP6: &str = "/proc/net/tcp6";

/// The file that lists a socket with this local address. A socket with an IPv4-mapped address is an IPv6
/// socket.
pub(super) fn proc_file(endpoint: SocketAddr) -> &'static str {
    if endpoint.is_ipv4() { PROC_NET_TCP } else { PROC_NET_TCP6 }
}

/// A TCP state with the name that the kernel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(super) struct State(pub(super) &'static str);

impl State {
    pub(super) const ESTABLISHED: Self = Self("ESTABLISHED");
    pub(super) const TIME_WAIT: Self = Self("TIME_WAIT");
    pub(super) const LISTEN: Self = Self("LISTEN");
}

/// The states in the order of the kernel's numbers, which start at 1.
const STATES: [State; 12] = [
    State::ESTABLISHED,
    State("SYN_SENT"),
    State("SYN_RECV"),
    State("FIN_WAIT1"),
    State("FIN_WAIT2"),
    State::TIME_WAIT,
    State("CLOSE"),
    State("CLOSE_WAIT"),
    State("LAST_ACK"),
    State::LISTEN,
    State("CLOSING"),
    State("NEW_SYN_RECV"),
];

/// A row of `/proc/net/tcp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProcTcpRow {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) state: State,
    /// The time until the running timer fires. For TIME_WAIT: until the socket is gone.
    pub(super) timer: Duration,
    inode: u64,
}

impl ProcTcpRow {
    /// Name and pid of the process that holds this socket open. `None`: not visible to this process.
    pub(super) fn holder(&self) -> Option<String> {
        let socket = format!("socket:[{}]", self.inode);
        let pid_of = |entry: &fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
        // A socket in TIME_WAIT belongs to no process and has the inode 0.
        let pid = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| pid_of(&entry)).find(|pid| {
            let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
            self.inode != 0
                && files
                    .flatten()
                    .any(|file| fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == &*socket))
        })?;
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some(format!("{} (pid {pid})", comm.trim_end_matches('\n')))
    }
}

/// The row of the self-connection with this endpoint.
pub(super) fn self_connection(endpoint: SocketAddr) -> Result<Option<ProcTcpRow>> {
    let is_ours =
        |row: &ProcTcpRow| row.local == row.remote && is_same_address(row.local.ip(), endpoint.ip());
    Ok(read_rows(proc_file(endpoint), endpoint.port())?.into_iter().find(is_ours))
}

/// The row that most likely prevents a bind of this endpoint: a listener first, then TIME_WAIT, then any
/// other.
pub(super) fn find_holder(endpoint: SocketAddr) -> Result<Option<ProcTcpRow>> {
    let mut found = read_rows(PROC_NET_TCP, endpoint.port())?;
    // A kernel without IPv6 has no such file.
    found.extend(read_rows(PROC_NET_TCP6, endpoint.port()).unwrap_or_default());
    found.retain(|row| row.local.ip().is_unspecified() || is_same_address(row.local.ip(), endpoint.ip()));
    found.sort_by_key(|row| (row.state != State::LISTEN, row.state != State::TIME_WAIT));
    Ok(found.into_iter().next())
}

/// An IPv4 socket and an IPv6 socket with the same IPv4-mapped address compete for the same ports.
fn is_same_address(one: IpAddr, other: IpAddr) -> bool {
    one.to_canonical() == other.to_canonical()
}

fn read_rows(path: &str, port: u16) -> Result<Vec<ProcTcpRow>> {
    let read = || -> io::Result<Vec<ProcTcpRow>> {
        let mut rows = Vec::new();
        for line in BufReader::new(File::open(path)?).lines() {
            rows.extend(parse_row(&line?).filter(|row| row.local.port() == port));
        }
        Ok(rows)
    };
    read().with_context(|| format!("cannot read {path}"))
}

fn parse_row(line: &str) -> Option<ProcTcpRow> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = parse_endpoint(words.next()?)?;
    let remote = parse_endpoint(words.next()?)?;
    let number = usize::from_str_radix(words.next()?, 16).ok()?;
    let state = *STATES.get(number.checked_sub(1)?)?;
    let (_, ticks) = words.nth(1)?.split_once(':')?;
    let timer = Duration::from_millis(u64::from_str_radix(ticks, 16).ok()? * 1000 / TICKS_PER_SECOND);
    let inode = words.nth(3)?.parse().ok()?;
    Some(ProcTcpRow { local, remote, state, timer, inode })
}

/// Parses `0100007F:9C5D`: the address as 32-bit numbers in host byte order, the port as a plain number.
fn parse_endpoint(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = [0; 16];
    for (word, bytes) in address.as_bytes().chunks(8).zip(bytes.chunks_exact_mut(4)) {
        let word = u32::from_str_radix(str::from_utf8(word).ok()?, 16).ok()?;
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        32 => Ipv6Addr::from(bytes).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn rows_are_parsed_as_the_kernel_prints_them() {
        let rows = [
            (
                "   1: 0100007F:9C5D 0100007F:9C5D 01 00000000:00000000 00:00000000 00000000     0        0 23584 2 0 20",
                Some(("127.0.0.1:40029", "127.0.0.1:40029", "ESTABLISHED", 0, 23584)),
            ),
            (
                "   1: 0100007F:9C5D 0100007F:9C5D 06 00000000:00000000 03:00001770 00000000     0        0 0 3 0",
                Some(("127.0.0.1:40029", "127.0.0.1:40029", "TIME_WAIT", 60_000, 0)),
            ),
            (
                "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 812 1 0",
                Some(("0.0.0.0:22", "0.0.0.0:0", "LISTEN", 0, 812)),
            ),
            (
                "   2: 0000000000000000FFFF00000100007F:9C5D 0000000000000000FFFF00000100007F:9C5D 0B \
                 00000000:00000000 01:00000014 00000000     0        0 77 1 0",
                Some(("[::ffff:127.0.0.1]:40029", "[::ffff:127.0.0.1]:40029", "CLOSING", 200, 77)),
            ),
            (
                "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
                None,
            ),
            ("   1: 0100007F:9C5D 0100007F:9C5D 0F 0:0 00:00000000 0 0 0 1", None),
            ("", None),
        ];
        for (line, want) in rows {
            let got = parse_row(line);
            let want = want.map(|(local, remote, state, ms, inode)| ProcTcpRow {
                local: local.parse().unwrap(),
                remote: remote.parse().unwrap(),
                state: State(state),
                timer: Duration::from_millis(ms),
                inode,
            });
            assert_eq!(got, want, "{line}");
        }
    }

    #[test]
    fn a_listener_is_found_with_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let row = find_holder(listener.local_addr().unwrap()).unwrap().unwrap();
        assert_eq!(row.state, State::LISTEN);
        assert!(row.holder().unwrap().ends_with(&format!("(pid {})", std::process::id())));
        assert_eq!(self_connection(listener.local_addr().unwrap()).unwrap(), None);
    }
}
