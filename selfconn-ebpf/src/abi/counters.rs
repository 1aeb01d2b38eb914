//! The counters of the programs.

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
    /// [`names::REFUSED_CONNECTS`](super::super::names::REFUSED_CONNECTS).
    pub const REFUSED_TABLE_FULL: u32 = 4;
    /// Failed binds beyond the rate of their owner.
    pub const BIND_FAILURES_OVER_RATE: u32 = 5;
    /// Connects to itself that the guard has refused, or would have.
    pub const GUARD_PREVENTED: u32 = 6;
    /// Those of [`GUARD_PREVENTED`] for which the guard's ring buffer had no room, or none for this owner.
    pub const GUARD_RING_FULL: u32 = 7;
    /// Connects to itself that a rule of the guard lets pass, or the self-test.
    pub const GUARD_EXEMPT: u32 = 8;
    /// Connects to itself with a signature, which the guard lets pass.
    pub const GUARD_SIGNED: u32 = 9;
    /// Packets that the guard could not read.
    pub const GUARD_UNREADABLE: u32 = 10;
    /// Connects to itself that the guard could not refuse.
    pub const GUARD_FAILED: u32 = 11;
    /// First of one slot per program: the transitions of self-connections that this program observed,
    /// reported or not. The slot of a program is this number plus its index in
    /// [`names::PROGRAMS`](super::super::names::PROGRAMS).
    pub const SEEN_BY_PROBE: u32 = 12;
    /// Number of slots.
    pub const COUNT: u32 = SEEN_BY_PROBE + super::super::names::PROGRAMS.len() as u32;
}
