//! `selfconn tail`: shows an event log or the journal as readable text. A connection is one line. A line that
//! is not an event is skipped and counted.

use std::{
    collections::{HashSet, VecDeque},
    ffi::OsString,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Error, Result, anyhow};
use jiff::Timestamp;

use crate::{
    event::text::{LogRecord, Style, parse},
    sockets::NamespaceSelection,
};
use filter::Filter;
use journal::JournalReader;
use lines::LineSplitter;
use source::{BLOCK_BYTES, FileChange, LastEventsSearch, LogSource};
use view::ConnectionView;
use wait::FileWatch;

mod filter;
mod journal;
mod lines;
mod source;
mod view;
mod wait;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn tail                                  the last events of the service's log
  selfconn tail -f --since 1h                    the last hour, then new events
  selfconn tail -n all --port 5432 events.jsonl  all events of one port
  zcat events.jsonl.*.gz | selfconn tail --comm java -";

/// The event log of the service.
const DEFAULT_LOG: &str = "/var/log/selfconn/events.jsonl";

/// Number of lines shown by default.
const DEFAULT_LINES: usize = 20;

#[derive(Debug, clap::Args)]
pub struct TailArgs {
    /// The event log; `-` is stdin
    #[arg(value_name = "FILE", default_value = DEFAULT_LOG)]
    file: PathBuf,
    /// Show the journal instead
    #[arg(long, conflicts_with = "file")]
    journal: bool,
    /// The journal whose files are in DIR, such as that of a mounted disk
    #[arg(long, value_name = "DIR", requires = "journal")]
    journal_dir: Option<PathBuf>,
    /// Wait for new events and show them, also after the log is rotated
    #[arg(short, long)]
    follow: bool,
    /// Number of existing events to show, or `all` [default: 20, or all with --since]
    #[arg(short = 'n', long, value_name = "N", value_parser = count)]
    lines: Option<usize>,
    /// Only events since then: 90s, 30m, 1h, 2d ago, or an RFC 3339 time
    #[arg(long, value_name = "WHEN", value_parser = |text: &str| filter::since(text, Timestamp::now()))]
    since: Option<Timestamp>,
    /// Only events about this port; this and the following filters may be repeated
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
    /// Only events that name this process
    #[arg(long, value_name = "PID")]
    pid: Vec<u32>,
    /// Only events that name a process or thread of this name
    #[arg(long, value_name = "NAME")]
    comm: Vec<String>,
    /// Only events that name this systemd unit
    #[arg(long, value_name = "NAME")]
    unit: Vec<String>,
    /// Only events that name the container whose id begins so
    #[arg(long, value_name = "ID")]
    container: Vec<String>,
    /// Only events of the host of this name
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// Only events of this network namespace: the current one, that of a file such as /run/netns/NAME or
    /// /proc/PID/ns/net, or the one with this inode; all are shown without it
    #[arg(long, value_name = "self|PATH|INODE|all")]
    netns: Vec<String>,
    /// Only events of this kind; `state` is shown only with this option
    #[arg(long, value_name = "EVENT")]
    event: Vec<String>,
    /// Print the JSON lines unchanged
    #[arg(long)]
    json: bool,
}

fn count(text: &str) -> Result<usize, String> {
    if text == "all" {
        return Ok(usize::MAX);
    }
    text.parse().map_err(|_| "neither a number nor `all`".to_owned())
}

/// Shows the existing events, and with `-f` new events as they come.
///
/// # Errors
/// If the log cannot be read or stdout cannot be written.
pub fn run(args: &TailArgs) -> Result<ExitCode> {
    let filter = Filter {
        since: args.since,
        ports: args.port.clone(),
        pids: args.pid.clone(),
        comms: args.comm.clone(),
        events: args.event.clone(),
        units: args.unit.clone(),
        containers: args.container.clone(),
        hosts: args.host.clone(),
        namespaces: namespaces(&args.netns)?,
    };
    let count = args.lines.unwrap_or(if args.since.is_some() { usize::MAX } else { DEFAULT_LINES });
    let mut output = TailOutput::new(filter, args.json);
    if args.journal {
        output.keep_last(count);
        journal(args, &mut output)?;
    } else if args.file == Path::new("-") {
        output.keep_last(count);
        stdin(&mut output)?;
    } else {
        file(args, count, &mut output)?;
    }
    output.report_skipped_lines();
    Ok(ExitCode::SUCCESS)
}

