//! The command line, from which help, man pages and completions come.

use clap::{Parser, Subcommand};

use crate::commands::{doctor, repro, run, scan};

/// Finds TCP self-connections: sockets whose source is their own destination.
#[derive(Debug, Parser)]
#[command(name = "selfconn", version, max_term_width = 100, arg_required_else_help = true)]
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
    /// Make one harmless self-connection, and tell what happens
    #[command(after_help = repro::EXAMPLE)]
    Repro(repro::Args),
    /// Say what this kernel offers, what would be attached, and what is missing
    #[command(after_help = doctor::EXAMPLE)]
    Doctor(doctor::Args),
}
