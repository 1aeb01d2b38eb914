//! `selfconn schema`: the JSON Schema of what `run`, `scan`, `audit` and `doctor` write as JSON. It is generated from
//! the types that are written.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use schemars::{JsonSchema, Schema, generate::SchemaSettings};

use super::{audit::AuditLine, doctor::DoctorReport, scan::ScanLine};
use crate::event::envelope::EventLine;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn schema > selfconn-events.schema.json
  selfconn schema audit";

#[derive(Debug, clap::Args)]
pub struct SchemaArgs {
    /// What the schema describes: one line, or the object of `doctor`
    #[arg(value_enum, default_value_t = Described::Events)]
    of: Described,
    /// Print JSON, as without this option
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Described {
    /// Events of `run`
    Events,
    /// Lines of `scan --json`
    Scan,
    /// Lines of `audit --json`
    Audit,
    /// The object of `doctor --json`
    Doctor,
}

/// Prints the schema.
///
/// # Errors
/// If stdout cannot be written.
pub fn run(args: &SchemaArgs) -> Result<ExitCode> {
    let mut text = serde_json::to_vec_pretty(&schema(args.of)).context("cannot serialize the schema")?;
    text.push(b'\n');
    super::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn schema(of: Described) -> Schema {
    match of {
        Described::Events => of_type::<EventLine<'_>>("An event of selfconn run"),
        Described::Scan => of_type::<ScanLine<'_>>("A line of selfconn scan --json"),
        Described::Audit => of_type::<AuditLine<'_>>("A line of selfconn audit --json"),
        Described::Doctor => of_type::<DoctorReport>("The object of selfconn doctor --json"),
    }
}

/// The schema of what is written: every field of a type is required, and one that is unknown is null.
fn of_type<T: JsonSchema>(title: &str) -> Schema {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    let mut schema = settings.into_generator().into_root_schema_for::<T>();
    schema.insert("title".to_owned(), title.into());
    schema
}

#[cfg(test)]
mod tests;
