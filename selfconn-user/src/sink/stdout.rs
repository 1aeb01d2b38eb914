//! Standard output: people's text or JSON lines, for a reader that may be slow, frozen, or gone.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
};

use rustix::termios::isatty;

use super::{
    text,
    writer::{PIECE, Writer},
};
use crate::event::Event;

/// How stdout speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Standard output.
#[derive(Debug)]
pub(super) struct Stdout {
    format: Format,
    pub(super) writer: Writer,
    is_terminal: bool,
    line: Vec<u8>,
}

impl Stdout {
    /// # Errors
    /// When its thread can't be started.
    pub(super) fn start(format: Format) -> io::Result<Self> {
        let mut file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let is_terminal = isatty(&file);
        let writer = Writer::start("stdout", move |bytes| {
            file.write(&bytes[..bytes.len().min(PIECE)]).map_err(|error| {
                match rustix::io::Errno::from_io_error(&error) {
                    // How a terminal says that it was hung up.
                    Some(rustix::io::Errno::IO) if is_terminal => io::ErrorKind::BrokenPipe.into(),
                    _ => error,
                }
            })
        })?;
        Ok(Self { format, writer, is_terminal, line: Vec::new() })
    }

    /// Adds an event, of which `json` is the line.
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

    /// Whether it was a terminal, and is none any more.
    pub(super) fn is_hung_up(&self) -> bool {
        self.is_terminal && !isatty(io::stdout())
    }
}
