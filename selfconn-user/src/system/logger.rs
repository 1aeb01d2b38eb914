//! The program's own log on stderr: warnings and errors, more with `-v`, and with `-vv` also the log of the
//! eBPF programs (aya-log). In a daemon a thread writes it, because a reader that does not read must not stop the loop.

use std::{
    io::{self, Write as _},
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::thread::CapabilitySet;

use super::capabilities;
use crate::{event::text::escape, output::journald};

/// How many lines wait for a reader that does not read. Beyond it they are dropped, and counted.
const MAX_WAITING: usize = 4_096;

/// How long the end of a run waits for the reader.
const END_TIMEOUT: Duration = Duration::from_millis(200);

/// A logger that writes to stderr. If stderr is the journal, each line begins with its syslog priority, which
/// the journal removes.
struct Stderr {
    is_journal: OnceLock<bool>,
    queue: LineQueue,
}

static STDERR: Stderr = Stderr { is_journal: OnceLock::new(), queue: LineQueue::new() };

/// The lines that a thread writes. Without the thread each line is written at once.
struct LineQueue {
    lines: OnceLock<SyncSender<String>>,
    /// How many wait, with the one that is being written.
    waiting: AtomicUsize,
    dropped: AtomicU64,
}

impl LineQueue {
    const fn new() -> Self {
        Self { lines: OnceLock::new(), waiting: AtomicUsize::new(0), dropped: AtomicU64::new(0) }
    }

    /// Starts the thread. `write` may block.
    fn start(&'static self, mut write: impl FnMut(&str) + Send + 'static) -> io::Result<()> {
        let (lines, to_write) = sync_channel::<String>(MAX_WAITING);
        capabilities::spawn_restricted("stderr", CapabilitySet::empty(), move || {
            for line in to_write {
                write(&line);
                let dropped = self.dropped.swap(0, Ordering::Relaxed);
                if dropped > 0 {
                    let text = format!("{dropped} lines of this log are lost, because nobody read stderr");
                    write(&STDERR.line(Level::Warn, &text));
                }
                self.waiting.fetch_sub(1, Ordering::Relaxed);
            }
        })?;
        let _ = self.lines.set(lines);
        Ok(())
    }

    /// Adds a line. False: nobody will write it, because there is no thread.
    fn push(&self, line: &str) -> bool {
        let Some(lines) = self.lines.get() else { return false };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if lines.try_send(line.to_owned()).is_err() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Waits until all lines are written, but not long.
    fn flush(&self) {
        let until = Instant::now() + END_TIMEOUT;
        while self.waiting.load(Ordering::Relaxed) > 0 && Instant::now() < until {
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
    STDERR.write(&format!("selfconn: {text}\n"));
    STDERR.queue.flush();
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
        self.queue.flush();
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
    use std::sync::{Arc, Mutex, mpsc};

    use super::*;

    #[test]
    fn a_reader_that_does_not_read_delays_nobody_and_learns_how_much_it_missed() {
        let queue: &'static LineQueue = Box::leak(Box::new(LineQueue::new()));
        assert!(!queue.push("written at once"));
        let (read, may_write) = mpsc::channel::<()>();
        let written = Arc::new(Mutex::new(Vec::new()));
        let of_thread = Arc::clone(&written);
        let write = move |line: &str| {
            let _ = may_write.recv();
            of_thread.lock().unwrap().push(line.to_owned());
        };
        queue.start(write).unwrap();
        let began = Instant::now();
        for number in 0..MAX_WAITING + 9 {
            assert!(queue.push(&format!("line {number}\n")));
        }
        queue.flush();
        assert!(began.elapsed() < 10 * END_TIMEOUT, "{:?}", began.elapsed());
        assert!(written.lock().unwrap().is_empty());
        drop(read);
        while queue.waiting.load(Ordering::Relaxed) > 0 {
            queue.flush();
        }
        let written = written.lock().unwrap();
        // One more may have been taken from the queue while the others were added.
        let lost = written.iter().find(|line| line.contains("of this log are lost")).unwrap();
        assert!(lost.contains(" 8 lines") || lost.contains(" 9 lines"), "{lost}");
        assert_eq!((&*written[0], written.len() > MAX_WAITING), ("line 0\n", true));
    }
}
