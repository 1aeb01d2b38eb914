//! From transitions to lifetimes: each self-connection is opened once and closed once, however many witnesses saw it
//! and whatever they missed. Pure: no clock, no kernel, no I/O.
//!
//! Beside the transitions there is the kernel's own socket table, read now and then: what it has and the hooks missed
//! is opened, what it no longer has is closed.
//!
//! Two programs may report the same transition. They run one after the other under the socket's lock, so in the ring
//! buffer the records of one socket are in order, each there once or twice or, where a witness lost it, not at all.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, Ipv6Addr},
};

use selfconn_ebpf::{COMM_LEN, Opener, Task, Transition, family, state};

mod table;
#[cfg(test)]
mod tests;

pub use table::{Listed, Place};

/// TIME_WAIT lasts this long: `TCP_TIMEWAIT_LEN`, include/net/tcp.h at v5.10, a constant of the kernel.
pub const TIME_WAIT_NS: u64 = 60_000_000_000;

/// For how long the second witness's report of a socket's end is still taken for that, rather than for news of the
/// next socket at the same address.
const ECHO_NS: u64 = 5_000_000_000;

/// Kernel errnos that tell how a socket ended.
const ECONNABORTED: u32 = 103;
const ECONNRESET: u32 = 104;

/// How it came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The hooks saw it.
    Live,
    /// It was found in the socket table.
    Scan,
}

/// One self-connection, with what is known of it so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Counts from 1 in this run; with the run's own mark it makes the `id` of the events.
    pub number: u64,
    /// How it came to be known.
    pub source: Source,
    /// The socket cookie.
    pub cookie: Option<u64>,
    /// Source and destination address; IPv4 also where the socket is IPv6 and the address v4-mapped.
    pub addr: IpAddr,
    /// Source and destination port.
    pub port: u16,
    /// Whether the socket is IPv6.
    pub is_ipv6: bool,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// The interface of a link-local address.
    pub ifindex: Option<u32>,
    /// Who the socket belongs to, as the socket table has it.
    pub uid: Option<u32>,
    /// Who dialled.
    pub opener: Option<Opener>,
    /// Our initial sequence number and the peer's; equal, for we are the peer.
    pub isns: Option<(u32, u32)>,
    /// Who closed it: the task at ESTABLISHED -> FIN_WAIT1, or at a CLOSE that a call on the socket made.
    pub closer: Option<Task>,
    /// When it became ESTABLISHED: `CLOCK_BOOTTIME`, nanoseconds. `None`: nobody saw the moment.
    pub established_ns: Option<u64>,
}

/// How a self-connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// In order, with FINs.
    Fin,
    /// Reset, by SO_LINGER 0 or a close with unread data.
    Rst,
    /// By SOCK_DESTROY.
    Destroyed,
}

/// What is known at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// From ESTABLISHED to here.
    pub duration_ns: Option<u64>,
    /// Payload sent, each byte once.
    pub bytes_sent: Option<u64>,
    /// Payload received.
    pub bytes_received: Option<u64>,
    /// `None`: the kernel's last words fit none of them.
    pub how: Option<How>,
    /// `CLOCK_BOOTTIME`, nanoseconds, when TIME_WAIT ends; `None`: the port is free.
    pub port_blocked_until_ns: Option<u64>,
}