/// The inodes of these namespaces. Empty: all.
fn namespaces(arguments: &[String]) -> Result<Vec<u64>> {
    let mut inodes = Vec::new();
    for argument in arguments {
        match NamespaceSelection::parse(argument).inode().with_context(|| format!("--netns {argument}"))? {
            Some(inode) => inodes.push(inode),
            None => return Ok(Vec::new()),
        }
    }
    Ok(inodes)
}

fn journal(args: &TailArgs, output: &mut TailOutput) -> Result<()> {
    let mut journal = JournalReader::read(args.journal_dir.as_deref(), args.since)?;
    while let Some(line) = journal.next()? {
        output.push_line(Some(line.as_bytes()))?;
    }
    output.caught_up()?;
    if args.follow {
        let mut journal = journal.follow(args.journal_dir.as_deref())?;
        while let Some(line) = journal.next()? {
            output.push_line(Some(line.as_bytes()))?;
            output.caught_up()?;
        }
    }
    Ok(())
}

fn stdin(output: &mut TailOutput) -> Result<()> {
    let (mut lines, mut block, mut stdin) =
        (LineSplitter::default(), vec![0; BLOCK_BYTES], io::stdin().lock());
    loop {
        match stdin.read(&mut block) {
            Ok(0) => break,
            Ok(count) => lines.feed(&block[..count], |line| output.push_line(line))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read stdin"),
        }
    }
    output.skipped_lines += u64::from(lines.reset());
    Ok(output.caught_up()?)
}

fn file(args: &TailArgs, count: usize, output: &mut TailOutput) -> Result<()> {
    let path = &args.file;
    let with_path = |error| read_error(path, error);
    let mut source = LogSource::open(path).map_err(with_path)?;
    // Watch before the first read, so that no later change is missed.
    let wait = args.follow.then(|| FileWatch::on(path));
    let (mut lines, mut block) = (LineSplitter::default(), vec![0; BLOCK_BYTES]);
    match count {
        0 => source.seek_end().map_err(with_path)?,
        usize::MAX => {}
        _ => {
            let mut search = LastEventsSearch {
                filter: &output.filter,
                merges_connections: !args.json,
                remaining: count,
                closed: HashSet::new(),
            };
            source.seek_last(&mut search).map_err(with_path)?;
            // Too few events: the log may just have been rotated.
            if search.remaining > 0
                && let Ok(mut previous) = LogSource::open(&rotated_path(path))
            {
                previous.seek_last(&mut search).map_err(with_path)?;
                loop {
                    match previous.read(&mut block).map_err(with_path)? {
                        0 => break,
                        count => lines.feed(&block[..count], |line| output.push_line(line))?,
                    }
                }
                output.skipped_lines += u64::from(lines.reset());
            }
        }
    }
    loop {
        match source.follow(&mut block).map_err(with_path)? {
            FileChange::Bytes(count) => {
                lines.feed(&block[..count], |line| output.push_line(line))?;
                output.flush_if_full()?;
            }
            FileChange::Restarted => output.skipped_lines += u64::from(lines.reset()),
            FileChange::None => {
                output.caught_up()?;
                let Some(wait) = &wait else { break };
                output.report_skipped_lines();
                wait.wait()?;
            }
        }
    }
    // A line without a newline is incomplete and counts as skipped.
    output.skipped_lines += u64::from(lines.reset());
    Ok(())
}

/// Path of the most recently rotated log, as logrotate names it.
fn rotated_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".1");
    name.into()
}

