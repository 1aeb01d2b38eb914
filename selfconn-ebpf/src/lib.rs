//! The ABI between the eBPF programs and user space: the records in the ring buffer, the classification of
//! TCP state transitions, the kernel fields whose offsets are set at load, and the names of programs, maps
//! and globals.
//!
//! Nothing in this library reads kernel memory, so all of it is tested on the host. The programs are in
//! `main.rs`.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod bind;
mod dial;
mod field;
pub mod names;
pub mod risk;

pub use dial::{ConnectEntry, ConnectSet, WAYS, set_index};
pub use field::{ABSENT, FIELDS, Field, STATIC_OFFSETS, uses_static_offsets};

/// TCP states as the kernel numbers them (`include/net/tcp_states.h` at v5.10; unchanged through v7.0).
pub mod state {
    /// Both SYNs are acknowledged.
    pub const ESTABLISHED: u8 = 1;
    /// `connect()` is about to send its SYN, or has sent it.
    pub const SYN_SENT: u8 = 2;
    /// A SYN arrived after this socket sent its own: the simultaneous open, by which a socket connects to
    /// itself.
    pub const SYN_RECV: u8 = 3;
    /// The local end closed first.
    pub const FIN_WAIT1: u8 = 4;
    /// The FIN of the local end is acknowledged.
    pub const FIN_WAIT2: u8 = 5;
    /// Never the state of a full socket. The TIME_WAIT minisock is not traced.
    pub const TIME_WAIT: u8 = 6;
    /// Not connected: before `connect()`, and after the connection has ended.
    pub const CLOSE: u8 = 7;
    /// The peer closed first.
    pub const CLOSE_WAIT: u8 = 8;
    /// The peer closed first, then the local end.
    pub const LAST_ACK: u8 = 9;
    /// A listening socket.
    pub const LISTEN: u8 = 10;
    /// The FINs crossed: the orderly end of a self-connection.
    pub const CLOSING: u8 = 11;
    /// A request socket. Never reported.
    pub const NEW_SYN_RECV: u8 = 12;

    /// The kernel's name of a state, without its `TCP_` prefix.
    #[must_use]
    pub const fn name(state: u8) -> &'static str {
        match state {
            ESTABLISHED => "ESTABLISHED",
            SYN_SENT => "SYN_SENT",
            SYN_RECV => "SYN_RECV",
            FIN_WAIT1 => "FIN_WAIT1",
            FIN_WAIT2 => "FIN_WAIT2",
            TIME_WAIT => "TIME_WAIT",
            CLOSE => "CLOSE",
            CLOSE_WAIT => "CLOSE_WAIT",
            LAST_ACK => "LAST_ACK",
            LISTEN => "LISTEN",
            CLOSING => "CLOSING",
            NEW_SYN_RECV => "NEW_SYN_RECV",
            _ => "UNKNOWN",
        }
    }
}

/// Address families as stored in a socket (`include/linux/socket.h`).
pub mod family {
    /// An IPv4 socket.
    pub const INET: u8 = 2;
    /// An IPv6 socket, v4-mapped addresses included.
    pub const INET6: u8 = 10;
}

/// `IPPROTO_TCP`. An MPTCP socket repeats the states of its TCP subflow under another protocol number, and is
/// ignored.
pub const IPPROTO_TCP: u16 = 6;

/// `TASK_COMM_LEN`: a kernel task name, NUL-terminated within.
pub const COMM_LEN: usize = 16;

/// What to do with a transition of a socket whose source address equals its destination address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The socket is not a self-connection, and this connection attempt cannot become one.
    Ignore,
    /// The source port is not known yet, so the attempt can become a self-connection: insert the connecting
    /// task into the connect table.
    Insert,
    /// The attempt becomes a self-connection unless it fails: insert the connecting task, and report the
    /// transition.
    InsertAndReport,
    /// A self-connection changes its state: report the transition.
    Report,
    /// A self-connection ends: report the transition, and remove the entry.
    ReportAndRemove,
    /// The source port of the attempt differs from its destination port: remove the entry.
    Remove,
    /// The attempt failed, and its source port is not its destination port: remove the entry, and count the
    /// attempt if it was refused.
    RemoveAndCount,
}

/// Classifies a transition of a TCP socket whose source address equals its destination address.
///
/// `source` and `destination` are ports in the same byte order; 0 means none. At SYN_SENT, `source` must be
/// the port that the socket holds (`skc_num`), because `inet_sport` keeps the port of the last attempt when a
/// program calls `connect()` again on the same socket. At CLOSE, `source` must be `inet_sport`, because the
/// kernel has already released a `skc_num` that it chose itself (`tcp_set_state`, `net/ipv4/tcp.c` at v6.12).
#[inline(always)]
#[must_use]
pub const fn classify(old: u8, new: u8, source: u16, destination: u16) -> Action {
    let is_self = source == destination && source != 0;
    if new == state::SYN_SENT {
        if is_self {
            Action::InsertAndReport
        } else if source == 0 && destination != 0 {
            Action::Insert
        } else {
            Action::Ignore
        }
    } else if is_self {
        if new == state::CLOSE { Action::ReportAndRemove } else { Action::Report }
    } else if old == state::SYN_SENT {
        if new == state::CLOSE { Action::RemoveAndCount } else { Action::Remove }
    } else {
        Action::Ignore
    }
}

