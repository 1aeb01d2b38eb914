//! What a program does with a transition of a socket whose two addresses are equal. Pure: tested on the host, row by
//! row.

use super::tcp::state;

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

impl Action {
    /// True if this is about an attempt that has no source port, or had none when it began. It ends as an ordinary
    /// connection if `connect()` can't choose the destination port. Nearly every service of a host has such a port, so
    /// these attempts have no entry.
    #[inline(always)]
    #[must_use]
    pub const fn is_about_attempt(self) -> bool {
        matches!(self, Self::Insert | Self::Remove | Self::RemoveAndCount)
    }
}

/// True if [`classify`] ignores this transition because both ports are known, and differ, and it is not the end of a
/// listener. So few comparisons decide about all transitions of the server of an ordinary connection, and about most of
/// its client's.
#[inline(always)]
#[must_use]
pub const fn is_ordinary(old: u8, new: u8, source: u16, destination: u16) -> bool {
    source != 0
        && source != destination
        && old != state::SYN_SENT
        && new != state::SYN_SENT
        && !ends_listener(old, new)
}

/// True if a listener is closed. The socket of each accepted connection begins as a copy of its listener, and goes from
/// LISTEN to SYN_RECV (`inet_csk_clone_lock`, net/ipv4/inet_connection_sock.c at v5.10).
#[inline(always)]
#[must_use]
pub const fn ends_listener(old: u8, new: u8) -> bool {
    old == state::LISTEN && new == state::CLOSE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ordinary_is_ignored() {
        let mut ordinary = 0;
        for (old, new) in (0..16_u8).flat_map(|old| (0..16_u8).map(move |new| (old, new))) {
            for (source, destination) in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1)] {
                if is_ordinary(old, new, source, destination) {
                    assert_eq!(classify(old, new, source, destination), Action::Ignore, "{old} -> {new}");
                    ordinary += 1;
                }
            }
        }
        // All but LISTEN -> CLOSE, between all states but SYN_SENT.
        assert_eq!(ordinary, (15 * 15 - 1) * 3);
    }

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
}
