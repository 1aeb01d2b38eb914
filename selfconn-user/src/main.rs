//! `selfconn`: parses the command line, runs a command, and prints an error in one line with exit code 2.

use std::{io, process::ExitCode};

use clap::Parser as _;
use selfconn::{
    cli::{self, Cli, Command},
    commands::{audit, doctor, exec, repro, run, scan, schema, tail},
    event::text::escape,
    system::logger,
};

fn main() -> ExitCode {
    let outcome = match Cli::try_parse() {
        Err(error) => cli::handle_parse_error(&error),
        Ok(Cli { command }) => match command {
            Command::Run(args) => run::run(&args),
            Command::Exec(args) => exec::run(&args),
            Command::Scan(args) => scan::run(&args),
            Command::Audit(args) => audit::run(&args),
            Command::Tail(args) => tail::run(&args),
            Command::Repro(args) => repro::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Schema(args) => schema::run(&args),
        },
    };
    outcome.unwrap_or_else(|error| {
        let is_broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        };
        if error.chain().any(is_broken_pipe) {
            return ExitCode::SUCCESS;
        }
        logger::write_last_line(&escape(&format!("{error:#}")));
        ExitCode::from(2)
    })
}