/// How the socket got its source port: the values of [`Opener::cause`].
pub mod cause {
    /// `connect()` chose the source port.
    pub const EPHEMERAL: u32 = 1;
    /// The socket had a port before `connect()`.
    pub const BOUND: u32 = 2;
}

/// A task, with its ids in the initial pid namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id (the kernel's tgid).
    pub pid: u32,
    /// Thread id (the kernel's pid).
    pub tid: u32,
    /// Name of the thread, NUL-padded.
    pub comm: [u8; COMM_LEN],
    /// Name of the process, which is the name of its leader thread. All zero: could not be read.
    pub leader: [u8; COMM_LEN],
}

impl Task {
    /// No task is known.
    pub const UNKNOWN: Self = Self { pid: 0, tid: 0, comm: [0; COMM_LEN], leader: [0; COMM_LEN] };
}

/// The connecting task, as observed at CLOSE -> SYN_SENT: the only transition that always runs in that task.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Time of the `connect()`: `CLOCK_BOOTTIME`, nanoseconds. 0: the attempt was not observed, so all fields
    /// are unknown.
    pub at_ns: u64,
    /// Start time of the process (`start_boottime` of its leader), nanoseconds. 0: unknown.
    pub start_ns: u64,
    /// The thread that called `connect()`.
    pub task: Task,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
    /// One of [`cause`]. 0: unknown.
    pub cause: u32,
}

impl Opener {
    /// The attempt was not observed.
    pub const UNKNOWN: Self = Self { at_ns: 0, start_ns: 0, task: Task::UNKNOWN, uid: 0, cause: 0 };
}

/// What identifies a connection attempt, apart from its socket.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source and destination address, network byte order; IPv4 as v4-mapped.
    pub addr: [u32; 4],
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    /// Destination port, host byte order.
    pub dport: u16,
    /// One of [`family`].
    pub family: u16,
}

/// One transition of a self-connection: the record in the ring buffer, in the host's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// Kernel address of the socket: its identity while it exists. Never shown to users.
    pub sock: u64,
    /// The socket cookie. 0: the kernel has not assigned one yet, because it assigns one on the first
    /// request.
    pub cookie: u64,
    /// Payload bytes sent, retransmissions included, as the kernel counts them.
    pub bytes_sent: u64,
    /// Payload bytes retransmitted.
    pub bytes_retrans: u64,
    /// Bytes received in order, as the kernel counts them. A FIN counts as one byte.
    pub bytes_received: u64,
    /// Source and destination address, network byte order; IPv4 as v4-mapped.
    pub addr: [u8; 16],
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    /// The interface the socket is bound to. 0: none.
    pub ifindex: u32,
    /// `snd_una`: at SYN_RECV -> ESTABLISHED the initial sequence number plus one.
    pub snd_una: u32,
    /// `rcv_nxt`: at SYN_RECV -> ESTABLISHED the peer's initial sequence number plus one.
    pub rcv_nxt: u32,
    /// `sk_err`, an errno. ECONNABORTED at CLOSE means that the socket was destroyed from outside
    /// (`SOCK_DESTROY`).
    pub error: u32,
    /// Source and destination port, host byte order.
    pub port: u16,
    /// One of [`family`].
    pub family: u8,
    /// One of [`state`].
    pub old: u8,
    /// One of [`state`].
    pub new: u8,
    /// The program that observed the transition: an index into [`names::PROGRAMS`].
    pub probe_id: u8,
    /// 1 if the fields read from `tcp_sock` (bytes, `snd_una`, `rcv_nxt`, `error`) are present, else 0.
    pub has_counters: u8,
    /// 1 if a process holds the socket lock (`sk_lock.owned`), else 0. If it is held, [`Self::current`] made
    /// a system call on this socket; otherwise an arriving packet may have interrupted an unrelated task.
    pub is_owned: u8,
    /// The task that was running.
    pub current: Task,
    /// The connecting task.
    pub opener: Opener,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<Task>() == 40);
    assert!(size_of::<Opener>() == 64);
    assert!(size_of::<Tuple>() == 24);
    assert!(size_of::<Transition>() == 200);
    assert!(offset_of!(Transition, addr) == 48);
    assert!(offset_of!(Transition, port) == 84);
    assert!(offset_of!(Transition, current) == 92);
    assert!(offset_of!(Transition, opener) == 136);
};

impl Transition {
    /// Reads a record from the ring buffer. `None`: the length is not that of a `Transition`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was compared above, `read_unaligned` needs no alignment, and a Transition holds
        // only integers and byte arrays, for which every bit pattern is a valid value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

/// A record in the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A self-connection changed its state.
    Transition(Transition),
    /// The number of refused connection attempts to this destination crossed a threshold.
    RefusedConnects(risk::Destination),
    /// A process could not bind a port.
    BindFailure(bind::BindFailure),
}

