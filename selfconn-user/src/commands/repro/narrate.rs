//! How the steps are told: numbered lines for people with the chart at the end, one JSON object a step, or one
//! line a connection when there are many. The only writer of stdout in `repro`.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Mode;
use super::address::Endpoint;
use super::draw::{Chart, chart, grouped};
use super::step::{After, Bind, Checked, How, Progress, Step, Summary};
use super::table::table_of;

/// The verb's column ends here.
const INDENT: usize = 14;

/// How the steps are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Story,
    /// A line for each connection.
    Lines,
    Json,
}

/// Tells the steps on stdout, each as it happens.
#[derive(Debug)]
pub(super) struct Narrator {
    style: Style,
    terminal: bool,
    number: usize,
    /// A line of progress stands on the terminal and is to be written over.
    unfinished: bool,
}

/// Nobody reads stdout any more. An end like another, not a failure.
#[derive(Debug)]
pub(super) struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stdout is closed")
    }
}

impl std::error::Error for StdoutClosed {}

impl Narrator {
    pub(super) fn new(style: Style) -> Self {
        Self { style, terminal: io::stdout().is_terminal(), number: 0, unfinished: false }
    }

    /// Tells one step.
    pub(super) fn tell(&mut self, step: &Step) -> Result<()> {
        let text = match (self.style, step) {
            (Style::Json, step) => serde_json::to_string(step)? + "\n",
            (Style::Lines, Step::Summary(summary)) => one_line(summary),
            (Style::Lines, _) => return Ok(()),
            (Style::Story, Step::Progress(progress)) => return self.progress(progress),
            (Style::Story, Step::Summary(summary)) => ending(summary),
            (Style::Story, step) => self.number_steps(&step_lines(step)),
        };
        let text = if std::mem::take(&mut self.unfinished) { format!("\r\x1b[K{text}") } else { text };
        write(&text)
    }

    /// How often progress is worth telling: a terminal has a line that moves, a file grows by each one.
    pub(super) fn pace(&self) -> Duration {
        if self.terminal { Duration::from_millis(100) } else { Duration::from_secs(1) }
    }

    fn progress(&mut self, progress: &Progress) -> Result<()> {
        let line = format!("{:INDENT$}{}", "", so_far(progress));
        self.unfinished = self.terminal;
        write(&if self.terminal { format!("\r{line}\x1b[K") } else { format!("{line}\n") })
    }

    fn number_steps(&mut self, lines: &[(&str, String)]) -> String {
        let mut text = String::new();
        if self.number == 0 {
            let pid = std::process::id();
            let _ = writeln!(text, "One TCP socket of process {pid} connects to itself:\n");
        }
        for (verb, line) in lines {
            if verb.is_empty() {
                let _ = writeln!(text, "{:INDENT$}{line}", "");
            } else {
                self.number += 1;
                let line = format!("{:>3}. {verb:<width$}{line}", self.number, width = INDENT - 5);
                let _ = writeln!(text, "{}", line.trim_end());
            }
        }
        text
    }
}