fn read_error(path: &Path, error: io::Error) -> Error {
    let context = format!("cannot read the event log {}", path.display());
    if error.kind() == io::ErrorKind::NotFound {
        return anyhow!(
            "{context}: {error}: name a FILE that `selfconn run --log FILE` writes, or use --journal"
        );
    }
    Error::new(error).context(context)
}

/// The output on stdout: filter, form, and buffered text.
struct TailOutput {
    filter: Filter,
    /// `None`: lines are printed unchanged.
    view: Option<ConnectionView>,
    out: String,
    /// Maximum number of existing lines to show, and the newest lines so far.
    last: Option<(usize, VecDeque<String>)>,
    has_caught_up: bool,
    /// Number of lines that are not events.
    skipped_lines: u64,
    reported_skipped_lines: u64,
}

impl TailOutput {
    fn new(filter: Filter, is_json: bool) -> Self {
        let view = (!is_json).then(|| ConnectionView::new(Style::for_output(&io::stdout())));
        let (out, last) = (String::new(), None);
        Self { filter, view, out, last, has_caught_up: false, skipped_lines: 0, reported_skipped_lines: 0 }
    }

    /// Shows only the newest lines of a source that cannot be read backwards.
    fn keep_last(&mut self, count: usize) {
        if count != usize::MAX {
            self.last = Some((count, VecDeque::new()));
        }
    }

    /// Adds a line. `None` is a line that was too long.
    fn push_line(&mut self, line: Option<&[u8]>) -> io::Result<()> {
        let Some(line) = line else {
            self.skipped_lines += 1;
            return Ok(());
        };
        if line.is_empty() || self.filter.is_too_old(line) {
            return Ok(());
        }
        // An event is JSON and therefore UTF-8.
        let parsed = std::str::from_utf8(line).ok().and_then(|text| Some((text, parse(line)?)));
        let Some((text, fields)) = parsed.filter(|(_, fields)| !LogRecord::new(fields).event().is_empty())
        else {
            self.skipped_lines += 1;
            return Ok(());
        };
        if self.filter.matches(LogRecord::new(&fields)) {
            match &mut self.view {
                Some(view) => view.push(fields, &mut self.out),
                None => {
                    self.out.push_str(text);
                    self.out.push('\n');
                }
            }
            self.keep_newest();
        }
        self.flush_if_full()
    }

    /// Moves the buffered lines to the newest lines, if their number is limited.
    fn keep_newest(&mut self) {
        if let Some((count, kept)) = &mut self.last {
            kept.extend(self.out.split_inclusive('\n').map(ToOwned::to_owned));
            self.out.clear();
            kept.drain(..kept.len().saturating_sub(*count));
        }
    }

    fn flush_if_full(&mut self) -> io::Result<()> {
        if self.out.len() >= BLOCK_BYTES { self.flush() } else { Ok(()) }
    }

    /// Called when the source has no more lines for now.
    fn caught_up(&mut self) -> io::Result<()> {
        if let Some(view) = &mut self.view {
            view.caught_up(self.has_caught_up, &mut self.out);
        }
        self.has_caught_up = true;
        self.keep_newest();
        if let Some((_, kept)) = self.last.take() {
            self.out.extend(kept);
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            let mut stdout = io::stdout().lock();
            let written = stdout.write_all(self.out.as_bytes()).and_then(|()| stdout.flush());
            // Keep the error kind, because a broken pipe is not an error for `main`.
            written
                .map_err(|error| io::Error::new(error.kind(), format!("cannot write to stdout: {error}")))?;
            self.out.clear();
        }
        Ok(())
    }

    /// Reports newly skipped lines on stderr.
    fn report_skipped_lines(&mut self) {
        if self.skipped_lines > self.reported_skipped_lines {
            let count = self.skipped_lines - self.reported_skipped_lines;
            let lines = if count == 1 {
                "1 line that is not an event"
            } else {
                &format!("{count} lines that are not events")
            };
            // The reader of stderr may be gone.
            let _ = writeln!(io::stderr(), "selfconn: warning: skipped {lines}");
            self.reported_skipped_lines = self.skipped_lines;
        }
    }
}
