//! The records in the ring buffer. Each begins with its tag, so that user space knows what it is.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    bind_failure::BindFailure,
    bind_options::BindOptions,
    endpoint::Endpoint,
    refused_connects::RefusedConnectsReport,
    task::{Opener, Task},
    tcp::state,
};

/// The first two bytes of a record: its kind. Zero is no tag, so a record of zeroes is invalid.
pub mod tag {
    /// [`Transition`](super::Transition).
    pub const TRANSITION: u16 = 1;
    /// [`RefusedConnectsReport`](super::RefusedConnectsReport).
    pub const REFUSED_CONNECTS: u16 = 2;
    /// [`BindFailure`](super::BindFailure).
    pub const BIND_FAILURE: u16 = 3;
    /// [`ListenerClosed`](super::ListenerClosed).
    pub const LISTENER_CLOSED: u16 = 4;
    /// [`Prevention`](crate::guard::Prevention), in the guard's ring buffer.
    pub const PREVENTION: u16 = 5;
    /// [`FirstConnect`](crate::guard::FirstConnect), in the guard's ring buffer.
    pub const FIRST_CONNECT: u16 = 6;
}

/// What file the socket has: the values of [`Transition::socket_file`].
pub mod socket_file {
    /// Not known: the kernel has no BTF, or the socket is closed already (`sk->sk_socket` is NULL).
    pub const UNKNOWN: u8 = 0;
    /// The socket has a file. Nearly always it is a program's; NFS makes one for a socket of the kernel's, too
    /// (`xs_create_sock`, net/sunrpc/xprtsock.c).
    pub const PRESENT: u8 = 1;
    /// The socket has no file: the kernel itself made and uses it (`sock_create_kern`), as SMB does.
    pub const ABSENT: u8 = 2;
    /// The socket is a subflow of an MPTCP socket, which has a file: a program's, although the kernel may have
    /// connected the subflow.
    pub const OF_MPTCP: u8 = 3;
}

/// A self-connection changed its state. In the host's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Transition {
    /// [`tag::TRANSITION`].
    pub tag: u16,
    /// One of [`state`].
    pub old: u8,
    /// One of [`state`].
    pub new: u8,
    /// The program that observed the transition: an index into [`crate::names::PROGRAMS`].
    pub probe_id: u8,
    /// 1 if the fields read from `tcp_sock` (bytes, `snd_una`, `rcv_nxt`) are present, else 0.
    pub has_counters: u8,
    /// 1 if a process holds the socket lock (`sk_lock.owned`), else 0. If it is held, [`Self::current`] made
    /// a system call on this socket; otherwise an arriving packet may have interrupted an unrelated task.
    pub is_owned: u8,
    /// One of [`socket_file`].
    pub socket_file: u8,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// Kernel address of the socket. Another socket can have it when this one is gone. Never shown to users.
    pub sock: u64,
    /// The socket cookie, the identity of the socket until the next boot. 0: the kernel has not assigned one yet,
    /// because it assigns one on the first request, and this program can't request one.
    pub cookie: u64,
    /// Where the self-connection is.
    pub endpoint: Endpoint,
    /// Payload bytes sent, retransmissions included, as the kernel counts them.
    pub bytes_sent: u64,
    /// Payload bytes retransmitted.
    pub bytes_retrans: u64,
    /// Bytes received in order, as the kernel counts them. A FIN counts as one byte.
    pub bytes_received: u64,
    /// `snd_una`: at SYN_RECV -> ESTABLISHED the initial sequence number plus one.
    pub snd_una: u32,
    /// `rcv_nxt`: at SYN_RECV -> ESTABLISHED the peer's initial sequence number plus one.
    pub rcv_nxt: u32,
    /// The user that owns the socket (`sk_uid`), in the initial user namespace.
    pub uid: u32,
    /// `sk_err`, an errno. ECONNABORTED at CLOSE means that the socket was destroyed from outside
    /// (`SOCK_DESTROY`).
    pub error: u16,
    /// Of the socket, as they are at this transition.
    pub options: BindOptions,
    /// At CLOSE: 1 if the network namespace has as many TIME_WAIT entries as it may have, or one less, so that this
    /// socket may have got none; else 0.
    pub is_time_wait_full: u8,
    /// Inode of the socket's file. 0: unknown, or the socket has no file: the kernel itself uses it, or its program
    /// has closed it.
    pub inode: u64,
    /// The task that was running.
    pub current: Task,
    /// The connecting task.
    pub opener: Opener,
}

