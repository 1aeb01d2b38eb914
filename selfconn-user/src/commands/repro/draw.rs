//! The sequence of segments and states as a chart of text: one lifeline, because there is one socket, and every
//! segment that leaves it comes back to it. Drawn from TCP's rules and the numbers of one run, not captured.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use super::step::How;

/// What the chart shows of one run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chart {
    pub(super) endpoint: SocketAddr,
    /// Dials that were refused before.
    pub(super) refused: u64,
    pub(super) bytes: usize,
    pub(super) how: How,
    /// The TIME_WAIT found afterwards, and how long it had to live.
    pub(super) time_wait: Option<Duration>,
}

/// A segment on its way round: the state the socket is in once it is sent, what is sent, and a remark on its
/// leaving and on its coming back.
type Segment<'a> = (&'a str, &'a str, &'a str, &'a str);

/// Columns between the lifeline and the bend.
const LOOP: usize = 24;

/// The chart, each line ended by a newline and at most 80 columns wide.
pub(super) fn chart(chart: &Chart) -> String {
    let bytes = format!("{} bytes", chart.bytes);
    let port = chart.endpoint.port();
    let sends_syn = match chart.refused {
        0 => "connect(): out to its own port".to_owned(),
        _ => format!("connect(), now from port {port}"),
    };
    // Before Linux commit 23e89e8ee7be (2024) the returning SYN+ACK did not complete the handshake: it was
    // answered by the same ACK, whose return did. The segments are the same ones.
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
    if chart.refused > 0 {
        let sockets = match chart.refused {
            1 => "1 socket, with".to_owned(),
            refused => format!("{} sockets, each with", grouped(refused)),
        };
        let arrow = format!("{:─<width$}>╳", "──── SYN ", width = LOOP - 1);
        line(&mut text, "SYN_SENT", &format!("├{arrow}"), "nobody there: refused by RST,");
        line(&mut text, "CLOSE", "┴", &sockets);
        line(&mut text, "", "", &format!("another source port than {port}"));
    }
    line(&mut text, "CLOSE", "┬", "one socket");
    open.iter().for_each(|segment| round(&mut text, segment));
    match (chart.how, chart.time_wait) {
        (How::Fin, left) => {
            close.iter().for_each(|segment| round(&mut text, segment));
            let remark =
                left.map(|left| format!("nobody's, and on the port for {} s", left.as_secs_f64().ceil()));
            line(&mut text, "TIME_WAIT", "┴", remark.as_deref().unwrap_or("not found here"));
        }
        (How::Destroyed, _) => line(&mut text, "CLOSE", "╳", "destroyed: no FIN, so no TIME_WAIT"),
    }
    text
}

fn round(text: &mut String, &(state, segment, leaves, returns): &Segment<'_>) {
    line(text, state, &format!("├{:─<LOOP$}╮", format!("──── {segment} ")), leaves);
    line(text, "", &format!("│<{:─<width$}╯", "", width = LOOP - 1), returns);
}

fn line(text: &mut String, state: &str, drawing: &str, remark: &str) {
    let line = format!("    {state:<13}{drawing:<width$}   {remark}", width = LOOP + 2);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}", line.trim_end());
}

/// A number with commas between its thousands.
pub(in crate::commands) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_chart() -> Chart {
        Chart {
            endpoint: "127.0.0.1:40029".parse().unwrap(),
            refused: 0,
            bytes: 25,
            how: How::Fin,
            time_wait: Some(Duration::from_secs(60)),
        }
    }

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
    TIME_WAIT    ┴                            nobody's, and on the port for 60 s
";
        let got = format!("\n{}", chart(&a_chart()));
        assert_eq!(got, want, "{got}");
    }

    #[test]
    fn the_accident_starts_with_the_refused_dials() {
        let got = format!("\n{}", chart(&Chart { refused: 6900, ..a_chart() }));
        let want = "
    SYN_SENT     ├──── SYN ──────────────>╳   nobody there: refused by RST,
    CLOSE        ┴                            6,900 sockets, each with
                                              another source port than 40029
    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   connect(), now from port 40029
";
        assert!(got.starts_with(want), "{got}");
    }

    #[test]
    fn a_destroyed_connection_ends_without_fin_and_time_wait() {
        let got = chart(&Chart { how: How::Destroyed, time_wait: None, ..a_chart() });
        assert!(
            got.ends_with("╳                            destroyed: no FIN, so no TIME_WAIT\n"),
            "\n{got}"
        );
        assert!(!got.contains("FIN_WAIT1") && !got.contains("CLOSING"), "\n{got}");
    }

    #[test]
    fn no_line_is_wider_than_a_terminal() {
        let widest = Chart { refused: 1_000_000_000, bytes: 65_536, ..a_chart() };
        for line in chart(&widest).lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }

    #[test]
    fn thousands_are_grouped() {
        let rows = [(0, "0"), (999, "999"), (1000, "1,000"), (14116, "14,116"), (1_234_567, "1,234,567")];
        for (number, want) in rows {
            assert_eq!(grouped(number), want);
        }
    }
}
