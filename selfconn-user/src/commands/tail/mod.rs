//! `selfconn tail`: an event log, or the journal, as people read it. A connection is one line; what is not an event is
//! left out and counted.

use std::{
    collections::{HashSet, VecDeque},
    ffi::OsString,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Error, Result, anyhow};
use jiff::Timestamp;

use self::{
    filter::Filter,
    journal::Journal,
    lines::Lines,
    source::{BLOCK, News, Search, Source},
    view::View,
    wait::Wait,
};
use crate::sink::text::{Painter, Record, parse};

mod filter;
mod journal;
mod lines;
mod source;
mod view;
mod wait;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn tail                                  the last of the service's log
  selfconn tail -f --since 1h                    the last hour, and what comes
  selfconn tail -n all --port 5432 events.jsonl  all that happened to a port
  zcat events.jsonl.*.gz | selfconn tail --comm java -";

/// Where the service logs.
const DEFAULT: &str = "/var/log/selfconn/events.jsonl";

/// How many lines are shown unless the user says.
const SOME: usize = 20;

/// Options of `tail`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The event log; `-` is stdin
    #[arg(value_name = "FILE", default_value = DEFAULT)]
    file: PathBuf,
    /// Show the journal instead
    #[arg(long, conflicts_with = "file")]
    journal: bool,
    /// The journal whose files are in DIR, such as that of a mounted disk
    #[arg(long, value_name = "DIR", requires = "journal")]
    journal_dir: Option<PathBuf>,
    /// Go on with what comes, also when the log is rotated
    #[arg(short, long)]
    follow: bool,
    /// How many events to show of those that are there, or `all` [default: 20, or all with --since]
    #[arg(short = 'n', long, value_name = "N", value_parser = count)]
    lines: Option<usize>,
    /// Only events that are not older: 90s, 30m, 1h, 2d, or an RFC 3339 time
    #[arg(long, value_name = "WHEN", value_parser = |text: &str| filter::since(text, Timestamp::now()))]
    since: Option<Timestamp>,
    /// Only events about this port; may be given again, as the others may
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
    /// Only events in which this process has a part
    #[arg(long, value_name = "PID")]
    pid: Vec<u32>,
    /// Only events in which a process or thread of this name has a part
    #[arg(long, value_name = "NAME")]
    comm: Vec<String>,
    /// Only events of this name; `state` is shown only so
    #[arg(long, value_name = "EVENT")]
    event: Vec<String>,
    /// Pass the lines on as they are
    #[arg(long)]
    json: bool,
}

fn count(text: &str) -> Result<usize, String> {
    if text == "all" {
        return Ok(usize::MAX);
    }
    text.parse().map_err(|_| "not a number, nor `all`".to_owned())
}

/// Shows what is there, and with `-f` what comes.
///
/// # Errors
/// When it can't be read, or stdout can't be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let filter = Filter {
        since: args.since,
        ports: args.port.clone(),
        pids: args.pid.clone(),
        comms: args.comm.clone(),
        events: args.event.clone(),
    };
    let count = args.lines.unwrap_or(if args.since.is_some() { usize::MAX } else { SOME });
    let mut show = Show::new(filter, args.json);
    if args.journal {
        show.keep_last(count);
        journal(args, &mut show)?;
    } else if args.file == Path::new("-") {
        show.keep_last(count);
        stdin(&mut show)?;
    } else {
        file(args, count, &mut show)?;
    }
    show.say_garbage();
    Ok(ExitCode::SUCCESS)
}

fn journal(args: &Args, show: &mut Show) -> Result<()> {
    let mut journal = Journal::read(args.journal_dir.as_deref(), args.since)?;
    while let Some(line) = journal.next()? {
        show.take(Some(line.as_bytes()))?;
    }
    show.caught_up()?;
    if args.follow {
        let mut journal = journal.follow(args.journal_dir.as_deref())?;
        while let Some(line) = journal.next()? {
            show.take(Some(line.as_bytes()))?;
            show.caught_up()?;
        }
    }
    Ok(())
}

fn stdin(show: &mut Show) -> Result<()> {
    let (mut lines, mut block, mut stdin) = (Lines::default(), vec![0; BLOCK], io::stdin().lock());
    loop {
        match stdin.read(&mut block) {
            Ok(0) => break,
            Ok(count) => lines.feed(&block[..count], |line| show.take(line))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read stdin"),
        }
    }
    show.garbage += u64::from(lines.reset());
    Ok(show.caught_up()?)
}

