//! The record of a failed bind: user space uses it to check whether a self-connection holds the port.

use super::task::Task;

/// Minimum interval between two records of the same process, address and port, in nanoseconds. Failures in
/// between are counted, and the next record carries their number.
pub const REPORT_INTERVAL_NS: u64 = 100_000_000;

/// A `bind()` or `listen()` that failed with EADDRINUSE.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindFailure {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// Start time of the process (`start_boottime` of its leader), nanoseconds. 0: unknown.
    pub start_ns: u64,
    /// The requested address, network byte order; IPv4 as v4-mapped. All zero, or v4-mapped all zero: any
    /// address.
    pub addr: [u32; 4],
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    /// The requested port, host byte order.
    pub port: u16,
    /// One of [`crate::family`].
    pub family: u16,
    /// The task that failed to bind.
    pub task: Task,
    /// Failures since the last record, this one included.
    pub failures: u32,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
}

const _: () = assert!(size_of::<BindFailure>() == 88);

impl BindFailure {
    /// Reads a record from the ring buffer. `None`: the length is not that of a `BindFailure`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was compared above, `read_unaligned` needs no alignment, and a BindFailure holds
        // only integers and byte arrays, for which every bit pattern is a valid value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}
