//! `selfconn`: parses the command line, runs a command, and turns an error into one line and exit code 2.

use std::{io, process::ExitCode};

use clap::Parser as _;
use selfconn::{
    cli::{Cli, Command},
    commands::{doctor, repro, run, scan},
    sink::text::escape,
};

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Scan(args) => scan::run(&args),
        Command::Repro(args) => repro::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    outcome.unwrap_or_else(|error| {
        let is_broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        };
        if error.chain().any(is_broken_pipe) {
            return ExitCode::SUCCESS;
        }
        eprintln!("selfconn: {}", escape(&format!("{error:#}")));
        ExitCode::from(2)
    })
}
