//! The kernel's socket tables: which self-connections exist now, in every network namespace, and who holds them.
//!
//! Yields what the tables say at one moment. It opens no event and closes none; that is for whoever compares surveys.
//! A table is no snapshot: a socket that is hashed or unhashed while its own bucket is being read may be missing, so
//! that one absence proves nothing.
//!
//! Not seen: a namespace that only threads other than a process's first are in, unless the caller knows one of them
//! (`/proc/PID/task/*/ns/net` would have to be read for every thread of the host, which is too dear), one that nothing
//! but an open descriptor keeps, and one that is mounted in another mount namespace only.

use std::{collections::HashSet, io, net::IpAddr, panic, thread, time::Duration};

use selfconn_ebpf::state;

use crate::clock;

mod destroy;
mod diag;
mod exact;
mod filter;
mod holders;
mod listeners;
mod namespaces;
mod procfs;

pub use destroy::{Target, can_destroy, can_enter, destroy, destroy_all, look_up};
pub use exact::Cookie;
pub use holders::{Holders, Search, holders};
pub use listeners::{Inspected, Listener, Which, inspect};
pub use namespaces::{Namespace, within};

/// What helps where another process may not be looked into.
const NEEDS_PTRACE: &str = "looking into them needs CAP_SYS_PTRACE, which root has";

/// What to look for, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// List dials in flight, too; it takes another walk through each table.
    pub dials: bool,
    /// Read `/proc/net/tcp` although sock_diag may be there.
    pub procfs_only: bool,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Survey {
    /// Each self-connection once, TIME_WAIT included.
    pub found: Vec<Found>,
    /// Dials in flight from an address to itself; empty unless asked for.
    pub dials: Vec<Dial>,
    /// The inodes of the network namespaces that were read.
    pub namespaces: HashSet<u32>,
    /// What could not be seen, and why; a line for people each.
    pub unseen: Vec<String>,
    /// Why `/proc/net/tcp` was read instead of asking sock_diag, so that cookies and interfaces are unknown.
    pub without_sock_diag: Option<String>,
    /// When reading began: `CLOCK_BOOTTIME`, nanoseconds. What was made later may be missing.
    pub began_ns: u64,
    /// And when it ended. What ended earlier may be listed.
    pub ended_ns: u64,
}

/// A self-connection in a socket table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Source and destination address; IPv4 also where the socket is IPv6 and the address v4-mapped.
    pub addr: IpAddr,
    /// Source and destination port.
    pub port: u16,
    /// Whether the socket is IPv6.
    pub is_ipv6: bool,
    /// One of [`state`].
    pub state: u8,
    /// Inode of the network namespace.
    pub netns: u32,
    /// The interface of a link-local address; procfs doesn't tell.
    pub ifindex: Option<u32>,
    /// The socket cookie; procfs doesn't tell.
    pub cookie: Option<u64>,
    /// The socket's inode, by which its holders are known. 0: no process holds it, as in TIME_WAIT.
    pub inode: u64,
    /// Whose the socket is, where it has an inode; the kernel says 0 for all others.
    pub uid: Option<u32>,
    /// For how long TIME_WAIT still holds the port. `None`: it is not in TIME_WAIT.
    pub time_wait_left: Option<Duration>,
}

/// A socket in SYN_SENT whose two addresses are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dial {
    /// Inode of the network namespace.
    pub netns: u32,
    /// As in [`Found`].
    pub addr: IpAddr,
    /// Destination port.
    pub dport: u16,
    /// Whether the socket is IPv6.
    pub is_ipv6: bool,
}

/// Reads the socket tables of all network namespaces that can be found and entered. It works on a thread of its own
/// and returns when that is done; the caller's namespace stays what it is. Namespaces that only threads are in are found
/// by those `near`, thread ids as this process's `/proc` has them.
///
/// # Errors
/// When there can be no thread.
pub fn survey(options: Options, near: &[u32]) -> io::Result<Survey> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespaces".to_owned());
        let thread = thread.spawn_scoped(scope, move || visit_all(options, near))?;
        Ok(thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause)))
    })
}

/// Every parser of text here, for whatever bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let _ = namespaces::mounted(bytes);
    let _ = std::str::from_utf8(bytes).map(|line| procfs::parse(line, |_, _, _| true));
}

/// To be called on a thread that ends afterwards, for it stays in the last namespace.
fn visit_all(options: Options, near: &[u32]) -> Survey {
    let mut survey = Survey { began_ns: clock::boot_ns(), ..Survey::default() };
    let mut tables = Tables::new(options.procfs_only);
    let visited = namespaces::visit(near, |&Namespace { inode: netns, .. }| {
        tables.read(options.dials)?;
        let mut cookies = HashSet::new();
        for row in &tables.rows {
            if row.is_dial() && options.dials {
                survey.dials.push(row.dial(netns));
            }
            // A chain that changes under the reader can show a socket twice.
            if row.is_self() && row.cookie.is_none_or(|cookie| cookies.insert(cookie)) {
                survey.found.push(row.found(netns));
            }
        }
        Ok(())
    });
    survey.namespaces = visited.namespaces;
    survey.unseen = visited.unseen;
    survey.without_sock_diag = tables.without_diag;
    survey.dials.sort_unstable_by_key(|dial| (dial.netns, dial.addr, dial.dport, dial.is_ipv6));
    survey.dials.dedup();
    survey.ended_ns = clock::boot_ns();
    survey
}

