//! Prints the steps: as numbered lines with a chart at the end for people, as one JSON object per step, or as
//! one line per connection in a run of many connections. Only this module writes to stdout in `repro`.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context, Result};

use super::ReproMode;
use super::address::EndpointText;
use super::draw::{Chart, chart, group_thousands};
use super::step::{AfterClose, BindResult, Checked, CloseKind, Progress, ReproStep, ReproSummary};
use super::table::proc_file;

/// Width of the columns with the number and the verb.
const VERB_COLUMN_WIDTH: usize = 14;

/// The output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NarrationStyle {
    NumberedSteps,
    /// One line for each connection.
    OneLine,
    Json,
}

/// Prints each step to stdout when it happens.
#[derive(Debug)]
pub(super) struct Narrator {
    style: NarrationStyle,
    is_terminal: bool,
    last_number: usize,
    /// The terminal shows a progress line, which the next output overwrites.
    has_progress_line: bool,
}

/// The reader closed stdout. This ends the program without an error.
#[derive(Debug)]
pub(super) struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stdout is closed")
    }
}

impl std::error::Error for StdoutClosed {}

impl Narrator {
    pub(super) fn new(style: NarrationStyle) -> Self {
        Self { style, is_terminal: io::stdout().is_terminal(), last_number: 0, has_progress_line: false }
    }

    pub(super) fn narrate(&mut self, step: &ReproStep) -> Result<()> {
        let text = match (self.style, step) {
            (NarrationStyle::Json, step) => serde_json::to_string(step)? + "\n",
            (NarrationStyle::OneLine, ReproStep::Summary(summary)) => one_line(summary),
            (NarrationStyle::OneLine, _) => return Ok(()),
            (NarrationStyle::NumberedSteps, ReproStep::Progress(progress)) => return self.progress(progress),
            (NarrationStyle::NumberedSteps, ReproStep::Summary(summary)) => closing_text(summary),
            (NarrationStyle::NumberedSteps, step) => self.number_steps(&step_lines(step)),
        };
        let text = if std::mem::take(&mut self.has_progress_line) { format!("\r\x1b[K{text}") } else { text };
        write(&text)
    }

    /// The interval of progress output: shorter on a terminal, which updates one line, than in a file, which
    /// grows.
    pub(super) fn progress_interval(&self) -> Duration {
        if self.is_terminal { Duration::from_millis(100) } else { Duration::from_secs(1) }
    }

    fn progress(&mut self, progress: &Progress) -> Result<()> {
        let line = format!("{:VERB_COLUMN_WIDTH$}{}", "", format_progress(progress));
        self.has_progress_line = self.is_terminal;
        write(&if self.is_terminal { format!("\r{line}\x1b[K") } else { format!("{line}\n") })
    }

    fn number_steps(&mut self, lines: &[(&str, String)]) -> String {
        let mut text = String::new();
        if self.last_number == 0 {
            let pid = std::process::id();
            let _ = writeln!(text, "One TCP socket of process {pid} connects to itself:\n");
        }
        for (verb, line) in lines {
            if verb.is_empty() {
                let _ = writeln!(text, "{:VERB_COLUMN_WIDTH$}{line}", "");
            } else {
                self.last_number += 1;
                let line =
                    format!("{:>3}. {verb:<width$}{line}", self.last_number, width = VERB_COLUMN_WIDTH - 5);
                let _ = writeln!(text, "{}", line.trim_end());
            }
        }
        text
    }
}

impl Drop for Narrator {
    fn drop(&mut self) {
        // An error message follows, and must start on a new line.
        if self.has_progress_line {
            let _ = write("\n");
        }
    }
}

fn write(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        result => result.context("cannot write to stdout"),
    }
}

