//! What the eBPF programs and user space agree on: the record that crosses the ring buffer, the decision what a
//! transition means, the kernel fields whose offsets go in at load, and the names of programs, maps and globals.
//!
//! Nothing here touches the kernel, so all of it is tested on the host. The programs are in `main.rs`.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod bind;
mod dial;
mod field;
pub mod names;
pub mod risk;

pub use dial::{Dial, DialSet, WAYS, set_of};
pub use field::{ABSENT, FIELDS, Field, USUAL, is_usual};

/// TCP states as the kernel numbers them (`include/net/tcp_states.h` at v5.10; unchanged through v7.0).
pub mod state {
    /// Both SYNs are acknowledged.
    pub const ESTABLISHED: u8 = 1;
    /// `connect()` is about to send, or has sent, its SYN.
    pub const SYN_SENT: u8 = 2;
    /// A SYN met ours: the simultaneous open, which is how a socket connects to itself.
    pub const SYN_RECV: u8 = 3;
    /// We closed first.
    pub const FIN_WAIT1: u8 = 4;
    /// Our FIN is acknowledged.
    pub const FIN_WAIT2: u8 = 5;
    /// Never the state of a full socket; the timewait minisock is not traced.
    pub const TIME_WAIT: u8 = 6;
    /// Not connected: before `connect()`, and the end of every life.
    pub const CLOSE: u8 = 7;
    /// The peer closed first.
    pub const CLOSE_WAIT: u8 = 8;
    /// The peer closed first, then we did.
    pub const LAST_ACK: u8 = 9;
    /// A server's socket.
    pub const LISTEN: u8 = 10;
    /// FINs crossed: how an orderly self-connection ends.
    pub const CLOSING: u8 = 11;
    /// A request socket; never reported.
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

/// Address families as the socket has them (`include/linux/socket.h`).
pub mod family {
    /// An IPv4 socket.
    pub const INET: u8 = 2;
    /// An IPv6 socket, v4-mapped addresses included.
    pub const INET6: u8 = 10;
}

/// `IPPROTO_TCP`. An MPTCP socket repeats the states of its TCP subflow under another number; it is left out.
pub const IPPROTO_TCP: u16 = 6;

/// `TASK_COMM_LEN`: a kernel task name, NUL-terminated within.
pub const COMM_LEN: usize = 16;

/// What a transition of a socket whose two addresses are equal calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Cannot be, or become, a self-connection by what is known now.
    Ignore,
    /// A dial that may yet hit itself: remember who dials.
    Remember,
    /// A dial that will hit itself unless it fails: remember who dials, and report.
    RememberAndReport,
    /// A self-connection moves on.
    Report,
    /// A self-connection ends.
    ReportAndForget,
    /// A dial whose source port turned out to be another one.
    Forget,
    /// A dial that came to nothing, from another source port: count it if it was refused.
    CountAndForget,
}

/// Judges a transition of a TCP socket whose source and destination address are equal.
///
/// `source` and `destination` are ports in the same byte order, 0 where there is none. At SYN_SENT `source` must be
/// the port the socket holds (`skc_num`), for `inet_sport` keeps the last attempt's port when a program dials again on
/// the same socket; at CLOSE it must be `inet_sport`, for the kernel has given a chosen `skc_num` back by then
/// (`tcp_set_state`, `net/ipv4/tcp.c` at v6.12).
#[inline(always)]
#[must_use]
pub const fn judge(old: u8, new: u8, source: u16, destination: u16) -> Verdict {
    let is_self = source == destination && source != 0;
    if new == state::SYN_SENT {
        if is_self {
            Verdict::RememberAndReport
        } else if source == 0 && destination != 0 {
            Verdict::Remember
        } else {
            Verdict::Ignore
        }
    } else if is_self {
        if new == state::CLOSE { Verdict::ReportAndForget } else { Verdict::Report }
    } else if old == state::SYN_SENT {
        if new == state::CLOSE { Verdict::CountAndForget } else { Verdict::Forget }
    } else {
        Verdict::Ignore
    }
}

