//! What we say while we work: a line a step on stderr, and for slow steps what they are at.

use std::{
    io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _},
    process::{Command, ExitStatus},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// How often a line appears where nobody can watch one change.
const PACE: Duration = Duration::from_secs(10);

/// Says one line.
pub(crate) fn say(line: impl AsRef<str>) {
    eprintln!("xtask: {}", line.as_ref());
}

/// How a step ended.
pub(crate) struct Finished {
    /// None: it took longer than it was given, and was killed.
    status: Option<ExitStatus>,
    /// All it wrote, both streams in order.
    pub(crate) output: String,
}

impl Finished {
    /// It did what it should.
    pub(crate) fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// It was ended by us.
    pub(crate) fn took_too_long(&self) -> bool {
        self.status.is_none()
    }

    /// An error if it failed, after all it wrote.
    pub(crate) fn must_have_succeeded(&self, what: &str) -> Result<()> {
        if self.succeeded() {
            return Ok(());
        }
        eprint!("{}", self.output);
        let how = if self.status.is_some() { "failed" } else { "took too long" };
        bail!("{what} {how}: what it said is above")
    }

    /// Shows all that a compiler of ours wrote if it warned.
    pub(crate) fn show_warnings(&self) {
        if self.output.lines().any(|line| line.starts_with("warning")) {
            eprint!("{}", self.output);
        }
    }

    /// Why not, in few words.
    pub(crate) fn why(&self) -> String {
        let Some(status) = self.status else { return "took too long".to_owned() };
        let said = self.output.lines().find(|line| line.contains("error:"));
        let said = said.or_else(|| self.output.lines().rev().find(|line| !line.trim().is_empty()));
        let Some(said) = said.map(|line| line.trim().trim_start_matches("error: ")) else {
            return status.to_string();
        };
        let short: String = said.chars().take(MOST).collect();
        if short == said { short } else { format!("{short}…") }
    }
}

/// Of a line that explains: some tools put a page into one.
const MOST: usize = 120;

/// Runs a step that must succeed; if it does not, shows all it wrote.
pub(crate) fn must(what: &str, command: Command) -> Result<()> {
    run(what, command, None)?.must_have_succeeded(what)
}

/// Runs a step, at most so long, and shows that it lives.
pub(crate) fn run(what: &str, command: Command, limit: Option<Duration>) -> Result<Finished> {
    run_with(what, command, limit, |_| None)
}

/// The same of a step that speaks to us: a line that `hear` takes is no output, and what it answers is shown.
pub(crate) fn run_with(
    what: &str,
    mut command: Command,
    limit: Option<Duration>,
    mut hear: impl FnMut(&str) -> Option<String>,
) -> Result<Finished> {
    let program = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = io::pipe().context("make a pipe")?;
    let both = writer.try_clone().context("make a pipe")?;
    let spawned = command.stdin(std::process::Stdio::null()).stdout(writer).stderr(both).spawn();
    // It holds the pipe's other ends, without which the reader would never see the end.
    drop(command);
    let mut child = spawned.with_context(|| format!("run {program}"))?;

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n') {
            let Ok(line) = line else { break };
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });

    let mut display = Display::new(what);
    let mut output = String::new();
    loop {
        match lines.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => match hear(&line) {
                Some(heard) => display.now_at(&heard),
                None => {
                    output.push_str(&line);
                    output.push('\n');
                    display.now_at(&line);
                }
            },
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        display.tick();
        if limit.is_some_and(|limit| display.began.elapsed() > limit) {
            // A child of its own may keep the pipe open, so don't read on.
            child.kill().with_context(|| format!("end {program}"))?;
            child.wait().with_context(|| format!("wait for {program}"))?;
            display.finish();
            return Ok(Finished { status: None, output });
        }
    }
    let status = child.wait().with_context(|| format!("wait for {program}"))?;
    display.finish();
    Ok(Finished { status: Some(status), output })
}

/// The line of a running step: rewritten in place on a terminal, repeated at a slow pace elsewhere.
struct Display<'a> {
    what: &'a str,
    began: Instant,
    said: Instant,
    at: String,
    terminal: bool,
}

impl<'a> Display<'a> {
    fn new(what: &'a str) -> Self {
        let (now, terminal) = (Instant::now(), io::stderr().is_terminal());
        if terminal {
            eprint!("xtask: {what}");
        } else {
            say(what);
        }
        Self { what, began: now, said: now, at: String::new(), terminal }
    }

    fn now_at(&mut self, line: &str) {
        // Only the end of a line that was rewritten with carriage returns.
        let line = line.rsplit('\r').find(|part| !part.trim().is_empty()).unwrap_or_default();
        if !line.is_empty() {
            self.at = line.trim().chars().filter(|letter| !letter.is_control()).collect();
        }
    }

    fn tick(&mut self) {
        let pace = if self.terminal { Duration::from_millis(200) } else { PACE };
        if self.said.elapsed() < pace || self.began.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.said = Instant::now();
        let line = format!("xtask: {}: {}: {}", self.what, seconds(self.began.elapsed()), self.at);
        if self.terminal {
            let width =
                rustix::termios::tcgetwinsize(io::stderr()).map_or(80, |size| usize::from(size.ws_col));
            let shown: String = line.chars().take(width.saturating_sub(1).max(20)).collect();
            eprint!("\r\x1b[2K{shown}");
            // Nothing to be done about a terminal that is gone.
            let _ = io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
    }

    fn finish(&self) {
        let took = self.began.elapsed();
        if self.terminal {
            eprintln!("\r\x1b[2Kxtask: {} ({})", self.what, seconds(took));
        } else if took >= PACE {
            say(format!("{}: took {}", self.what, seconds(took)));
        }
    }
}

/// A duration for people.
pub(crate) fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}
