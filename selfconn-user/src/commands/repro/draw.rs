//! Draws the segments and states of a self-connection as a text chart. The chart has one lifeline, because
//! there is one socket, and each segment that leaves the socket comes back to it. It is drawn from the captured
//! segments, or, where they could not be captured, from the rules of TCP and the numbers of one run.

use std::time::Duration;

use super::{
    segment::CapturedSegment,
    step::{CloseKind, ReproSummary},
};
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
    let segments = match &summary.segments {
        Some(segments) => captured(segments, &connect),
        None => open(&connect, summary.bytes_sent) + close(summary.how),
    };
    refused + &segments + &end(summary.how, summary.port_blocked_ns)
}

/// The number from which those of a drawing count: that of the first segment.
pub(super) fn initial_seq(segments: &[CapturedSegment]) -> u32 {
    segments.first().map_or(0, |segment| segment.seq)
}

/// Two lines for each segment: it leaves with its numbers and the time since the segment before, and comes back.
/// The state is the one in which a socket sends such a segment.
fn captured(segments: &[CapturedSegment], connect: &str) -> String {
    let initial = initial_seq(segments);
    let relative = |number: u32| number.wrapping_sub(initial);
    let mut chart = String::from("    CLOSE        ┬                            one socket\n");
    let mut last_state = "";
    for (at, segment) in segments.iter().enumerate() {
        let before = &segments[..at];
        let numbers = match segment.ack {
            Some(ack) => format!("seq {} ack {}", relative(segment.seq), relative(ack)),
            None => format!("seq {}", relative(segment.seq)),
        };
        let time = match before.last() {
            Some(last) => {
                format!("+{:.1?}", Duration::from_nanos(segment.time_ns.saturating_sub(last.time_ns)))
            }
            None => "0".to_owned(),
        };
        let is_sent = |kind| before.iter().any(|before| before.kind() == kind);
        let (state, remark) = match segment.kind() {
            "SYN" => ("SYN_SENT", connect),
            "SYN+ACK" => ("SYN_RECV", "its own SYN: a simultaneous open"),
            "FIN" => ("FIN_WAIT1", "close()"),
            "RST" => ("CLOSE", "a reset"),
            "ACK" if is_sent("FIN") => ("CLOSING", "its own FIN: a simultaneous close"),
            "ACK" if !is_sent("data") && last_state != "ESTABLISHED" => ("ESTABLISHED", "connect() returns"),
            "ACK" => ("ESTABLISHED", ""),
            _ => ("ESTABLISHED", "write(); read() gets the same"),
        };
        let is_again = segment.syn || segment.fin || segment.len > 0;
        let is_again =
            is_again && before.iter().any(|other| (other.seq, other.kind()) == (segment.seq, segment.kind()));
        let remark = if is_again { "again" } else { remark };
        let label = if state == last_state { "" } else { state };
        last_state = state;
        let kind = match segment.len {
            0 => format!("{} ", segment.kind()),
            len => format!("{len} bytes "),
        };
        let leaves = format!("    {label:<13}├──── {kind:─<19}╮   {numbers:<22}{time:>12}");
        let returns = format!("                 │<───────────────────────╯   {remark}");
        chart.push_str(&format!("{leaves}\n{}\n", returns.trim_end()));
    }
    chart
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

fn close(how: CloseKind) -> &'static str {
    match how {
        CloseKind::Destroyed => "",
        CloseKind::Fin => {
            "    FIN_WAIT1    ├──── FIN ───────────────╮   close()
                 │<───────────────────────╯   its own FIN: a simultaneous close
    CLOSING      ├──── ACK ───────────────╮
                 │<───────────────────────╯
"
        }
    }
}

fn end(how: CloseKind, port_blocked_ns: Option<u64>) -> String {
    let remark = match port_blocked_ns.map(Duration::from_nanos) {
        Some(left) => &format!("no process; blocks port for {} s", left.as_secs_f64().ceil()),
        None => "not found here",
    };
    match how {
        CloseKind::Destroyed => {
            "    CLOSE        ╳                            destroyed: no FIN, so no TIME_WAIT\n".to_owned()
        }
        CloseKind::Fin => format!("    TIME_WAIT    ┴                            {remark}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::repro::segment::tests::segment;

    /// Segments with these flags, numbers from 1,000 on, and data of this length, a microsecond apart.
    fn segments(rows: &[(u8, u32, usize)]) -> Vec<CapturedSegment> {
        let with_numbers = |(at, (flags, seq, len)): (usize, &(u8, u32, usize))| {
            let segment = segment(*flags, *len);
            CapturedSegment {
                seq: 1_000 + seq,
                ack: segment.ack.map(|_| 1_000 + seq + *len as u32),
                time_ns: at as u64 * 1_000,
                ..segment
            }
        };
        rows.iter().enumerate().map(with_numbers).collect()
    }

    #[test]
    fn the_segments_are_drawn_as_they_were_captured() {
        let segments = segments(&[
            (0x02, 0, 0),
            (0x12, 0, 0),
            (0x10, 1, 0),
            (0x18, 1, 24),
            (0x10, 25, 0),
            (0x11, 25, 0),
            (0x10, 26, 0),
        ]);
        assert_eq!(initial_seq(&segments), 1_000);
        let chart = captured(&segments, "connect(): out to its own port");
        assert_eq!(
            chart,
            "    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   seq 0                            0
                 │<───────────────────────╯   connect(): out to its own port
    SYN_RECV     ├──── SYN+ACK ───────────╮   seq 0 ack 0                 +1.0µs
                 │<───────────────────────╯   its own SYN: a simultaneous open
    ESTABLISHED  ├──── ACK ───────────────╮   seq 1 ack 1                 +1.0µs
                 │<───────────────────────╯   connect() returns
                 ├──── 24 bytes ──────────╮   seq 1 ack 25                +1.0µs
                 │<───────────────────────╯   write(); read() gets the same
                 ├──── ACK ───────────────╮   seq 25 ack 25               +1.0µs
                 │<───────────────────────╯
    FIN_WAIT1    ├──── FIN ───────────────╮   seq 25 ack 25               +1.0µs
                 │<───────────────────────╯   close()
    CLOSING      ├──── ACK ───────────────╮   seq 26 ack 26               +1.0µs
                 │<───────────────────────╯   its own FIN: a simultaneous close
"
        );
        assert!(chart.lines().all(|line| line.chars().count() <= 80), "{chart}");
    }

    #[test]
    fn a_segment_that_was_sent_again_is_marked_and_a_reset_is_drawn() {
        let chart = captured(&segments(&[(0x02, 0, 0), (0x02, 0, 0), (0x14, 1, 0)]), "connect()");
        let remarks: Vec<_> = chart.lines().skip(2).step_by(2).map(|line| &line[line.len() - 7..]).collect();
        assert_eq!(remarks, ["nnect()", "  again", "a reset"], "{chart}");
        assert_eq!(chart.matches("SYN_SENT").count(), 1, "{chart}");
    }
}
