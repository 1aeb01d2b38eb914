//! The command line. Help, man pages and completions are generated from it. Also renders usage errors in one
//! line.

use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use clap::{Parser, Subcommand};

use crate::commands::{audit, doctor, exec, repro, run, scan, schema, tail};

/// The output of `--version`: version, commit, and checksum and architectures of the eBPF object.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("SELFCONN_COMMIT"),
    ", eBPF object ",
    env!("SELFCONN_OBJECT"),
    " for x86_64 and aarch64)"
);

const AFTER_HELP: &str = "\
Examples:
  selfconn doctor              check which hooks work on this kernel
  selfconn run                 watch this host
  selfconn repro               in a second shell: make a self-connection

Exit codes: 0: fine, nothing found; 1: something found, or not fit to run; 2: an error,
printed in one line on stderr.";

/// Finds TCP self-connections: sockets whose source is their own destination.
#[derive(Debug, Parser)]
#[command(name = "selfconn", version = VERSION, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = AFTER_HELP)]
pub struct Cli {
    /// The command to run
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch this host and report each self-connection with its process
    #[command(after_help = run::EXAMPLE)]
    Run(run::RunArgs),
    /// Run a command, and report the self-connections of its processes at the end
    #[command(after_help = exec::EXAMPLE)]
    Exec(exec::ExecArgs),
    /// List the self-connections that exist now, in every network namespace
    #[command(after_help = scan::EXAMPLE)]
    Scan(scan::ScanArgs),
    /// Find the ports at risk of self-connection, and print how to prevent it
    #[command(after_help = audit::EXAMPLE)]
    Audit(audit::AuditArgs),
    /// Show an event log or the journal as readable text
    #[command(after_help = tail::EXAMPLE)]
    Tail(tail::TailArgs),
    /// Make one harmless self-connection and explain each step
    #[command(after_help = repro::EXAMPLE)]
    Repro(repro::ReproArgs),
    /// Report what this kernel offers, what would be attached, and what is missing
    #[command(after_help = doctor::EXAMPLE)]
    Doctor(doctor::DoctorArgs),
    /// Print the JSON Schema of events, or of the lines of scan, audit or doctor
    #[command(after_help = schema::EXAMPLE)]
    Schema(schema::SchemaArgs),
}

/// Handles a command line that clap did not accept as a command: prints the requested help or version.
///
/// # Errors
/// The usage error in one line, or a failure to write stdout.
pub fn handle_parse_error(error: &clap::Error) -> Result<ExitCode> {
    if error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        return Err(anyhow!(in_one_line(&error.render().to_string())));
    }
    error.print().context("cannot write to stdout")?;
    Ok(if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS })
}

/// Joins clap's paragraphs to one line: the error, a tip if there is one, and the command whose help to read.
fn in_one_line(text: &str) -> String {
    let (text, usage) = text.split_once("\nUsage: ").unwrap_or((text, ""));
    let sentences: Vec<String> = text
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .map(|paragraph| paragraph.trim_start_matches("error: ").trim_start_matches("tip: ").to_owned())
        .filter(|paragraph| !paragraph.is_empty() && !paragraph.starts_with("For more information"))
        .collect();
    // The usage begins with the names of the command, in lower case.
    let is_name = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase());
    let command: Vec<&str> = usage.split_whitespace().take_while(is_name).collect();
    let command = if command.is_empty() { "selfconn".to_owned() } else { command.join(" ") };
    format!("{}: see {command} --help", sentences.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_names_the_architectures_of_the_object() {
        let architectures =
            selfconn_ebpf::names::KPROBES.map(|(architecture, ..)| architecture).join(" and ");
        assert!(VERSION.ends_with(&format!(" for {architectures})")), "{VERSION}");
    }

    #[test]
    fn a_usage_error_is_one_line() {
        for (arguments, expected) in [
            (&["frob"][..], "unrecognized subcommand 'frob': see selfconn --help"),
            (
                &["scann"],
                "unrecognized subcommand 'scann'; a similar subcommand exists: 'scan': see selfconn --help",
            ),
            (&["run", "--frob"], "unexpected argument '--frob' found: see selfconn run --help"),
            (
                &["run", "--log"],
                "a value is required for '--log <FILE>' but none was supplied: see selfconn --help",
            ),
            (
                &["run", "--ring-size", "a\nb"],
                "invalid value 'a b' for '--ring-size <BYTES>': not a power of two from 4K to 1G: see selfconn --help",
            ),
            (
                &["run", "--hooks", "bot"],
                "invalid value 'bot' for '--hooks <HOOKS>' [possible values: auto, both, tracepoint, function]; \
                 a similar value exists: 'both': see selfconn --help",
            ),
            (
                &["run", "--json", "--text"],
                "the argument '--json' cannot be used with '--text': see selfconn run --help",
            ),
        ] {
            let line = [&["selfconn"], arguments].concat();
            let error = Cli::try_parse_from(line).expect_err("the command line is invalid");
            assert_eq!(
                handle_parse_error(&error).expect_err("a usage error is an error").to_string(),
                expected,
                "{arguments:?}"
            );
        }
    }
}
