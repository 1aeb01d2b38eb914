//! Draws the segments and states of a self-connection as a text chart. The chart has one lifeline, because
//! there is one socket, and each segment that leaves the socket comes back to it. It is drawn from the rules
//! of TCP and the numbers of one run, not from captured packets.

use std::time::Duration;

use super::step::{CloseKind, ReproSummary};
use crate::event::text::group_thousands;

/// Draws the chart. Each line ends with a newline and is at most 80 columns wide.
pub(super) fn chart(summary: &ReproSummary) -> String {
    let port = summary.port;
    let (refused, connect) = match summary.attempts {
        1 => (String::new(), "connect(): out to its own port".to_owned()),
        2 => (refused_connects("1 socket, with", port), format!("connect(), now from port {port}")),
        attempts => {
            let sockets = format!("{} sockets, each with", group_thousands(attempts - 1));
            (refused_connects(&sockets, port), format!("connect(), now from port {port}"))
        }
    };
    refused + &open(&connect, summary.bytes_sent) + &close(summary.how, summary.port_blocked_ns)
}

fn refused_connects(sockets: &str, port: u16) -> String {
    format!(
        "    SYN_SENT     ├──── SYN ──────────────>╳   no listener: refused by RST,
    CLOSE        ┴                            {sockets}
                                              another source port than {port}
"
    )
}

/// Before Linux commit 23e89e8ee7be (2024) the returning SYN+ACK did not complete the handshake. The socket
/// answered it with the same ACK, and the return of this ACK completed the handshake. The segments are the
/// same.
fn open(connect: &str, bytes: usize) -> String {
    let bytes = format!("{bytes} bytes ");
    format!(
        "    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   {connect}
                 │<───────────────────────╯   its own SYN: a simultaneous open
    SYN_RECV     ├──── SYN+ACK ───────────╮   it answers itself
                 │<───────────────────────╯   and is answered
    ESTABLISHED  ├──── ACK ───────────────╮   connect() returns
                 │<───────────────────────╯
                 ├──── {bytes:─<19}╮   write()
                 │<───────────────────────╯   read() gets the same bytes
                 ├──── ACK ───────────────╮
                 │<───────────────────────╯
"
    )
}

fn close(how: CloseKind, port_blocked_ns: Option<u64>) -> String {
    let remark = match port_blocked_ns.map(Duration::from_nanos) {
        Some(left) => &format!("no process; blocks port for {} s", left.as_secs_f64().ceil()),
        None => "not found here",
    };
    match how {
        CloseKind::Destroyed => {
            "    CLOSE        ╳                            destroyed: no FIN, so no TIME_WAIT\n".to_owned()
        }
        CloseKind::Fin => format!(
            "    FIN_WAIT1    ├──── FIN ───────────────╮   close()
                 │<───────────────────────╯   its own FIN: a simultaneous close
    CLOSING      ├──── ACK ───────────────╮
                 │<───────────────────────╯
    TIME_WAIT    ┴                            {remark}
"
        ),
    }
}
