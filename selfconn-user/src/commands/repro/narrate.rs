//! Prints the steps: as numbered lines with a chart at the end for people, or as one JSON object per step.
//! Only this module writes to stdout in `repro`.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use anyhow::Result;

use super::{
    ReproMode,
    draw::{chart, initial_seq},
    step::{BindResult, CloseKind, Progress, ReproStep, ReproSummary},
};
use crate::event::text::group_thousands;

/// Width of the columns with the number and the verb.
const VERB_COLUMN_WIDTH: usize = 14;

/// Prints each step to stdout when it happens.
#[derive(Debug)]
pub(super) struct Narrator {
    is_json: bool,
    last_number: usize,
}

impl Narrator {
    pub(super) fn new(is_json: bool) -> Self {
        Self { is_json, last_number: 0 }
    }

    pub(super) fn narrate(&mut self, step: &ReproStep) -> Result<()> {
        let text = if self.is_json { serde_json::to_string(step)? + "\n" } else { self.text(step) };
        crate::commands::print(text.as_bytes())
    }

    fn text(&mut self, step: &ReproStep) -> String {
        match step {
            ReproStep::Summary(summary) => closing_text(summary),
            step => self.numbered(&step_lines(step)),
        }
    }

    fn numbered(&mut self, lines: &[(&str, String)]) -> String {
        let mut text = String::new();
        if self.last_number == 0 {
            let pid = std::process::id();
            let _ = writeln!(text, "One TCP socket of process {pid} connects to itself:\n");
        }
        for (verb, line) in lines {
            let number = if verb.is_empty() {
                String::new()
            } else {
                self.last_number += 1;
                format!("{:>3}. {verb}", self.last_number)
            };
            let line = format!("{number:VERB_COLUMN_WIDTH$}{line}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

/// The lines of a step, each with a verb. A line without a verb continues the line before it.
fn step_lines(step: &ReproStep) -> Vec<(&'static str, String)> {
    match step {
        ReproStep::Bound { local, chosen_by_kernel } => {
            let chosen = if *chosen_by_kernel { ", a port that the kernel chose" } else { "" };
            vec![("bind", format!("{local}{chosen}"))]
        }
        ReproStep::Connecting { remote, range: (low, high), expected_dials, .. } => {
            let expected = group_thousands((*expected_dials).into());
            vec![
                ("retry", format!("{remote}, where nobody listens, until it succeeds")),
                ("", format!("source ports {low}-{high}: one attempt in {expected} connects to itself")),
            ]
        }
        ReproStep::Progress(Progress { attempts, per_second, chance, .. }) => {
            let (attempts, speed) = (group_thousands(*attempts), group_thousands(*per_second as u64));
            let chance = chance * 100.0;
            vec![("", format!("{attempts} attempts, {speed} per second, probability so far {chance:.1} %"))]
        }
        ReproStep::Connected { remote, duration_ns, progress: None } => {
            let duration = format_duration(*duration_ns);
            vec![("connect", format!("{remote}, where nobody listens: done in {duration}"))]
        }
        ReproStep::Connected { duration_ns, progress: Some(progress), .. } => {
            let (duration, speed) =
                (format_duration(*duration_ns), group_thousands(progress.per_second as u64));
            let chance = progress.chance * 100.0;
            vec![
                ("connect", format!("attempt {} connected to itself", group_thousands(progress.attempts))),
                ("", format!("after {duration}, {speed} attempts/s; probability so far: {chance:.1} %")),
            ]
        }
        ReproStep::Checked { local, remote, state } => {
            let row = match state {
                Some(state) => &format!("{state}, with both addresses equal"),
                None => "no such connection",
            };
            vec![
                ("look", format!("getsockname()   {local}")),
                ("", format!("getpeername()   {remote}")),
                ("", table_row(*local, row)),
            ]
        }
        ReproStep::Echoed { text, bytes } => vec![
            ("write", format!("{text:?}, {bytes} bytes")),
            ("read", format!("{text:?}, {bytes} bytes: its own")),
        ],
        ReproStep::Holding { seconds, port } => vec![
            ("hold", format!("for {seconds} s, or until SIGINT (Ctrl-C) or SIGTERM")),
            ("", format!("in another terminal: ss -tanpe sport = :{port} dport = :{port}")),
        ],
        ReproStep::Closed { how: CloseKind::Fin } => vec![("close", String::new())],
        ReproStep::Closed { how: CloseKind::Destroyed } => {
            vec![("close", "another process had already destroyed the connection".to_owned())]
        }
        ReproStep::After { endpoint, state, port_blocked_ns, bind, bind_reuseaddr } => {
            let row = match (state, port_blocked_ns) {
                (Some(state), Some(left)) => {
                    &format!("{state}, for {} more; no process holds it", format_duration(*left))
                }
                (Some(state), None) => *state,
                (None, _) => "no entry left",
            };
            let bind = match (bind, bind_reuseaddr) {
                (BindResult::Free, _) => "works: the port is free",
                (BindResult::InUse, BindResult::InUse) => "EADDRINUSE, with SO_REUSEADDR as well",
                (BindResult::InUse, BindResult::Free) => "EADDRINUSE, but works with SO_REUSEADDR",
            };
            vec![("look", table_row(*endpoint, row)), ("", format!("bind() again    {bind}"))]
        }
        ReproStep::Summary(_) => Vec::new(),
    }
}

/// A socket with an IPv4-mapped address is in the table of IPv6.
fn table_row(endpoint: SocketAddr, row: &str) -> String {
    let file = if endpoint.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    format!("{file:<16}{row}")
}

/// The text after the last step: the chart and the advice.
fn closing_text(summary: &ReproSummary) -> String {
    let drawing = chart(summary);
    let heading = match &summary.segments {
        Some(segments) => format!(
            "The segments, captured on lo. The numbers count from {}, and the time is\n\
             since the segment before:",
            initial_seq(segments)
        ),
        None => {
            let why = summary.not_captured.as_deref().unwrap_or("many connections");
            format!("The segments, drawn from the rules of TCP. They were not captured:\n{why}")
        }
    };
    let mut text = format!("\n{heading}\n\n{drawing}\n");
    let port = summary.port;
    if summary.port_blocked_ns.is_some() {
        let _ = write!(
            text,
            "Port {port} stays taken until TIME_WAIT ends. No process holds it.\n\
             Root can free it at once (Linux 6.1 or newer):\n\n    \
             ss -tK state time-wait sport = :{port} dport = :{port}\n\n"
        );
    }
    text.push_str(match summary.mode {
        ReproMode::Bind => {
            "To prevent this: a client that binds a port must never connect to the same port,\n\
             and every client can compare getsockname() with getpeername().\n"
        }
        ReproMode::Retry => {
            "To prevent this: list the ports of local services in\n\
             net.ipv4.ip_local_reserved_ports. The kernel never chooses them as source ports.\n"
        }
    });
    text
}

fn format_duration(ns: u64) -> String {
    format!("{:.1?}", Duration::from_nanos(ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrated(steps: &[ReproStep]) -> String {
        let mut narrator = Narrator::new(false);
        steps.iter().map(|step| narrator.text(step)).collect()
    }

    fn summary(mode: ReproMode, attempts: u64, how: CloseKind, port_blocked_ns: Option<u64>) -> ReproStep {
        let endpoint: SocketAddr = "127.0.0.1:40029".parse().unwrap();
        ReproStep::Summary(ReproSummary {
            pid: 7,
            tid: 7,
            comm: None,
            thread_comm: None,
            netns: None,
            mode,
            cause: "",
            family: "",
            addr: endpoint.ip(),
            ifindex: None,
            port: endpoint.port(),
            attempts,
            bytes_sent: 24,
            bytes_received: 24,
            duration_ns: 1,
            how,
            port_blocked_ns,
            segments: None,
            not_captured: Some("no permission".to_owned()),
        })
    }

    #[test]
    fn the_textbook_client_is_printed_as_numbered_steps_and_a_chart() {
        let local: SocketAddr = "127.0.0.1:40029".parse().unwrap();
        let blocked_ns = Some(59_990_000_000);
        let got = narrated(&[
            ReproStep::Bound { local, chosen_by_kernel: true },
            ReproStep::Connected { remote: local, duration_ns: 70_400, progress: None },
            ReproStep::Checked { local, remote: local, state: Some("ESTABLISHED") },
            ReproStep::Echoed { text: "hello", bytes: 5 },
            ReproStep::Closed { how: CloseKind::Fin },
            ReproStep::After {
                endpoint: local,
                state: Some("TIME_WAIT"),
                port_blocked_ns: blocked_ns,
                bind: BindResult::InUse,
                bind_reuseaddr: BindResult::InUse,
            },
            summary(ReproMode::Bind, 1, CloseKind::Fin, blocked_ns),
        ]);
        let want = "
  1. bind     127.0.0.1:40029, a port that the kernel chose
  2. connect  127.0.0.1:40029, where nobody listens: done in 70.4µs
  3. look     getsockname()   127.0.0.1:40029
              getpeername()   127.0.0.1:40029
              /proc/net/tcp   ESTABLISHED, with both addresses equal
  4. write    \"hello\", 5 bytes
  5. read     \"hello\", 5 bytes: its own
  6. close
  7. look     /proc/net/tcp   TIME_WAIT, for 60.0s more; no process holds it
              bind() again    EADDRINUSE, with SO_REUSEADDR as well

The segments, drawn from the rules of TCP. They were not captured:
no permission

    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   connect(): out to its own port
                 │<───────────────────────╯   its own SYN: a simultaneous open
    SYN_RECV     ├──── SYN+ACK ───────────╮   it answers itself
                 │<───────────────────────╯   and is answered
    ESTABLISHED  ├──── ACK ───────────────╮   connect() returns
                 │<───────────────────────╯
                 ├──── 24 bytes ──────────╮   write()
                 │<───────────────────────╯   read() gets the same bytes
                 ├──── ACK ───────────────╮
                 │<───────────────────────╯
    FIN_WAIT1    ├──── FIN ───────────────╮   close()
                 │<───────────────────────╯   its own FIN: a simultaneous close
    CLOSING      ├──── ACK ───────────────╮
                 │<───────────────────────╯
    TIME_WAIT    ┴                            no process; blocks port for 60 s

Port 40029 stays taken until TIME_WAIT ends. No process holds it.
";
        assert!(got.contains(want), "\n{got}");
    }

    #[test]
    fn the_accident_and_a_destroyed_connection_are_printed() {
        let remote: SocketAddr = "[::1]:40000".parse().unwrap();
        let progress =
            Progress { attempts: 6901, per_second: 57_000.4, expected_dials: 14_116, chance: 0.3867 };
        let got = narrated(&[
            ReproStep::Connecting { remote, range: (32768, 60999), expected_dials: 14_116, limit: 141_160 },
            ReproStep::Progress(progress),
            ReproStep::Connected { remote, duration_ns: 121_000_000, progress: Some(progress) },
            ReproStep::Checked { local: remote, remote, state: None },
            ReproStep::Closed { how: CloseKind::Destroyed },
            ReproStep::After {
                endpoint: remote,
                state: None,
                port_blocked_ns: None,
                bind: BindResult::Free,
                bind_reuseaddr: BindResult::Free,
            },
            summary(ReproMode::Retry, 6901, CloseKind::Destroyed, None),
        ]);
        let want = "
  1. retry    [::1]:40000, where nobody listens, until it succeeds
              source ports 32768-60999: one attempt in 14,116 connects to itself
              6,901 attempts, 57,000 per second, probability so far 38.7 %
  2. connect  attempt 6,901 connected to itself
              after 121.0ms, 57,000 attempts/s; probability so far: 38.7 %
  3. look     getsockname()   [::1]:40000
              getpeername()   [::1]:40000
              /proc/net/tcp6  no such connection
  4. close    another process had already destroyed the connection
  5. look     /proc/net/tcp6  no entry left
              bind() again    works: the port is free

The segments, drawn from the rules of TCP. They were not captured:
no permission

    SYN_SENT     ├──── SYN ──────────────>╳   no listener: refused by RST,
    CLOSE        ┴                            6,900 sockets, each with
                                              another source port than 40029
    CLOSE        ┬                            one socket
    SYN_SENT     ├──── SYN ───────────────╮   connect(), now from port 40029
";
        assert!(got.contains(want), "\n{got}");
        let end = "
                 │<───────────────────────╯
    CLOSE        ╳                            destroyed: no FIN, so no TIME_WAIT

To prevent this";
        assert!(got.contains(end), "\n{got}");
    }
}
