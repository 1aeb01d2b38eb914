//! The commands, one module for each: its options and its implementation.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};

pub mod audit;
pub mod doctor;
mod duration;
pub mod exec;
pub mod repro;
pub mod run;
pub mod scan;
pub mod schema;
pub mod tail;

/// Writes the whole output of a command to stdout. A broken pipe is an error here, which `main` ignores.
pub(crate) fn print(output: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(output).and_then(|()| stdout.flush()).context("cannot write to stdout")
}