/// The tables of whatever namespace the calling thread is in.
struct Tables {
    /// `None`: not wanted, or this kernel has none. It isn't asked again then, for each time the kernel would run
    /// modprobe.
    diag: Option<diag::Reader>,
    without_diag: Option<String>,
    rows: Vec<Row>,
}

impl Tables {
    fn new(procfs_only: bool) -> Self {
        let diag = (!procfs_only).then(diag::Reader::new);
        Self { diag, without_diag: None, rows: Vec::new() }
    }

    /// Fills `rows`.
    fn read(&mut self, dials: bool) -> io::Result<()> {
        self.fill(|diag, rows| diag.read(dials, rows), procfs::read)
    }

    /// Fills `rows` with the listeners.
    fn read_listeners(&mut self) -> io::Result<()> {
        self.fill(diag::Reader::read_listeners, procfs::read_listeners)
    }

    /// Whatever sock_diag fails of, procfs is asked instead.
    fn fill(
        &mut self,
        by_diag: impl Fn(&mut diag::Reader, &mut Vec<Row>) -> io::Result<()>,
        by_procfs: impl Fn(&mut Vec<Row>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.rows.clear();
        if let Some(diag) = &mut self.diag {
            match by_diag(diag, &mut self.rows) {
                Ok(()) => return Ok(()),
                Err(error) => self.without_diag = Some(error.to_string()),
            }
            self.diag = None;
            self.rows.clear();
        }
        by_procfs(&mut self.rows)
    }
}

/// The states that are listed, as a mask: all in which a socket can be connected, or is about to be. Without LISTEN
/// the kernel leaves the table of listeners alone.
const STATES: u32 = {
    let all = (1 << (state::CLOSING + 1)) - 1;
    all & !(1 | 1 << state::CLOSE | 1 << state::LISTEN)
};

/// What either table says about a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    state: u8,
    ifindex: u32,
    cookie: Option<u64>,
    inode: u64,
    uid: u32,
    time_wait_left: Option<Duration>,
}

impl Row {
    fn is_self(&self) -> bool {
        self.source == self.destination && self.source.1 != 0 && STATES & 1 << self.state != 0
    }

    fn is_dial(&self) -> bool {
        self.source.0 == self.destination.0 && self.state == state::SYN_SENT
    }

    fn found(&self, netns: u32) -> Found {
        let (addr, port) = self.source;
        Found {
            addr: addr.to_canonical(),
            port,
            is_ipv6: addr.is_ipv6(),
            state: self.state,
            netns,
            ifindex: self.link_local_ifindex(),
            cookie: self.cookie,
            inode: self.inode,
            uid: (self.inode != 0).then_some(self.uid),
            time_wait_left: self.time_wait_left,
        }
    }

    fn link_local_ifindex(&self) -> Option<u32> {
        let is_link_local = matches!(self.source.0, IpAddr::V6(addr) if addr.is_unicast_link_local());
        (self.ifindex != 0 && is_link_local).then_some(self.ifindex)
    }

    fn dial(&self, netns: u32) -> Dial {
        let (addr, dport) = self.destination;
        Dial { netns, addr: addr.to_canonical(), dport, is_ipv6: addr.is_ipv6() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn row(source: &str, destination: &str, state: u8) -> Row {
        let end = |text: &str| {
            let end: std::net::SocketAddr = text.parse().unwrap();
            (end.ip(), end.port())
        };
        Row {
            source: end(source),
            destination: end(destination),
            state,
            ifindex: 3,
            cookie: Some(9),
            inode: 0,
            uid: 0,
            time_wait_left: None,
        }
    }

    #[test]
    fn ours_are_those_whose_source_is_their_destination() {
        for (source, destination, state, is_self, is_dial) in [
            ("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED, true, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::TIME_WAIT, true, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::SYN_SENT, true, true),
            ("[::1]:4", "[::1]:4", state::CLOSING, true, false),
            ("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::SYN_RECV, true, false),
            ("127.0.0.1:5", "127.0.0.1:4", state::SYN_SENT, false, true),
            ("127.0.0.1:5", "127.0.0.1:4", state::ESTABLISHED, false, false),
            ("127.0.0.1:4", "127.0.0.2:4", state::SYN_SENT, false, false),
            ("0.0.0.0:0", "0.0.0.0:0", state::LISTEN, false, false),
            ("0.0.0.0:0", "0.0.0.0:0", state::ESTABLISHED, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::CLOSE, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::LISTEN, false, false),
        ] {
            let row = row(source, destination, state);
            let what = format!("{source} {destination} {}", state::name(state));
            assert_eq!((row.is_self(), row.is_dial()), (is_self, is_dial), "{what}");
        }
    }

    #[test]
    fn an_interface_belongs_to_a_link_local_address_and_a_user_to_an_inode() {
        let local = row("[fe80::1]:4", "[fe80::1]:4", state::ESTABLISHED).found(1);
        assert_eq!((local.ifindex, local.uid), (Some(3), None));
        let held =
            Row { inode: 5, ..row("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::ESTABLISHED) };
        let held = held.found(1);
        assert_eq!((held.ifindex, held.uid, held.is_ipv6), (None, Some(0), true));
        assert_eq!(held.addr, IpAddr::from([127, 0, 0, 1]));
    }

    #[test]
    fn a_survey_leaves_the_callers_namespace_alone() {
        let own = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = own();
        let survey = survey(Options::default(), &[]).unwrap();
        assert_eq!(own(), before);
        assert!(!survey.namespaces.is_empty(), "{survey:?}");
        assert!(survey.began_ns < survey.ended_ns);
    }
}
