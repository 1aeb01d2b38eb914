//! The command line, from which help, man pages and completions come, and what is said of one that is wrong.

use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use clap::{Parser, Subcommand};

use crate::commands::{audit, doctor, repro, run, scan, tail};

/// Which build this is: what `--version` tells. The object is the programs that run in the kernel.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("SELFCONN_COMMIT"),
    ", eBPF object ",
    env!("SELFCONN_OBJECT"),
    ")"
);

/// Shown below the commands.
const EXAMPLE: &str = "\
Examples:
  selfconn doctor              can this kernel be watched, and by which hooks?
  selfconn run                 watch it
  selfconn repro               in a second shell: make something to see

Exit codes: 0: fine, nothing found; 1: something found, or not fit to run; 2: an error,
told in one line on stderr.";

/// Finds TCP self-connections: sockets whose source is their own destination.
#[derive(Debug, Parser)]
#[command(name = "selfconn", version = VERSION, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = EXAMPLE)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch this host, and log each self-connection with its process
    #[command(after_help = run::EXAMPLE)]
    Run(run::Args),
    /// List the self-connections that exist now, in every network namespace
    #[command(after_help = scan::EXAMPLE)]
    Scan(scan::Args),
    /// Find the ports at risk of self-connection, and print what prevents it
    #[command(after_help = audit::EXAMPLE)]
    Audit(audit::Args),
    /// Show an event log, or the journal, as people read it
    #[command(after_help = tail::EXAMPLE)]
    Tail(tail::Args),
    /// Make one harmless self-connection, and tell what happens
    #[command(after_help = repro::EXAMPLE)]
    Repro(repro::Args),
    /// Say what this kernel offers, what would be attached, and what is missing
    #[command(after_help = doctor::EXAMPLE)]
    Doctor(doctor::Args),
}

/// Answers for a command line that names no command to run: shows the help or the version that it asks for.
///
/// # Errors
/// What is wrong with it, in one line. Or stdout can't be written.
pub fn answer(error: &clap::Error) -> Result<ExitCode> {
    if error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        return Err(anyhow!(in_one_line(&error.render().to_string())));
    }
    error.print().context("cannot write to stdout")?;
    Ok(if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS })
}

/// What clap tells in paragraphs: the error, perhaps a tip, and whose usage it is.
fn in_one_line(told: &str) -> String {
    let (told, usage) = told.split_once("\nUsage: ").unwrap_or((told, ""));
    let said: Vec<String> = told
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .map(|paragraph| paragraph.trim_start_matches("error: ").trim_start_matches("tip: ").to_owned())
        .filter(|paragraph| !paragraph.is_empty() && !paragraph.starts_with("For more information"))
        .collect();
    // The usage begins with the command's names, in lower case.
    let is_name = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase());
    let command: Vec<&str> = usage.split_whitespace().take_while(is_name).collect();
    let command = if command.is_empty() { "selfconn".to_owned() } else { command.join(" ") };
    format!("{}: see {command} --help", said.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_command_line_is_told_in_one_line() {
        for (arguments, told) in [
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
            let error = Cli::try_parse_from(line).expect_err("it is wrong");
            assert_eq!(answer(&error).expect_err("it is told").to_string(), told, "{arguments:?}");
        }
    }
}
