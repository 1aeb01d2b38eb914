//! A process that failed to bind a TCP port: the record that user space looks for a self-connection by.

use crate::Task;

/// How soon the same process is told again of the same port: nanoseconds. In between its failures are counted.
pub const AGAIN_NS: u64 = 100_000_000;

/// `bind()` or `listen()` met EADDRINUSE.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedBind {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// When the process started (`start_boottime` of its leader), nanoseconds. 0: unknown.
    pub start_ns: u64,
    /// The address that it wanted, network byte order; IPv4 as v4-mapped, all zero (or all zero mapped): any.
    pub addr: [u32; 4],
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    /// The port that it wanted, host byte order.
    pub port: u16,
    /// One of [`crate::family`].
    pub family: u16,
    /// Who.
    pub task: Task,
    /// How often since it was last told, this one included.
    pub failures: u32,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
}

const _: () = assert!(size_of::<FailedBind>() == 88);

impl FailedBind {
    /// Reads a record out of the ring buffer. `None`: not one of these, by its length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was compared above, `read_unaligned` asks for no alignment, and a FailedBind holds integers
        // and byte arrays only, for which every bit pattern is a value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}