/// The lines of a step. A line without a verb continues the line before it.
fn step_lines(step: &ReproStep) -> Vec<(&'static str, String)> {
    match step {
        ReproStep::Bound(bound) => {
            let chosen = if bound.chosen_by_kernel { ", a port that the kernel chose" } else { "" };
            vec![("bind", format!("{}{chosen}", bound.local))]
        }
        ReproStep::Connecting(connecting) => vec![
            ("retry", format!("{}, where nobody listens, until it succeeds", connecting.remote)),
            (
                "",
                format!(
                    "source ports {}: one attempt in {} connects to itself",
                    connecting.range,
                    group_thousands(connecting.expected_dials.into())
                ),
            ),
        ],
        ReproStep::Connected(connected) => match &connected.progress {
            None => {
                let duration = format_duration(connected.duration_ns);
                vec![("connect", format!("{}, where nobody listens: done in {duration}", connected.remote))]
            }
            Some(progress) => vec![
                ("connect", format!("attempt {} connected to itself", group_thousands(progress.attempts))),
                (
                    "",
                    format!(
                        "after {}, {} attempts/s; probability so far: {:.1} %",
                        format_duration(connected.duration_ns),
                        group_thousands(progress.per_second as u64),
                        progress.chance * 100.0
                    ),
                ),
            ],
        },
        ReproStep::Checked(checked) => endpoint_lines(checked),
        ReproStep::Echoed(echoed) => vec![
            ("write", format!("{:?}, {} bytes", echoed.text, echoed.bytes)),
            ("read", format!("{:?}, {} bytes: its own", echoed.text, echoed.bytes)),
        ],
        ReproStep::Holding { seconds, port } => {
            vec![
                ("hold", format!("for {seconds} s, or until SIGINT (Ctrl-C) or SIGTERM")),
                ("", format!("in another terminal: ss -tanpe sport = :{port} dport = :{port}")),
            ]
        }
        ReproStep::Closed { how: CloseKind::Fin } => vec![("close", String::new())],
        ReproStep::Closed { how: CloseKind::Destroyed } => {
            vec![("close", "another process had already destroyed the connection".to_owned())]
        }
        ReproStep::After(after) => after_close_lines(after),
        // These two are not numbered steps.
        ReproStep::Progress(_) | ReproStep::Summary(_) => Vec::new(),
    }
}

fn endpoint_lines(checked: &Checked) -> Vec<(&'static str, String)> {
    let row = match checked.state {
        Some(state) => format!("{}, with both addresses equal", state.0),
        None => "no such connection".to_owned(),
    };
    vec![
        ("look", format!("getsockname()   {}", checked.local)),
        ("", format!("getpeername()   {}", checked.remote)),
        ("", format!("{:<16}{row}", proc_file(checked.local.0))),
    ]
}

fn after_close_lines(after: &AfterClose) -> Vec<(&'static str, String)> {
    let row = match (after.state, after.port_blocked_ns) {
        (Some(state), Some(left)) => {
            format!("{}, for {} more; no process holds it", state.0, format_duration(left))
        }
        (Some(state), None) => state.0.to_owned(),
        (None, _) => "no entry left".to_owned(),
    };
    let bind = match (after.bind, after.bind_reuseaddr) {
        (BindResult::Free, _) => "works: the port is free",
        (BindResult::InUse, BindResult::InUse) => "EADDRINUSE, with SO_REUSEADDR as well",
        (BindResult::InUse, BindResult::Free) => "EADDRINUSE, but works with SO_REUSEADDR",
    };
    vec![("look", format!("{:<16}{row}", proc_file(after.endpoint))), ("", format!("bind() again    {bind}"))]
}

