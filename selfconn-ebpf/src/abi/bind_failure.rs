//! The record of a failed bind: user space uses it to check whether a self-connection holds the port.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{bind_options::BindOptions, endpoint::Endpoint, owner::Owner, task::Task};

/// Minimum interval between two records of the same process, address and port, in nanoseconds. Failures in
/// between are counted, and the next record carries their number.
pub const REPORT_INTERVAL_NS: u64 = 100_000_000;

/// A `bind()` or `listen()` that failed with EADDRINUSE: a record in the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct BindFailure {
    /// [`crate::tag::BIND_FAILURE`].
    pub tag: u16,
    /// Of the socket that was to be bound.
    pub options: BindOptions,
    /// Always zero.
    pub padding: u8,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// Start time of the process (`start_boottime` of its leader), nanoseconds. 0: unknown.
    pub start_ns: u64,
    /// Where the process has its arguments: see [`super::task::Opener::arg_start`].
    pub arg_start: u64,
    /// The requested address and port. An address that is all zero, or v4-mapped all zero, stands for any
    /// address.
    pub endpoint: Endpoint,
    /// The task that failed to bind.
    pub task: Task,
    /// Who is charged for the record.
    pub owner: Owner,
    /// Failures since the last record, this one included.
    pub failures: u64,
    /// The user that owns the socket (`sk_uid`), in the initial user namespace.
    pub sock_uid: u32,
    /// Always zero.
    pub more_padding: u32,
}

const _: () = assert!(size_of::<BindFailure>() == 144);
