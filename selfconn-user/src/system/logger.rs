//! The program's own log on stderr: warnings and errors, more with `-v`, and with `-vv` also the log of the
//! eBPF programs (aya-log). In a daemon a thread writes it, because a reader that does not read must not stop the loop.

use std::{
    io::{self, Write as _},
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::thread::CapabilitySet;

use super::capabilities;
use crate::{budget::memory::STDERR_QUEUE_BYTES, event::text::escape, output::journald};

/// How long the end of a run waits for a reader that reads nothing.
const END_TIMEOUT: Duration = Duration::from_millis(200);

/// How long a command that fails waits for it.
const LAST_LINE_TIMEOUT: Duration = Duration::from_secs(2);

/// A logger that writes to stderr. If stderr is the journal, each line begins with its syslog priority, which
/// the journal removes.
struct Stderr {
    is_journal: OnceLock<bool>,
    queue: LineQueue,
}

static STDERR: Stderr = Stderr { is_journal: OnceLock::new(), queue: LineQueue::new() };

/// The lines that a thread writes. Without the thread each line is written at once.
struct LineQueue {
    lines: OnceLock<Sender<String>>,
    /// How many bytes wait, with the line that is being written.
    waiting: AtomicUsize,
    dropped: AtomicU64,
}

impl LineQueue {
    const fn new() -> Self {
        Self { lines: OnceLock::new(), waiting: AtomicUsize::new(0), dropped: AtomicU64::new(0) }
    }

    /// Starts the thread. `write` may block.
    fn start(&'static self, mut write: impl FnMut(&str) + Send + 'static) -> io::Result<()> {
        let (lines, to_write) = channel::<String>();
        capabilities::spawn_restricted("stderr", CapabilitySet::empty(), move || {
            for line in to_write {
                write(&line);
                let dropped = self.dropped.swap(0, Ordering::Relaxed);
                if dropped > 0 {
                    let text = format!("{dropped} lines of this log are lost, because nobody read stderr");
                    write(&STDERR.line(Level::Warn, &text));
                }
                self.waiting.fetch_sub(line.len(), Ordering::Relaxed);
            }
        })?;
        let _ = self.lines.set(lines);
        Ok(())
    }

    /// Adds a line, or drops and counts it if there is no room. False: there is no thread.
    fn push(&self, line: &str) -> bool {
        let Some(lines) = self.lines.get() else { return false };
        let waiting = self.waiting.fetch_add(line.len(), Ordering::Relaxed);
        if waiting + line.len() > STDERR_QUEUE_BYTES || lines.send(line.to_owned()).is_err() {
            self.waiting.fetch_sub(line.len(), Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Waits until the queue has at most `max_waiting` bytes, or the reader has read nothing for `timeout`.
    fn wait_for_reader(&self, max_waiting: usize, timeout: Duration) {
        let (mut least, mut until) = (usize::MAX, Instant::now() + timeout);
        loop {
            let waiting = self.waiting.load(Ordering::Relaxed);
            if waiting <= max_waiting || Instant::now() >= until {
                return;
            }
            if waiting < least {
                (least, until) = (waiting, Instant::now() + timeout);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Starts logging. `verbose` is the number of times that `-v` was given.
pub fn init(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::Error,
        (false, 0) => LevelFilter::Warn,
        (false, 1) => LevelFilter::Info,
        (false, _) => LevelFilter::Debug,
    };
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(level);
    }
}

/// From now on a thread writes the lines.
///
/// # Errors
/// If it can't be started.
pub fn write_by_thread() -> io::Result<()> {
    STDERR.queue.start(write_now)
}

/// Writes the last line of a command that fails, and waits for it, but not for ever.
pub fn write_last_line(text: &str) {
    let line = format!("selfconn: {text}\n");
    STDERR.queue.wait_for_reader(STDERR_QUEUE_BYTES.saturating_sub(line.len()), LAST_LINE_TIMEOUT);
    STDERR.write(&line);
    STDERR.queue.wait_for_reader(0, LAST_LINE_TIMEOUT);
}

/// A write error is ignored, because the daemon must not end if the reader of its stderr has gone.
fn write_now(line: &str) {
    let _ = io::stderr().write_all(line.as_bytes());
}

impl Stderr {
    fn write(&self, line: &str) {
        if !self.queue.push(line) {
            write_now(line);
        }
    }

    /// A line of the log.
    fn line(&self, level: Level, text: &str) -> String {
        let name = level.as_str().to_ascii_lowercase();
        match *self.is_journal.get_or_init(|| journald::is_journal(io::stderr())) {
            true => format!("<{}>{name}: {text}\n", priority(level)),
            false => format!("selfconn: {name}: {text}\n"),
        }
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Of libraries, only warnings and errors are logged.
        metadata.level() <= Level::Warn || metadata.target().starts_with("selfconn")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let origin = if record.target().starts_with("selfconn_hooks") { "kernel: " } else { "" };
            let text = format!("{origin}{}", escape(&record.args().to_string()));
            self.write(&self.line(record.level(), &text));
        }
    }

    fn flush(&self) {
        self.queue.wait_for_reader(0, END_TIMEOUT);
    }
}

/// The syslog priority of a level.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_reader_that_does_not_read_delays_nobody_and_learns_how_much_it_missed() {
        let queue: &'static LineQueue = Box::leak(Box::new(LineQueue::new()));
        assert!(!queue.push("written at once"));
        let (read, may_write) = channel::<()>();
        let written = Arc::new(Mutex::new(Vec::new()));
        let of_thread = Arc::clone(&written);
        let write = move |line: &str| {
            let _ = may_write.recv();
            of_thread.lock().unwrap().push(line.to_owned());
        };
        queue.start(write).unwrap();
        let (line, room) = ("x".repeat(1_023) + "\n", STDERR_QUEUE_BYTES / 1_024);
        let began = Instant::now();
        for _ in 0..room + 9 {
            assert!(queue.push(&line));
        }
        queue.wait_for_reader(0, END_TIMEOUT);
        assert!((END_TIMEOUT..10 * END_TIMEOUT).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert!(written.lock().unwrap().is_empty());
        drop(read);
        queue.wait_for_reader(0, LAST_LINE_TIMEOUT);
        let written = written.lock().unwrap();
        assert_eq!(written.iter().filter(|written| **written == line).count(), room);
        let lost: Vec<_> = written.iter().filter(|line| line.contains("of this log are lost")).collect();
        assert!(lost.len() == 1 && lost[0].contains(" 9 lines"), "{lost:?}");
    }
}
