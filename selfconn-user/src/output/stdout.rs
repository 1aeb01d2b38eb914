//! Events on standard output, as text or as JSON lines. The reader may be slow, frozen or gone.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
};

use rustix::termios::isatty;

use super::writer::{PIPE_CAPACITY, Writer};
use crate::event::Event;
use crate::event::text;

/// Format of the events on stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One readable line for each event.
    Text,
    /// One JSON object on each line.
    Json,
}

#[derive(Debug)]
pub(super) struct Stdout {
    format: Format,
    pub(super) writer: Writer,
    is_terminal: bool,
    line: Vec<u8>,
}

impl Stdout {
    /// # Errors
    /// If the writer thread cannot be started.
    pub(super) fn start(format: Format) -> io::Result<Self> {
        let mut file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let is_terminal = isatty(&file);
        let writer = Writer::start("stdout", move |bytes| {
            file.write(&bytes[..bytes.len().min(PIPE_CAPACITY)]).map_err(|error| {
                match rustix::io::Errno::from_io_error(&error) {
                    // A terminal reports EIO after a hang-up.
                    Some(rustix::io::Errno::IO) if is_terminal => io::ErrorKind::BrokenPipe.into(),
                    _ => error,
                }
            })
        })?;
        Ok(Self { format, writer, is_terminal, line: Vec::new() })
    }

    /// Adds an event. `json` is its JSON line.
    pub(super) fn push(&mut self, event: &Event, json: &[u8]) {
        match self.format {
            Format::Json => self.writer.push(json),
            Format::Text => {
                self.line.clear();
                text::line(event, &mut self.line);
                self.writer.push(&self.line);
            }
        }
    }

    /// True if stdout was a terminal and the terminal was hung up.
    pub(super) fn is_hung_up(&self) -> bool {
        self.is_terminal && !isatty(io::stdout())
    }
}
