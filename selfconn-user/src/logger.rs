//! What the program says about itself, on stderr: warnings and errors, more with `-v`, and with `-vv` also the log of
//! the eBPF programs (aya-log).

use std::io::{self, Write as _};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::sink::text::escape;

struct Stderr;

/// Starts logging. `verbose` and `quiet` are how often each option was given.
pub fn init(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::Error,
        (false, 0) => LevelFilter::Warn,
        (false, 1) => LevelFilter::Info,
        (false, _) => LevelFilter::Debug,
    };
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries may warn; their chatter is not ours.
        metadata.level() <= Level::Warn || metadata.target().starts_with("selfconn")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let origin = if record.target().starts_with("selfconn_hooks") { "kernel: " } else { "" };
            let level = record.level().as_str().to_ascii_lowercase();
            let text = escape(&record.args().to_string());
            // A daemon whose stderr nobody reads any more has better to do than to end for it.
            let _ = writeln!(io::stderr(), "selfconn: {level}: {origin}{text}");
        }
    }

    fn flush(&self) {}
}
