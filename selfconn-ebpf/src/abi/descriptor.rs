//! What the iterator over descriptors writes: one record for each descriptor of a self-connection, of a connection
//! attempt from an address to itself, and of a namespace.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{bind_options::BindOptions, endpoint::Endpoint, state, task::COMM_LEN};

/// The values of [`SocketDescriptor::kind`].
pub mod descriptor_kind {
    /// The file is a TCP socket whose source address is its destination address.
    pub const SOCKET: u32 = 0;
    /// The file is a namespace, of any type. Only the ids, the descriptor and the inode are set.
    pub const NAMESPACE: u32 = 1;
}

/// `NSFS_MAGIC`, include/uapi/linux/magic.h at v5.10: the file system of namespaces. Anybody can have a file with the
/// inode of one in a file system of his own.
pub const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A descriptor of a socket, or of a namespace. In the host's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct SocketDescriptor {
    /// Process id (the kernel's tgid) in the initial pid namespace.
    pub pid: u32,
    /// Thread id. It differs from [`Self::pid`] for a thread with a descriptor table of its own, and if the
    /// first thread of the process has ended.
    pub tid: u32,
    /// The descriptor.
    pub fd: u32,
    /// The owner of the socket, in the initial user namespace.
    pub uid: u32,
    /// Start time of the process (`start_boottime` of its leader), nanoseconds.
    pub start_ns: u64,
    /// Name of the process, which is the name of its leader thread, NUL-padded.
    pub comm: [u8; COMM_LEN],
    /// Kernel address of the socket. Never shown to users.
    pub sock: u64,
    /// The socket cookie. 0: the kernel has not assigned one yet, and the program may not ask for one.
    pub cookie: u64,
    /// The inode of the file.
    pub inode: u64,
    /// The source. The destination has the same address.
    pub endpoint: Endpoint,
    /// Destination port, host byte order.
    pub destination_port: u16,
    /// One of [`state`].
    pub state: u8,
    /// Of the socket, as they are now.
    pub options: BindOptions,
    /// One of [`descriptor_kind`].
    pub kind: u32,
}

const _: () = assert!(size_of::<SocketDescriptor>() == 112);

impl SocketDescriptor {
    /// True if the iterator writes a record for a socket with this state and these ports. The source address
    /// is the destination address.
    #[inline(always)]
    #[must_use]
    pub const fn is_listed(state: u8, port: u16, destination_port: u16) -> bool {
        match state {
            state::CLOSE | state::LISTEN => false,
            state::SYN_SENT => true,
            _ => port == destination_port,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_self_connection_and_an_attempt_are_listed_and_an_ordinary_connection_is_not() {
        for (state, port, destination_port, is_listed) in [
            (state::ESTABLISHED, 4, 4, true),
            (state::CLOSE_WAIT, 4, 4, true),
            (state::SYN_SENT, 4, 4, true),
            (state::SYN_SENT, 5, 4, true),
            (state::ESTABLISHED, 5, 4, false),
            (state::CLOSE, 4, 4, false),
            (state::LISTEN, 0, 0, false),
        ] {
            assert_eq!(
                SocketDescriptor::is_listed(state, port, destination_port),
                is_listed,
                "{} {port} {destination_port}",
                state::name(state)
            );
        }
    }
}