/// What a transition came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening<'a> {
    /// A self-connection is there.
    Established(&'a Connection),
    /// It moved from one state to another.
    State(&'a Connection, u8, u8),
    /// It is gone.
    Closed(&'a Connection, End),
}

impl<'a> Happening<'a> {
    /// Which it is about.
    #[must_use]
    pub fn connection(self) -> &'a Connection {
        let (Self::Established(connection) | Self::State(connection, ..) | Self::Closed(connection, _)) =
            self;
        connection
    }
}

/// All self-connections that are alive, by the kernel address of their socket.
#[derive(Debug, Default)]
pub struct Connections {
    lives: HashMap<u64, Life>,
    /// The keys of those that were found in the socket table, and whose kernel address is yet unknown.
    unaddressed: HashMap<Place, u64>,
    /// What has ended since the socket table is being read; `None`: it isn't.
    ended_since: Option<HashSet<Place>>,
    /// Ended, but a witness may still report the end: when, and which. Each is there once, however often it has ended: the
    /// kernel uses the addresses of sockets again, and in a flood a few of them end thousands of times a second.
    echoes: VecDeque<(u64, u64)>,
    /// Which are there.
    echoing: HashSet<u64>,
    witnesses: u8,
    numbered: u64,
}

#[derive(Debug)]
struct Life {
    connection: Connection,
    /// The last transition, and a bit for each witness that reported it.
    last: (u8, u8),
    seen_by: u8,
    /// When it was last heard of: `CLOCK_BOOTTIME`, nanoseconds.
    heard_ns: u64,
    is_announced: bool,
    /// Whether the last reading of the socket table should have had it, and had not.
    is_absent: bool,
    ended_ns: Option<u64>,
}

impl Connections {
    /// `witnesses` is how many programs report.
    #[must_use]
    pub fn new(witnesses: u8) -> Self {
        Self { witnesses, ..Self::default() }
    }

    /// Takes one transition in; `each` learns what it came to.
    pub fn apply(&mut self, t: &Transition, mut each: impl FnMut(Happening<'_>)) {
        self.forget_echoes(t.at_ns);
        self.address(t);
        if let Some(life) = self.lives.get_mut(&t.sock) {
            if life.is_echo(t) {
                life.seen_by |= 1 << t.witness;
                life.learn(t);
                if life.ended_ns.is_some() && life.seen_by.count_ones() >= u32::from(self.witnesses) {
                    self.lives.remove(&t.sock);
                }
                return;
            }
            if !life.continues_with(t) {
                let missed =
                    self.lives.remove(&t.sock).filter(|life| life.is_announced && life.ended_ns.is_none());
                if let Some(life) = missed {
                    close(&mut self.ended_since, &life.connection, End::default(), &mut each);
                }
            }
        }
        let numbered = &mut self.numbered;
        let life = self.lives.entry(t.sock).or_insert_with(|| {
            *numbered += 1;
            Life::new(*numbered, t)
        });
        life.last = (t.old, t.new);
        life.seen_by = 1 << t.witness;
        life.heard_ns = t.at_ns;
        life.learn(t);
        if !life.is_announced && proves_established(t.old, t.new) {
            life.is_announced = true;
            each(Happening::Established(&life.connection));
        }
        each(Happening::State(&life.connection, t.old, t.new));
        if t.new == state::CLOSE {
            if life.is_announced {
                close(&mut self.ended_since, &life.connection, end(&life.connection, t), &mut each);
            }
            life.ended_ns = Some(t.at_ns);
            if self.witnesses > 1 {
                if self.echoing.insert(t.sock) {
                    self.echoes.push_back((t.at_ns, t.sock));
                }
            } else {
                self.lives.remove(&t.sock);
            }
        }
    }

    /// Every open self-connection.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        let is_open = |life: &&Life| life.is_announced && life.ended_ns.is_none();
        self.lives.values().filter(is_open).map(|life| &life.connection)
    }

    fn forget_echoes(&mut self, now_ns: u64) {
        while let Some((ended_ns, sock)) = self.echoes.front().copied() {
            // Of what has it now, which may not have ended.
            let last_ns = self.lives.get(&sock).and_then(|life| life.ended_ns);
            let is_awaited = last_ns.is_some_and(|last_ns| now_ns.saturating_sub(last_ns) < ECHO_NS);
            if is_awaited && last_ns == Some(ended_ns) {
                break;
            }
            self.echoes.pop_front();
            if let Some(last_ns) = last_ns.filter(|_| is_awaited) {
                self.echoes.push_back((last_ns, sock));
                continue;
            }
            if last_ns.is_some() {
                self.lives.remove(&sock);
            }
            self.echoing.remove(&sock);
        }
    }
}

/// Tells the end of a self-connection, and notes it for the reading of the socket table that is under way.
fn close(
    ended_since: &mut Option<HashSet<Place>>,
    connection: &Connection,
    end: End,
    each: &mut impl FnMut(Happening<'_>),
) {
    if let Some(ended) = ended_since {
        ended.insert(connection.place());
    }
    each(Happening::Closed(connection, end));
}

impl Connection {
    /// Where the socket table has it.
    #[must_use]
    pub fn place(&self) -> Place {
        (self.netns.unwrap_or(0), self.addr, self.port)
    }
}

impl Life {
    fn new(number: u64, t: &Transition) -> Self {
        let v6 = Ipv6Addr::from(t.addr);
        Self {
            connection: Connection {
                number,
                source: Source::Live,
                cookie: None,
                addr: v6.to_canonical(),
                port: t.port,
                is_ipv6: t.family == family::INET6,
                netns: (t.netns != 0).then_some(t.netns),
                ifindex: (t.ifindex != 0 && v6.is_unicast_link_local()).then_some(t.ifindex),
                uid: None,
                opener: None,
                isns: None,
                closer: None,
                established_ns: None,
            },
            last: (t.old, t.new),
            seen_by: 0,
            heard_ns: t.at_ns,
            is_announced: false,
            is_absent: false,
            ended_ns: None,
        }
    }

    fn is_same_socket(&self, t: &Transition) -> bool {
        let connection = &self.connection;
        let dialled_ns = connection.opener.map_or(0, |opener| opener.at_ns);
        // Each witness writes the opener down at SYN_SENT, the second over the first, a moment later.
        let is_same_dial = dialled_ns == 0 || t.opener.at_ns == 0 || dialled_ns == t.opener.at_ns;
        (is_same_dial || t.new == state::SYN_SENT)
            && connection.port == t.port
            && connection.addr == Ipv6Addr::from(t.addr).to_canonical()
            && connection.netns.unwrap_or(0) == t.netns
    }

    /// Whether this is another witness's report of what is known already.
    fn is_echo(&self, t: &Transition) -> bool {
        self.last == (t.old, t.new)
            && self.seen_by & 1 << t.witness == 0
            && self.is_same_socket(t)
            && self.ended_ns.is_none_or(|ended_ns| t.at_ns.saturating_sub(ended_ns) < ECHO_NS)
    }

    /// Whether this can be the next that is heard of the same socket, rather than of a later one at its address.
    fn continues_with(&self, t: &Transition) -> bool {
        self.ended_ns.is_none()
            && t.new != state::SYN_SENT
            && rank(t.old) >= rank(self.last.1)
            && self.is_same_socket(t)
    }

    fn learn(&mut self, t: &Transition) {
        let connection = &mut self.connection;
        if t.cookie != 0 {
            connection.cookie = Some(t.cookie);
        }
        if t.opener.at_ns != 0 {
            connection.opener = Some(t.opener);
        }
        if (t.old, t.new) == (state::SYN_RECV, state::ESTABLISHED) && t.has_counters != 0 {
            connection.isns = Some((t.snd_una.wrapping_sub(1), t.rcv_nxt.wrapping_sub(1)));
        }
        let is_call = t.new == state::FIN_WAIT1 || (t.new == state::CLOSE && t.is_owned != 0);
        if is_call && connection.closer.is_none() && rank(t.old) == rank(state::ESTABLISHED) {
            connection.closer = Some(t.current);
        }
        if t.new == state::ESTABLISHED && connection.established_ns.is_none() {
            connection.established_ns = Some(t.at_ns);
        }
    }
}

/// How far a socket's life has come in a state. Within one life it never falls.
const fn rank(state: u8) -> u8 {
    match state {
        state::SYN_SENT => 1,
        state::SYN_RECV => 2,
        state::ESTABLISHED => 3,
        state::FIN_WAIT1 | state::CLOSE_WAIT => 4,
        state::FIN_WAIT2 | state::CLOSING | state::LAST_ACK => 5,
        state::TIME_WAIT => 6,
        // CLOSE is also where a life begins, but only towards SYN_SENT, which is asked for first.
        _ => 0,
    }
}

/// Whether a socket that makes this transition is, or was, ESTABLISHED.
const fn proves_established(old: u8, new: u8) -> bool {
    new == state::ESTABLISHED || rank(old) >= rank(state::ESTABLISHED)
}

fn end(connection: &Connection, t: &Transition) -> End {
    // A FIN has come in, and the kernel counts it as a byte received.
    let fin_came = matches!(t.old, state::CLOSING | state::TIME_WAIT | state::CLOSE_WAIT | state::LAST_ACK);
    let is_known = t.has_counters != 0;
    let how = match (t.error, t.old) {
        _ if !is_known => None,
        (ECONNABORTED, _) => Some(How::Destroyed),
        (ECONNRESET, _) | (0, state::ESTABLISHED) => Some(How::Rst),
        (0, _) if fin_came => Some(How::Fin),
        _ => None,
    };
    End {
        duration_ns: connection.established_ns.map(|since_ns| t.at_ns.saturating_sub(since_ns)),
        bytes_sent: is_known.then(|| t.bytes_sent.saturating_sub(t.bytes_retrans)),
        bytes_received: is_known.then(|| t.bytes_received.saturating_sub(u64::from(fin_came))),
        how,
        port_blocked_until_ns: (how == Some(How::Fin)).then_some(t.at_ns.saturating_add(TIME_WAIT_NS)),
    }
}

/// The text of a name as the kernel keeps it: up to the NUL; whoever prints it must escape it.
#[must_use]
pub fn comm(bytes: &[u8; COMM_LEN]) -> String {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}
