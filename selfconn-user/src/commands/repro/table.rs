//! What the kernel's own table (`/proc/net/tcp` and `tcp6`, of this network namespace) says about a port, and
//! which process holds a socket of it. Good enough for one port now and then; it is no way to watch a host.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// The kernel prints timers in this unit, on every architecture that Rust's BPF tools run on.
const TICKS_PER_SECOND: u64 = 100;

const IPV4: &str = "/proc/net/tcp";
const IPV6: &str = "/proc/net/tcp6";

/// The file that lists a socket with this end. An IPv4-mapped one is an IPv6 socket.
pub(super) fn table_of(endpoint: SocketAddr) -> &'static str {
    if endpoint.is_ipv4() { IPV4 } else { IPV6 }
}

/// A TCP state under the kernel's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(super) struct State(pub(super) &'static str);

impl State {
    pub(super) const ESTABLISHED: Self = Self("ESTABLISHED");
    pub(super) const TIME_WAIT: Self = Self("TIME_WAIT");
    pub(super) const LISTEN: Self = Self("LISTEN");
}

/// In the order of the kernel's numbers, which start at 1.
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

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) state: State,
    /// Until the running timer fires; for a TIME_WAIT until it is gone.
    pub(super) timer: Duration,
    inode: u64,
}

impl Row {
    /// The process that holds this socket open, as far as this process may see: name and pid.
    pub(super) fn holder(&self) -> Option<String> {
        let socket = format!("socket:[{}]", self.inode);
        let numbered = |entry: &fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
        // A TIME_WAIT belongs to nobody and has the inode 0.
        let pid = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| numbered(&entry)).find(|pid| {
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

/// The self-connection of this endpoint, if the table has it.
pub(super) fn self_connection(endpoint: SocketAddr) -> Result<Option<Row>> {
    let is_ours = |row: &Row| row.local == row.remote && same_address(row.local.ip(), endpoint.ip());
    Ok(rows(table_of(endpoint), endpoint.port())?.into_iter().find(is_ours))
}

/// What keeps this endpoint from being bound, for people: the listener if there is one.
pub(super) fn blocker(endpoint: SocketAddr) -> Result<Option<Row>> {
    let mut found = rows(IPV4, endpoint.port())?;
    // A kernel without IPv6 has no such table.
    found.extend(rows(IPV6, endpoint.port()).unwrap_or_default());
    found.retain(|row| row.local.ip().is_unspecified() || same_address(row.local.ip(), endpoint.ip()));
    found.sort_by_key(|row| (row.state != State::LISTEN, row.state != State::TIME_WAIT));
    Ok(found.into_iter().next())
}

/// An IPv4 socket and the IPv4-mapped one of the same address take the same ports.
fn same_address(one: IpAddr, other: IpAddr) -> bool {
    one.to_canonical() == other.to_canonical()
}

fn rows(path: &str, port: u16) -> Result<Vec<Row>> {
    let read = || -> io::Result<Vec<Row>> {
        let mut rows = Vec::new();
        for line in BufReader::new(File::open(path)?).lines() {
            rows.extend(row(&line?).filter(|row| row.local.port() == port));
        }
        Ok(rows)
    };
    read().with_context(|| format!("cannot read {path}"))
}

fn row(line: &str) -> Option<Row> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = endpoint(words.next()?)?;
    let remote = endpoint(words.next()?)?;
    let number = usize::from_str_radix(words.next()?, 16).ok()?;
    let state = *STATES.get(number.checked_sub(1)?)?;
    let (_, ticks) = words.nth(1)?.split_once(':')?;
    let timer = Duration::from_millis(u64::from_str_radix(ticks, 16).ok()? * 1000 / TICKS_PER_SECOND);
    let inode = words.nth(3)?.parse().ok()?;
    Some(Row { local, remote, state, timer, inode })
}

/// `0100007F:9C5D`: the address as numbers of 32 bits in the machine's order, the port as a number.
fn endpoint(text: &str) -> Option<SocketAddr> {
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
    fn rows_are_read_as_the_kernel_prints_them() {
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
            let got = row(line);
            let want = want.map(|(local, remote, state, ms, inode)| Row {
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
    fn a_listener_is_found_and_named_as_this_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let row = blocker(listener.local_addr().unwrap()).unwrap().unwrap();
        assert_eq!(row.state, State::LISTEN);
        assert!(row.holder().unwrap().ends_with(&format!("(pid {})", std::process::id())));
        assert_eq!(self_connection(listener.local_addr().unwrap()).unwrap(), None);
    }
}
