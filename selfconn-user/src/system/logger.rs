//! The program's own log on stderr: warnings and errors, more with `-v`, and with `-vv` also the log of the
//! eBPF programs (aya-log).

use std::{
    io::{self, Write as _},
    sync::OnceLock,
};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::{event::text::escape, output::journald};

/// A logger that writes to stderr. If stderr is the journal, each line begins with its syslog priority, which
/// the journal removes.
struct Stderr {
    is_journal: OnceLock<bool>,
}

static STDERR: Stderr = Stderr { is_journal: OnceLock::new() };

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

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Of libraries, only warnings and errors are logged.
        metadata.level() <= Level::Warn || metadata.target().starts_with("selfconn")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let origin = if record.target().starts_with("selfconn_hooks") { "kernel: " } else { "" };
            let level = record.level().as_str().to_ascii_lowercase();
            let text = escape(&record.args().to_string());
            // A write error is ignored, because the daemon must not end if the reader of its stderr has gone.
            let _ = if *self.is_journal.get_or_init(|| journald::is_journal(io::stderr())) {
                writeln!(io::stderr(), "<{}>{level}: {origin}{text}", priority(record.level()))
            } else {
                writeln!(io::stderr(), "selfconn: {level}: {origin}{text}")
            };
        }
    }

    fn flush(&self) {}
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
