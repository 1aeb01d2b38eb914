//! Where events go: people's text or JSON lines on stdout, and the log file.

use std::io::{self, Write as _};

use crate::event::Event;

pub mod file;
pub mod text;

/// How stdout speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Appends an event as one JSON line.
pub fn json_line(event: &Event, out: &mut Vec<u8>) {
    let start = out.len();
    match serde_json::to_writer(&mut *out, event) {
        Ok(()) => out.push(b'\n'),
        // Can't happen with a schema of strings and numbers; but half a line must never stay.
        Err(error) => {
            out.truncate(start);
            log::error!("an event can't be written as JSON: {error}");
        }
    }
}

/// Standard output, written a batch at a time.
#[derive(Debug)]
pub struct Stdout {
    format: Option<Format>,
    batch: Vec<u8>,
}

impl Stdout {
    /// `None`: says nothing.
    #[must_use]
    pub fn new(format: Option<Format>) -> Self {
        Self { format, batch: Vec::new() }
    }

    /// Adds an event to the batch.
    pub fn push(&mut self, event: &Event) {
        match self.format {
            Some(Format::Json) => json_line(event, &mut self.batch),
            Some(Format::Text) => text::line(event, &mut self.batch),
            None => {}
        }
    }

    /// Writes the batch.
    ///
    /// # Errors
    /// As writing does; a broken pipe included, which the caller takes for a wish to end.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        let outcome = stdout.write_all(&self.batch).and_then(|()| stdout.flush());
        self.batch.clear();
        outcome
    }
}