/// How the source port came about; the value of [`Opener::cause`].
pub mod cause {
    /// `connect()` chose the source port.
    pub const EPHEMERAL: u32 = 1;
    /// The socket had a port before it dialled.
    pub const BOUND: u32 = 2;
}

/// A task as the kernel names it, in the initial pid namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id (the kernel's tgid).
    pub pid: u32,
    /// Thread id (the kernel's pid).
    pub tid: u32,
    /// The thread's own name; NUL-padded.
    pub comm: [u8; COMM_LEN],
    /// The process's name, that is its leader's. All zero: could not be read.
    pub leader: [u8; COMM_LEN],
}

impl Task {
    /// Nobody.
    pub const UNKNOWN: Self = Self { pid: 0, tid: 0, comm: [0; COMM_LEN], leader: [0; COMM_LEN] };
}

/// Who dialled, as seen at CLOSE -> SYN_SENT, the one transition that always runs in the connecting task.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opener {
    /// When it dialled: `CLOCK_BOOTTIME`, nanoseconds. 0: the dial was not seen, and nothing here is known.
    pub at_ns: u64,
    /// When the process started (`start_boottime` of its leader), nanoseconds. 0: unknown.
    pub start_ns: u64,
    /// The dialling thread.
    pub task: Task,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
    /// One of [`cause`]; 0: unknown.
    pub cause: u32,
}

impl Opener {
    /// Nobody was seen dialling.
    pub const UNKNOWN: Self = Self { at_ns: 0, start_ns: 0, task: Task::UNKNOWN, uid: 0, cause: 0 };
}

/// What a dial is known by, beside its socket.
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
    /// The socket's kernel address: its identity while it lives. Never shown.
    pub sock: u64,
    /// The socket cookie; 0: nobody has asked the kernel for one yet.
    pub cookie: u64,
    /// Payload bytes sent, retransmissions included, as the kernel counts them.
    pub bytes_sent: u64,
    /// Payload bytes sent again.
    pub bytes_retrans: u64,
    /// Bytes received in order, as the kernel counts them: a FIN counts one.
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
    /// `sk_err`, an errno; ECONNABORTED at CLOSE says that somebody destroyed the socket.
    pub error: u32,
    /// Source and destination port, host byte order.
    pub port: u16,
    /// One of [`family`].
    pub family: u8,
    /// One of [`state`].
    pub old: u8,
    /// One of [`state`].
    pub new: u8,
    /// Which program saw it: an index into [`names::PROGRAMS`].
    pub witness: u8,
    /// Whether the fields read from `tcp_sock` (bytes, `snd_una`, `rcv_nxt`, `error`) are there: 0 or 1.
    pub has_counters: u8,
    /// Whether a process holds the socket's lock (`sk_lock.owned`): [`Self::current`] then made a call on this socket,
    /// rather than having been interrupted by somebody's packet. 0 or 1.
    pub is_owned: u8,
    /// The task that happened to run.
    pub current: Task,
    /// Who dialled.
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
    /// Reads a record out of the ring buffer. `None`: not one of ours, by its length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was compared above, `read_unaligned` asks for no alignment, and a Transition holds
        // integers and byte arrays only, for which every bit pattern is a value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

/// What the programs put into the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A self-connection moved.
    Transition(Transition),
    /// Somebody keeps dialling this port.
    Dialled(risk::Target),
    /// Somebody could not bind a port.
    FailedBind(bind::FailedBind),
}

impl Record {
    /// Told apart by their length. `None`: not one of ours.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let transition = Transition::from_bytes(bytes).map(Self::Transition);
        let dialled = || risk::Target::from_bytes(bytes).map(Self::Dialled);
        let failed = || bind::FailedBind::from_bytes(bytes).map(Self::FailedBind);
        transition.or_else(dialled).or_else(failed)
    }
}

/// Which transitions are reported, by a bit for the state they lead to; the value of the global [`names::REPORTED`].
pub mod reported {
    use super::state;

    /// As many as it takes to tell when a self-connection begins and ends, and who closes it.
    pub const LIFETIMES: u32 = 1 << state::ESTABLISHED | 1 << state::FIN_WAIT1 | 1 << state::CLOSE;
    /// All.
    pub const STATES: u32 = u32::MAX;
}

