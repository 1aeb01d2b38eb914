//! The records in the ring buffer.

use super::{
    bind_failure,
    endpoint::Endpoint,
    refused_connects,
    task::{Opener, Task},
    tcp::state,
};

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
    assert!(size_of::<Endpoint>() == 24);
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
    RefusedConnects(refused_connects::Destination),
    /// A process could not bind a port.
    BindFailure(bind_failure::BindFailure),
}

impl Record {
    /// Reads a record of any kind; the length says which kind it is. `None`: no record has this length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let transition = Transition::from_bytes(bytes).map(Self::Transition);
        let refused_connects = || refused_connects::Destination::from_bytes(bytes).map(Self::RefusedConnects);
        let bind_failure = || bind_failure::BindFailure::from_bytes(bytes).map(Self::BindFailure);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_wrong_length_is_rejected() {
        let bytes = [0_u8; size_of::<Transition>() + 1];
        assert!(Transition::from_bytes(&bytes).is_none());
        assert!(Transition::from_bytes(&bytes[..size_of::<Transition>() - 1]).is_none());
        assert!(Transition::from_bytes(&bytes[..size_of::<Transition>()]).is_some());
    }
}