impl Drop for Narrator {
    fn drop(&mut self) {
        // An error follows, and begins on a line of its own.
        if self.unfinished {
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

/// The lines of a step; one without a verb goes on with the step before it.
fn step_lines(step: &Step) -> Vec<(&'static str, String)> {
    match step {
        Step::Bound(bound) => {
            let chosen = if bound.chosen_by_kernel { ", a port that the kernel chose" } else { "" };
            vec![("bind", format!("{}{chosen}", bound.local))]
        }
        Step::Dialling(dialling) => vec![
            ("dial", format!("{}, where nobody listens, until it answers", dialling.remote)),
            (
                "",
                format!(
                    "source ports come from {}: one dial in {} hits itself",
                    dialling.range,
                    grouped(dialling.expected_dials.into())
                ),
            ),
        ],
        Step::Connected(connected) => match &connected.dialled {
            None => {
                let took = length(connected.duration_ns);
                vec![("connect", format!("{}, where nobody listens: done in {took}", connected.remote))]
            }
            Some(dialled) => vec![
                ("connect", format!("dial {} was answered: by itself", grouped(dialled.attempts))),
                (
                    "",
                    format!(
                        "after {}, {} dials a second; chance by then: {:.1} %",
                        length(connected.duration_ns),
                        grouped(dialled.per_second as u64),
                        dialled.chance * 100.0
                    ),
                ),
            ],
        },
        Step::Checked(checked) => look_at_ends(checked),
        Step::Echoed(echoed) => vec![
            ("write", format!("{:?}, {} bytes", echoed.text, echoed.bytes)),
            ("read", format!("{:?}, {} bytes: its own", echoed.text, echoed.bytes)),
        ],
        Step::Holding { seconds, port } => {
            vec![
                ("hold", format!("for {seconds} s, or until SIGINT (Ctrl-C) or SIGTERM")),
                ("", format!("look at it elsewhere: ss -tanpe sport = :{port} dport = :{port}")),
            ]
        }
        Step::Closed { how: How::Fin } => vec![("close", String::new())],
        Step::Closed { how: How::Destroyed } => {
            vec![("close", "somebody had destroyed the connection already".to_owned())]
        }
        Step::After(after) => look_at_remains(after),
        // These two are no numbered steps.
        Step::Progress(_) | Step::Summary(_) => Vec::new(),
    }
}

fn look_at_ends(checked: &Checked) -> Vec<(&'static str, String)> {
    let row = match checked.state {
        Some(state) => format!("{}, with both addresses equal", state.0),
        None => "no such connection".to_owned(),
    };
    vec![
        ("look", format!("getsockname()   {}", checked.local)),
        ("", format!("getpeername()   {}", checked.remote)),
        ("", format!("{:<16}{row}", table_of(checked.local.0))),
    ]
}

fn look_at_remains(after: &After) -> Vec<(&'static str, String)> {
    let row = match (after.state, after.port_blocked_ns) {
        (Some(state), Some(left)) => {
            format!("{}, for {} more; no process has it", state.0, length(left))
        }
        (Some(state), None) => state.0.to_owned(),
        (None, _) => "nothing left".to_owned(),
    };
    let bind = match (after.bind, after.bind_reuseaddr) {
        (Bind::Free, _) => "works: the port is free",
        (Bind::InUse, Bind::InUse) => "EADDRINUSE, with SO_REUSEADDR as well",
        (Bind::InUse, Bind::Free) => "EADDRINUSE, but works with SO_REUSEADDR",
    };
    vec![("look", format!("{:<16}{row}", table_of(after.endpoint))), ("", format!("bind() again    {bind}"))]
}

/// What comes after the last step: the chart, and what to do about it.
fn ending(summary: &Summary) -> String {
    let time_wait = summary.port_blocked_ns.map(Duration::from_nanos);
    let drawing = chart(&Chart {
        endpoint: summary.endpoint,
        refused: summary.attempts - 1,
        bytes: summary.bytes_sent,
        how: summary.how,
        time_wait,
    });
    let mut text = format!("\nWhat TCP makes of it (drawn from its rules, not captured):\n\n{drawing}\n");
    let port = summary.port;
    if time_wait.is_some() {
        let _ = write!(
            text,
            "Port {port} is taken until the TIME_WAIT ends, and no process is left to stop.\n\
             Root can free it at once (Linux 6.1 or newer):\n\n    \
             ss -tK state time-wait sport = :{port} dport = :{port}\n\n"
        );
    }
    text.push_str(match summary.mode {
        Mode::Bind => {
            "Prevent it: a client that binds a port must never dial the same one, and every\n\
             client can compare getsockname() with getpeername() after connect().\n"
        }
        Mode::Retry => {
            "Prevent it: list the ports of local services in net.ipv4.ip_local_reserved_ports,\n\
             and the kernel never chooses one of them as a source port.\n"
        }
    });
    text
}

fn one_line(summary: &Summary) -> String {
    let dials = if summary.attempts == 1 { "dial" } else { "dials" };
    format!("{}: {} {dials}\n", Endpoint(summary.endpoint), grouped(summary.attempts))
}

fn so_far(progress: &Progress) -> String {
    format!(
        "{} dials, {} a second, a chance of {:.1} % by then",
        grouped(progress.attempts),
        grouped(progress.per_second as u64),
        progress.chance * 100.0
    )
}

fn length(ns: u64) -> String {
    format!("{:.1?}", Duration::from_nanos(ns))
}

#[cfg(test)]
mod tests {
    use super::super::step::{Bound, Connected, Dialling, Echoed};
    use super::super::table::State;
    use super::*;
    use crate::ports::PortRange;

    fn told(steps: &[Step]) -> String {
        let mut narrator = Narrator { style: Style::Story, terminal: false, number: 0, unfinished: false };
        steps.iter().map(|step| narrator.number_steps(&step_lines(step))).collect()
    }

    fn the_rest(endpoint: Endpoint) -> [Step; 4] {
        [
            Step::Checked(Checked { local: endpoint, remote: endpoint, state: Some(State::ESTABLISHED) }),
            Step::Echoed(Echoed { text: "hello".to_owned(), bytes: 5 }),
            Step::Closed { how: How::Fin },
            Step::After(After {
                endpoint: endpoint.0,
                state: Some(State::TIME_WAIT),
                port_blocked_ns: Some(59_990_000_000),
                bind: Bind::InUse,
                bind_reuseaddr: Bind::InUse,
            }),
        ]
    }

    #[test]
    fn the_textbook_client_is_told_in_numbered_steps() {
        let local = Endpoint("127.0.0.1:40029".parse().unwrap());
        let mut steps = vec![
            Step::Bound(Bound { local, chosen_by_kernel: true }),
            Step::Connected(Connected { remote: local, duration_ns: 70_400, dialled: None }),
        ];
        steps.extend(the_rest(local));
        let want = "
  1. bind     127.0.0.1:40029, a port that the kernel chose
  2. connect  127.0.0.1:40029, where nobody listens: done in 70.4µs
  3. look     getsockname()   127.0.0.1:40029
              getpeername()   127.0.0.1:40029
              /proc/net/tcp   ESTABLISHED, with both addresses equal
  4. write    \"hello\", 5 bytes
  5. read     \"hello\", 5 bytes: its own
  6. close
  7. look     /proc/net/tcp   TIME_WAIT, for 60.0s more; no process has it
              bind() again    EADDRINUSE, with SO_REUSEADDR as well
";
        let got = told(&steps);
        assert!(got.ends_with(want), "\n{got}");
    }

    #[test]
    fn the_accident_is_told_with_its_odds() {
        let remote = Endpoint("[::1]:40000".parse().unwrap());
        let range = PortRange::parse("32768 60999").unwrap();
        let dialled =
            Progress { attempts: 6901, per_second: 57_000.4, expected_dials: 14_116, chance: 0.3867 };
        let mut steps = vec![
            Step::Dialling(Dialling { remote, range, expected_dials: 14_116, limit: 141_160 }),
            Step::Connected(Connected { remote, duration_ns: 121_000_000, dialled: Some(dialled) }),
        ];
        steps.extend(the_rest(remote));
        let want = "
  1. dial     [::1]:40000, where nobody listens, until it answers
              source ports come from 32768-60999: one dial in 14,116 hits itself
  2. connect  dial 6,901 was answered: by itself
              after 121.0ms, 57,000 dials a second; chance by then: 38.7 %
  3. look     getsockname()   [::1]:40000
              getpeername()   [::1]:40000
              /proc/net/tcp6  ESTABLISHED, with both addresses equal
";
        let got = told(&steps);
        assert!(got.contains(want), "\n{got}");
        assert!(got.lines().all(|line| line.chars().count() <= 80), "\n{got}");
    }

    #[test]
    fn what_was_not_found_is_said() {
        let endpoint = Endpoint("127.0.0.1:40029".parse().unwrap());
        let got = told(&[
            Step::Checked(Checked { local: endpoint, remote: endpoint, state: None }),
            Step::Closed { how: How::Destroyed },
            Step::After(After {
                endpoint: endpoint.0,
                state: None,
                port_blocked_ns: None,
                bind: Bind::Free,
                bind_reuseaddr: Bind::Free,
            }),
        ]);
        for want in
            ["no such connection", "somebody had destroyed", "nothing left", "works: the port is free"]
        {
            assert!(got.contains(want), "{want}\n{got}");
        }
        assert!(!got.contains("TIME_WAIT") && !got.contains("ESTABLISHED"), "\n{got}");
    }
}