/// The text after the last step: the chart and the advice.
fn closing_text(summary: &ReproSummary) -> String {
    let time_wait = summary.port_blocked_ns.map(Duration::from_nanos);
    let drawing = chart(&Chart {
        endpoint: summary.endpoint,
        refused_connects: summary.attempts - 1,
        bytes: summary.bytes_sent,
        how: summary.how,
        time_wait,
    });
    let mut text = format!("\nThe segments (drawn from the rules of TCP, not captured):\n\n{drawing}\n");
    let port = summary.port;
    if time_wait.is_some() {
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

fn one_line(summary: &ReproSummary) -> String {
    let noun = if summary.attempts == 1 { "attempt" } else { "attempts" };
    format!("{}: {} {noun}\n", EndpointText(summary.endpoint), group_thousands(summary.attempts))
}

fn format_progress(progress: &Progress) -> String {
    format!(
        "{} attempts, {} per second, probability so far {:.1} %",
        group_thousands(progress.attempts),
        group_thousands(progress.per_second as u64),
        progress.chance * 100.0
    )
}

fn format_duration(ns: u64) -> String {
    format!("{:.1?}", Duration::from_nanos(ns))
}

#[cfg(test)]
mod tests {
    use super::super::step::{Bound, ConnectLoop, Connected, Echoed};
    use super::super::table::State;
    use super::*;
    use crate::ports::PortRange;

    fn narrated(steps: &[ReproStep]) -> String {
        let mut narrator = Narrator {
            style: NarrationStyle::NumberedSteps,
            is_terminal: false,
            last_number: 0,
            has_progress_line: false,
        };
        steps.iter().map(|step| narrator.number_steps(&step_lines(step))).collect()
    }

    fn steps_after_connect(endpoint: EndpointText) -> [ReproStep; 4] {
        [
            ReproStep::Checked(Checked {
                local: endpoint,
                remote: endpoint,
                state: Some(State::ESTABLISHED),
            }),
            ReproStep::Echoed(Echoed { text: "hello".to_owned(), bytes: 5 }),
            ReproStep::Closed { how: CloseKind::Fin },
            ReproStep::After(AfterClose {
                endpoint: endpoint.0,
                state: Some(State::TIME_WAIT),
                port_blocked_ns: Some(59_990_000_000),
                bind: BindResult::InUse,
                bind_reuseaddr: BindResult::InUse,
            }),
        ]
    }

    #[test]
    fn the_textbook_client_is_printed_as_numbered_steps() {
        let local = EndpointText("127.0.0.1:40029".parse().unwrap());
        let mut steps = vec![
            ReproStep::Bound(Bound { local, chosen_by_kernel: true }),
            ReproStep::Connected(Connected { remote: local, duration_ns: 70_400, progress: None }),
        ];
        steps.extend(steps_after_connect(local));
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
";
        let got = narrated(&steps);
        assert!(got.ends_with(want), "\n{got}");
    }

    #[test]
    fn the_accident_is_printed_with_its_probability() {
        let remote = EndpointText("[::1]:40000".parse().unwrap());
        let range = PortRange::parse("32768 60999").unwrap();
        let progress =
            Progress { attempts: 6901, per_second: 57_000.4, expected_dials: 14_116, chance: 0.3867 };
        let mut steps = vec![
            ReproStep::Connecting(ConnectLoop { remote, range, expected_dials: 14_116, limit: 141_160 }),
            ReproStep::Connected(Connected { remote, duration_ns: 121_000_000, progress: Some(progress) }),
        ];
        steps.extend(steps_after_connect(remote));
        let want = "
  1. retry    [::1]:40000, where nobody listens, until it succeeds
              source ports 32768-60999: one attempt in 14,116 connects to itself
  2. connect  attempt 6,901 connected to itself
              after 121.0ms, 57,000 attempts/s; probability so far: 38.7 %
  3. look     getsockname()   [::1]:40000
              getpeername()   [::1]:40000
              /proc/net/tcp6  ESTABLISHED, with both addresses equal
";
        let got = narrated(&steps);
        assert!(got.contains(want), "\n{got}");
        assert!(got.lines().all(|line| line.chars().count() <= 80), "\n{got}");
    }

    #[test]
    fn missing_rows_and_states_are_printed() {
        let endpoint = EndpointText("127.0.0.1:40029".parse().unwrap());
        let got = narrated(&[
            ReproStep::Checked(Checked { local: endpoint, remote: endpoint, state: None }),
            ReproStep::Closed { how: CloseKind::Destroyed },
            ReproStep::After(AfterClose {
                endpoint: endpoint.0,
                state: None,
                port_blocked_ns: None,
                bind: BindResult::Free,
                bind_reuseaddr: BindResult::Free,
            }),
        ]);
        for want in
            ["no such connection", "had already destroyed", "no entry left", "works: the port is free"]
        {
            assert!(got.contains(want), "{want}\n{got}");
        }
        assert!(!got.contains("TIME_WAIT") && !got.contains("ESTABLISHED"), "\n{got}");
    }
}
