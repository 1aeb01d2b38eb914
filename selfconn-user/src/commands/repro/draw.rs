//! Draws the segments and states of a self-connection as a text chart. The chart has one lifeline, because
//! there is one socket, and each segment that leaves the socket comes back to it. It is drawn from the rules
//! of TCP and the numbers of one run, not from captured packets.

use std::{fmt::Write as _, time::Duration};

use super::step::{CloseKind, ReproSummary};
use crate::event::text::units::group_thousands;

/// A segment: the state of the socket after it is sent, its content, a remark on the sending, and a remark on
/// the receipt.
type Segment<'a> = (&'a str, &'a str, &'a str, &'a str);

/// Columns between the lifeline and the turn of the arrow.
const LOOP_WIDTH: usize = 24;

/// Draws the chart. Each line ends with a newline and is at most 80 columns wide.
pub(super) fn chart(summary: &ReproSummary) -> String {
    let bytes = format!("{} bytes", summary.bytes_sent);
    let (port, refused_connects) = (summary.port, summary.attempts - 1);
    let sends_syn = match refused_connects {
        0 => "connect(): out to its own port".to_owned(),
        _ => format!("connect(), now from port {port}"),
    };
    // Before Linux commit 23e89e8ee7be (2024) the returning SYN+ACK did not complete the handshake. The
    // socket answered it with the same ACK, and the return of this ACK completed the handshake. The segments
    // are the same.
    let open: [Segment<'_>; 5] = [
        ("SYN_SENT", "SYN", &sends_syn, "its own SYN: a simultaneous open"),
        ("SYN_RECV", "SYN+ACK", "it answers itself", "and is answered"),
        ("ESTABLISHED", "ACK", "connect() returns", ""),
        ("", &bytes, "write()", "read() gets the same bytes"),
        ("", "ACK", "", ""),
    ];
    let close: [Segment<'_>; 2] =
        [("FIN_WAIT1", "FIN", "close()", "its own FIN: a simultaneous close"), ("CLOSING", "ACK", "", "")];

    let mut text = String::new();
    if refused_connects > 0 {
        let sockets = match refused_connects {
            1 => "1 socket, with".to_owned(),
            refused => format!("{} sockets, each with", group_thousands(refused)),
        };
        let arrow = format!("{:─<width$}>╳", "──── SYN ", width = LOOP_WIDTH - 1);
        draw_line(&mut text, "SYN_SENT", &format!("├{arrow}"), "no listener: refused by RST,");
        draw_line(&mut text, "CLOSE", "┴", &sockets);
        draw_line(&mut text, "", "", &format!("another source port than {port}"));
    }
    draw_line(&mut text, "CLOSE", "┬", "one socket");
    open.iter().for_each(|segment| draw_segment(&mut text, segment));
    match summary.how {
        CloseKind::Fin => {
            close.iter().for_each(|segment| draw_segment(&mut text, segment));
            let left = summary.port_blocked_ns.map(|ns| Duration::from_nanos(ns).as_secs_f64().ceil());
            let remark = left.map(|left| format!("no process; blocks port for {left} s"));
            draw_line(&mut text, "TIME_WAIT", "┴", remark.as_deref().unwrap_or("not found here"));
        }
        CloseKind::Destroyed => draw_line(&mut text, "CLOSE", "╳", "destroyed: no FIN, so no TIME_WAIT"),
    }
    text
}

fn draw_segment(text: &mut String, &(state, segment, sent_remark, received_remark): &Segment<'_>) {
    draw_line(text, state, &format!("├{:─<LOOP_WIDTH$}╮", format!("──── {segment} ")), sent_remark);
    draw_line(text, "", &format!("│<{:─<width$}╯", "", width = LOOP_WIDTH - 1), received_remark);
}

fn draw_line(text: &mut String, state: &str, drawing: &str, remark: &str) {
    let line = format!("    {state:<13}{drawing:<width$}   {remark}", width = LOOP_WIDTH + 2);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}", line.trim_end());
}

#[cfg(test)]
mod tests {
    use super::{super::narrate::tests::summary, *};

    #[test]
    fn the_textbook_client_goes_from_close_to_time_wait() {
        let want = "
    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   connect(): out to its own port
                 │<───────────────────────╯   its own SYN: a simultaneous open
    SYN_RECV     ├──── SYN+ACK ───────────╮   it answers itself
                 │<───────────────────────╯   and is answered
    ESTABLISHED  ├──── ACK ───────────────╮   connect() returns
                 │<───────────────────────╯
                 ├──── 25 bytes ──────────╮   write()
                 │<───────────────────────╯   read() gets the same bytes
                 ├──── ACK ───────────────╮
                 │<───────────────────────╯
    FIN_WAIT1    ├──── FIN ───────────────╮   close()
                 │<───────────────────────╯   its own FIN: a simultaneous close
    CLOSING      ├──── ACK ───────────────╮
                 │<───────────────────────╯
    TIME_WAIT    ┴                            no process; blocks port for 60 s
";
        let got = format!("\n{}", chart(&summary(1)));
        assert_eq!(got, want, "{got}");
    }

    #[test]
    fn the_accident_starts_with_the_refused_connects() {
        let got = format!("\n{}", chart(&summary(6901)));
        let want = "
    SYN_SENT     ├──── SYN ──────────────>╳   no listener: refused by RST,
    CLOSE        ┴                            6,900 sockets, each with
                                              another source port than 40029
    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   connect(), now from port 40029
";
        assert!(got.starts_with(want), "{got}");
        for line in chart(&summary(1_000_000_000)).lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }

    #[test]
    fn a_destroyed_connection_ends_without_fin_and_time_wait() {
        let got = chart(&ReproSummary { how: CloseKind::Destroyed, port_blocked_ns: None, ..summary(1) });
        assert!(
            got.ends_with("╳                            destroyed: no FIN, so no TIME_WAIT\n"),
            "\n{got}"
        );
        assert!(!got.contains("FIN_WAIT1") && !got.contains("CLOSING"), "\n{got}");
    }
}
