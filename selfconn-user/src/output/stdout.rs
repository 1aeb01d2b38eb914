//! Events on standard output: as text, as JSON lines, or as journal entries if stdout is the journal. The
//! reader may be slow, frozen or gone.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
};

use rustix::{io::Errno, termios::isatty};

use super::{
    journald,
    writer::{PIPE_CAPACITY, Writer},
};
use crate::event::{Envelope, Event, render, text::LogRecord};

/// Format of the events on stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdoutFormat {
    /// One readable line for each event.
    Text,
    /// One JSON object on each line.
    Json,
    /// Stdout is the journal: entries that are sent to it replace the lines on stdout.
    Journal,
}

#[derive(Debug)]
pub(super) struct Stdout {
    format: StdoutFormat,
    pub(super) writer: Writer,
    is_terminal: bool,
}

impl Stdout {
    /// # Errors
    /// If the journal's socket cannot be created or the writer thread cannot be started.
    pub(super) fn start(format: StdoutFormat) -> io::Result<Self> {
        if format == StdoutFormat::Journal {
            return Ok(Self { format, writer: journald::start_writer()?, is_terminal: false });
        }
        let mut file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let is_terminal = isatty(&file);
        let writer = Writer::start("stdout", move |bytes| {
            file.write(&bytes[..bytes.len().min(PIPE_CAPACITY)]).map_err(|error| {
                match Errno::from_io_error(&error) {
                    // A terminal reports EIO after a hang-up.
                    Some(Errno::IO) if is_terminal => io::ErrorKind::BrokenPipe.into(),
                    _ => error,
                }
            })
        })?;
        Ok(Self { format, writer, is_terminal })
    }

    /// Adds an event. `json` is its JSON line, if this output has it.
    pub(super) fn push(&mut self, event: &Event, envelope: &Envelope, json: &[u8]) {
        match self.format {
            StdoutFormat::Json => self.writer.push(json),
            StdoutFormat::Text => {
                let mut line = render(LogRecord::new(&event.to_json_fields(envelope)));
                line.push('\n');
                self.writer.push(line.as_bytes());
            }
            StdoutFormat::Journal => {
                let fields = event.to_json_fields(envelope);
                self.writer.push(&journald::frame(LogRecord::new(&fields), json.trim_ascii_end()));
            }
        }
    }

    /// True if the JSON line of an event is a part of what is written.
    pub(super) fn has_json(&self) -> bool {
        self.format != StdoutFormat::Text
    }

    /// True if events go to the journal.
    pub(super) fn is_journal(&self) -> bool {
        self.format == StdoutFormat::Journal
    }

    /// True if stdout was a terminal and the terminal was hung up.
    pub(super) fn is_hung_up(&self) -> bool {
        self.is_terminal && !isatty(io::stdout())
    }
}