fn file(args: &Args, count: usize, show: &mut Show) -> Result<()> {
    let path = &args.file;
    let explain = |error| explain(path, error);
    let mut source = Source::open(path).map_err(explain)?;
    // Before the first read, so that nothing that comes after it is missed.
    let wait = args.follow.then(|| Wait::on(path));
    let (mut lines, mut block) = (Lines::default(), vec![0; BLOCK]);
    match count {
        0 => source.seek_end().map_err(explain)?,
        usize::MAX => {}
        _ => {
            let mut search =
                Search { filter: &show.filter, joins: !args.json, left: count, closed: HashSet::new() };
            source.seek_last(&mut search).map_err(explain)?;
            // It may just have been rotated.
            if search.left > 0
                && let Ok(mut previous) = Source::open(&previous(path))
            {
                previous.seek_last(&mut search).map_err(explain)?;
                loop {
                    match previous.read(&mut block).map_err(explain)? {
                        0 => break,
                        count => lines.feed(&block[..count], |line| show.take(line))?,
                    }
                }
                show.garbage += u64::from(lines.reset());
            }
        }
    }
    loop {
        match source.follow(&mut block).map_err(explain)? {
            News::Bytes(count) => {
                lines.feed(&block[..count], |line| show.take(line))?;
                show.flush_if_full()?;
            }
            News::Restarted => show.garbage += u64::from(lines.reset()),
            News::None => {
                show.caught_up()?;
                let Some(wait) = &wait else { break };
                show.say_garbage();
                wait.wait()?;
            }
        }
    }
    // A line without an end is being written, or torn; either way it is none yet.
    show.garbage += u64::from(lines.reset());
    Ok(())
}

/// The file that logrotate moved last.
fn previous(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".1");
    name.into()
}

fn explain(path: &Path, error: io::Error) -> Error {
    let what = format!("cannot read the event log {}", path.display());
    if error.kind() == io::ErrorKind::NotFound {
        return anyhow!(
            "{what}: {error}: name a FILE that `selfconn run --log FILE` writes, or use --journal"
        );
    }
    Error::new(error).context(what)
}

/// What is shown, and how.
struct Show {
    filter: Filter,
    /// None: lines as they are.
    view: Option<View>,
    out: String,
    /// Only so many of what is there are shown: the newest.
    last: Option<(usize, VecDeque<String>)>,
    is_news: bool,
    /// Lines that are no events.
    garbage: u64,
    garbage_said: u64,
}

impl Show {
    fn new(filter: Filter, is_json: bool) -> Self {
        let view = (!is_json).then(|| View::new(Painter::of(&io::stdout())));
        let (out, last) = (String::new(), None);
        Self { filter, view, out, last, is_news: false, garbage: 0, garbage_said: 0 }
    }

    /// Of a source that can't be read backwards, keeps the newest.
    fn keep_last(&mut self, count: usize) {
        if count != usize::MAX {
            self.last = Some((count, VecDeque::new()));
        }
    }

    /// Takes in a line.
    fn take(&mut self, line: Option<&[u8]>) -> io::Result<()> {
        let Some(line) = line else {
            self.garbage += 1;
            return Ok(());
        };
        if line.is_empty() || self.filter.is_too_old(line) {
            return Ok(());
        }
        // An event is JSON, and so is text.
        let parsed = std::str::from_utf8(line).ok().and_then(|text| Some((text, parse(line)?)));
        let Some((text, fields)) = parsed.filter(|(_, fields)| !Record::new(fields).event().is_empty())
        else {
            self.garbage += 1;
            return Ok(());
        };
        if self.filter.wants(Record::new(&fields)) {
            match &mut self.view {
                Some(view) => view.take(fields, &mut self.out),
                None => {
                    self.out.push_str(text);
                    self.out.push('\n');
                }
            }
            self.trim();
        }
        self.flush_if_full()
    }

    /// Moves what is there to what is kept of it.
    fn trim(&mut self) {
        if let Some((count, kept)) = &mut self.last {
            kept.extend(self.out.split_inclusive('\n').map(ToOwned::to_owned));
            self.out.clear();
            kept.drain(..kept.len().saturating_sub(*count));
        }
    }

    fn flush_if_full(&mut self) -> io::Result<()> {
        if self.out.len() >= BLOCK { self.flush() } else { Ok(()) }
    }

    /// There is nothing more for now.
    fn caught_up(&mut self) -> io::Result<()> {
        if let Some(view) = &mut self.view {
            view.caught_up(self.is_news, &mut self.out);
        }
        self.is_news = true;
        self.trim();
        if let Some((_, kept)) = self.last.take() {
            self.out.extend(kept);
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            let mut stdout = io::stdout().lock();
            let written = stdout.write_all(self.out.as_bytes()).and_then(|()| stdout.flush());
            // Still of its kind: who closes the pipe has seen enough.
            written
                .map_err(|error| io::Error::new(error.kind(), format!("cannot write to stdout: {error}")))?;
            self.out.clear();
        }
        Ok(())
    }

    /// On stderr, beside what is shown.
    fn say_garbage(&mut self) {
        if self.garbage > self.garbage_said {
            let count = self.garbage - self.garbage_said;
            let lines = if count == 1 { "1 line is" } else { &format!("{count} lines are") };
            // Who reads stderr may be gone.
            let _ = writeln!(io::stderr(), "selfconn: warning: {lines} no event, and left out");
            self.garbage_said = self.garbage;
        }
    }
}