impl Record {
    /// Reads a record of any kind; the length says which kind it is. `None`: no record has this length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let transition = Transition::from_bytes(bytes).map(Self::Transition);
        let refused_connects = || risk::Destination::from_bytes(bytes).map(Self::RefusedConnects);
        let bind_failure = || bind::BindFailure::from_bytes(bytes).map(Self::BindFailure);
        transition.or_else(refused_connects).or_else(bind_failure)
    }
}

/// Which transitions are reported: a bit mask by new state, the value of the global [`names::REPORTED`].
pub mod reported {
    use super::state;

    /// The minimum that shows when a self-connection begins and ends, and which task closes it.
    pub const LIFETIMES: u32 = 1 << state::ESTABLISHED | 1 << state::FIN_WAIT1 | 1 << state::CLOSE;
    /// All transitions.
    pub const STATES: u32 = u32::MAX;
}

/// How the programs read the `task_struct` of the current task: the values of the global
/// [`names::TASK_ACCESS`].
pub mod task_access {
    /// No access: only the helpers for pid and thread name are used.
    pub const NONE: u32 = 0;
    /// `bpf_get_current_task_btf` and direct loads (v5.11; works under lockdown=confidentiality).
    pub const BTF: u32 = 1;
    /// `bpf_get_current_task` and `bpf_probe_read_kernel`.
    pub const PROBE: u32 = 2;
}

/// Slots of the per-CPU map [`names::COUNTERS`], each a `u64`.
pub mod counter {
    /// Records submitted to the ring buffer. Each one is either delivered or counted in [`RING_FULL`].
    pub const MATCHED: u32 = 0;
    /// Records for which the ring buffer had no room.
    pub const RING_FULL: u32 = 1;
    /// Openers that did not fit into the connect table.
    pub const CONNECT_TABLE_FULL: u32 = 2;
    /// Refused connection attempts from an address to itself.
    pub const REFUSED: u32 = 3;
    /// Refused connection attempts that did not fit into the table
    /// [`names::REFUSED_CONNECTS`](crate::names::REFUSED_CONNECTS).
    pub const REFUSED_TABLE_FULL: u32 = 4;
    /// First of one slot per program: the transitions of self-connections that this program observed,
    /// reported or not. The slot of a program is this number plus its index in
    /// [`names::PROGRAMS`](crate::names::PROGRAMS).
    pub const SEEN_BY_PROBE: u32 = 5;
    /// Number of slots.
    pub const COUNT: u32 = SEEN_BY_PROBE + crate::names::PROGRAMS.len() as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_tracked_until_its_port_is_known_and_reported_if_it_is_a_self_connection() {
        use Action::*;
        use state::*;
        const P: u16 = 40_000;
        const OTHER: u16 = 40_002;
        // (old, new, source, destination, expected)
        let rows = [
            (CLOSE, SYN_SENT, 0, P, Insert),
            (CLOSE, SYN_SENT, P, P, InsertAndReport),
            (CLOSE, SYN_SENT, OTHER, P, Ignore),
            (SYN_SENT, SYN_RECV, P, P, Report),
            (SYN_RECV, ESTABLISHED, P, P, Report),
            (ESTABLISHED, FIN_WAIT1, P, P, Report),
            (FIN_WAIT1, CLOSING, P, P, Report),
            (CLOSING, CLOSE, P, P, ReportAndRemove),
            (ESTABLISHED, CLOSE, P, P, ReportAndRemove),
            (SYN_SENT, CLOSE, P, P, ReportAndRemove),
            // an ordinary loopback connection: its source port is known now, and differs from the destination
            // port
            (SYN_SENT, ESTABLISHED, OTHER, P, Remove),
            (SYN_SENT, CLOSE, OTHER, P, RemoveAndCount),
            (SYN_SENT, CLOSE, 0, P, RemoveAndCount),
            (SYN_SENT, SYN_RECV, OTHER, P, Remove),
            (ESTABLISHED, FIN_WAIT1, OTHER, P, Ignore),
            (ESTABLISHED, CLOSE, OTHER, P, Ignore),
            // after listen() on an unbound socket, all ports are 0
            (CLOSE, LISTEN, 0, 0, Ignore),
            (CLOSE, LISTEN, P, 0, Ignore),
            (LISTEN, CLOSE, 0, 0, Ignore),
            // an MPTCP socket has no destination port yet when it connects
            (CLOSE, SYN_SENT, 0, 0, Ignore),
        ];
        for (old, new, source, destination, expected) in rows {
            assert_eq!(
                classify(old, new, source, destination),
                expected,
                "{} -> {} with {source} to {destination}",
                name(old),
                name(new)
            );
        }
    }

    #[test]
    fn a_record_of_wrong_length_is_rejected() {
        let bytes = [0_u8; size_of::<Transition>() + 1];
        assert!(Transition::from_bytes(&bytes).is_none());
        assert!(Transition::from_bytes(&bytes[..size_of::<Transition>() - 1]).is_none());
        assert!(Transition::from_bytes(&bytes[..size_of::<Transition>()]).is_some());
    }
}
