//! One file for each command: its options, and what it does with them.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};

pub mod audit;
pub mod doctor;
pub mod repro;
pub mod run;
pub mod scan;

/// Writes all that a command has to say. That nobody reads it is an error here, and none for `main`.
pub(crate) fn print(output: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(output).and_then(|()| stdout.flush()).context("cannot write to stdout")
}
pub mod tail;
