//! TCP states, address families and the protocol number, as the kernel numbers them.

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

/// `IPPROTO_MPTCP`. Its `bind()` binds the first TCP subflow (`mptcp_bind`, net/mptcp/protocol.c at v5.10).
pub const IPPROTO_MPTCP: u16 = 262;