/// How the programs reach the current task's `task_struct`; the value of the global [`names::TASK_ACCESS`].
pub mod task_access {
    /// Not at all: the helpers for pid and thread name are all there is.
    pub const NONE: u32 = 0;
    /// `bpf_get_current_task_btf` and plain loads (v5.11; also under lockdown=confidentiality).
    pub const BTF: u32 = 1;
    /// `bpf_get_current_task` and `bpf_probe_read_kernel`.
    pub const PROBE: u32 = 2;
}

/// Slots of the per-CPU map [`names::COUNTERS`], each a `u64`.
pub mod counter {
    /// Records that were to go through the ring buffer. Each is delivered, or counted in [`RING_FULL`].
    pub const MATCHED: u32 = 0;
    /// Records for which the ring buffer had no room.
    pub const RING_FULL: u32 = 1;
    /// Openers that the table had no room for.
    pub const NOT_REMEMBERED: u32 = 2;
    /// Refused dials of an address to itself.
    pub const REFUSED: u32 = 3;
    /// Those of them that the table by port had no room for.
    pub const NOT_TALLIED: u32 = 4;
    /// Transitions of self-connections that a program saw, reported or not: one slot for each, at this one plus its
    /// index in [`names::PROGRAMS`](crate::names::PROGRAMS).
    pub const SEEN: u32 = 5;
    /// How many slots there are.
    pub const COUNT: u32 = SEEN + crate::names::PROGRAMS.len() as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dial_is_remembered_while_its_port_is_open_and_reported_once_it_is_its_own() {
        use Verdict::*;
        use state::*;
        const P: u16 = 40_000;
        const OTHER: u16 = 40_002;
        // (old, new, source, destination, verdict)
        let rows = [
            (CLOSE, SYN_SENT, 0, P, Remember),
            (CLOSE, SYN_SENT, P, P, RememberAndReport),
            (CLOSE, SYN_SENT, OTHER, P, Ignore),
            (SYN_SENT, SYN_RECV, P, P, Report),
            (SYN_RECV, ESTABLISHED, P, P, Report),
            (ESTABLISHED, FIN_WAIT1, P, P, Report),
            (FIN_WAIT1, CLOSING, P, P, Report),
            (CLOSING, CLOSE, P, P, ReportAndForget),
            (ESTABLISHED, CLOSE, P, P, ReportAndForget),
            (SYN_SENT, CLOSE, P, P, ReportAndForget),
            // an ordinary loopback connection: its port is known now, and it is not ours
            (SYN_SENT, ESTABLISHED, OTHER, P, Forget),
            (SYN_SENT, CLOSE, OTHER, P, CountAndForget),
            (SYN_SENT, CLOSE, 0, P, CountAndForget),
            (SYN_SENT, SYN_RECV, OTHER, P, Forget),
            (ESTABLISHED, FIN_WAIT1, OTHER, P, Ignore),
            (ESTABLISHED, CLOSE, OTHER, P, Ignore),
            // listen() on an unbound socket has 0 = 0 everywhere
            (CLOSE, LISTEN, 0, 0, Ignore),
            (CLOSE, LISTEN, P, 0, Ignore),
            (LISTEN, CLOSE, 0, 0, Ignore),
            // an MPTCP socket dials with no destination port yet
            (CLOSE, SYN_SENT, 0, 0, Ignore),
        ];
        for (old, new, source, destination, verdict) in rows {
            assert_eq!(
                judge(old, new, source, destination),
                verdict,
                "{} -> {} with {source} to {destination}",
                name(old),
                name(new)
            );
        }
    }

    #[test]
    fn a_record_of_another_length_is_refused() {
        let bytes = [0_u8; size_of::<Transition>() + 1];
        assert!(Transition::from_bytes(&bytes).is_none());
        assert!(Transition::from_bytes(&bytes[..size_of::<Transition>() - 1]).is_none());
        assert!(Transition::from_bytes(&bytes[..size_of::<Transition>()]).is_some());
    }
}