// `IntoBytes` compiles only if a record has no implicit padding, so a size fixes every offset.
const _: () = {
    assert!(size_of::<Task>() == 40);
    assert!(size_of::<Opener>() == 88);
    assert!(size_of::<Endpoint>() == 40);
    assert!(size_of::<Transition>() == 248);
};

/// A listener at a watched port is closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct ListenerClosed {
    /// [`tag::LISTENER_CLOSED`].
    pub tag: u16,
    /// Always zero.
    pub padding: u16,
    pub more_padding: u32,
    /// The port and the network namespace. The address is not set.
    pub endpoint: Endpoint,
}

const _: () = assert!(size_of::<ListenerClosed>() == 48);

/// A record in the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A self-connection changed its state.
    Transition(Transition),
    /// The number of refused connection attempts to this destination crossed a threshold.
    RefusedConnects(Endpoint),
    /// A listener at this port is closed.
    ListenerClosed(Endpoint),
    /// A process could not bind a port.
    BindFailure(BindFailure),
}

impl Record {
    /// Reads a record. `None`: the tag is unknown, or the record does not have the length of its kind.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match u16::read_from_prefix(bytes).ok()?.0 {
            tag::TRANSITION => Transition::read_from_bytes(bytes).map(Self::Transition).ok(),
            tag::REFUSED_CONNECTS => RefusedConnectsReport::read_from_bytes(bytes)
                .map(|report| Self::RefusedConnects(report.destination))
                .ok(),
            tag::LISTENER_CLOSED => ListenerClosed::read_from_bytes(bytes)
                .map(|closed| Self::ListenerClosed(closed.endpoint))
                .ok(),
            tag::BIND_FAILURE => BindFailure::read_from_bytes(bytes).map(Self::BindFailure).ok(),
            _ => None,
        }
    }
}

/// Which transitions are reported: a bit mask by new state, the value of the global [`names::REPORTED`].
pub mod reported {
    use super::state;

    /// The transition from SYN_SENT to CLOSE: the attempt failed. It is reported if this bit and that of CLOSE are set.
    pub const FAILED_ATTEMPTS: u32 = 1 << 31;
    /// The minimum that shows when a self-connection begins and ends, and which task closes it.
    pub const LIFETIMES: u32 = 1 << state::ESTABLISHED | 1 << state::FIN_WAIT1 | 1 << state::CLOSE;
    /// All transitions.
    pub const STATES: u32 = u32::MAX;

    // The report at CLOSE also frees the socket's slot in the connect table.
    const _: () = assert!(LIFETIMES & STATES & 1 << state::CLOSE != 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_known_by_its_tag_and_rejected_with_a_wrong_length() {
        let mut bytes = [0_u8; size_of::<Transition>() + 1];
        for (tag, len) in [
            (tag::TRANSITION, size_of::<Transition>()),
            (tag::REFUSED_CONNECTS, size_of::<RefusedConnectsReport>()),
            (tag::BIND_FAILURE, size_of::<BindFailure>()),
            (tag::LISTENER_CLOSED, size_of::<ListenerClosed>()),
        ] {
            bytes[..2].copy_from_slice(&tag.to_ne_bytes());
            let read_tag = match Record::from_bytes(&bytes[..len]) {
                Some(Record::Transition(_)) => tag::TRANSITION,
                Some(Record::RefusedConnects(_)) => tag::REFUSED_CONNECTS,
                Some(Record::BindFailure(_)) => tag::BIND_FAILURE,
                Some(Record::ListenerClosed(_)) => tag::LISTENER_CLOSED,
                None => 0,
            };
            assert_eq!(read_tag, tag);
            for wrong in [0, 1, 2, len - 1, len + 1] {
                assert_eq!(Record::from_bytes(&bytes[..wrong]), None, "{tag} with {wrong} bytes");
            }
        }
        for unknown in [0, tag::BIND_FAILURE + 1, u16::MAX] {
            bytes[..2].copy_from_slice(&unknown.to_ne_bytes());
            assert_eq!(Record::from_bytes(&bytes[..size_of::<Transition>()]), None, "{unknown}");
        }
    }
}
