//! What selfconn costs: measures, and says samples as JSON lines. `cargo xtask bench` builds and runs this, judges what it
//! says, and makes a table and a chart of it; see there for the targets.
//!
//! One binary, also for what it starts: generators of traffic, holders of sockets, and the empty programs that are the
//! floor. All traffic is in network namespaces of its own.

mod crowd;
mod empty;
mod generate;
mod measure;
mod net;
mod proc;
mod programs;
mod sample;
mod told;
mod tracer;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use selfconn::bpf::attach::Method;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Measure
    Measure {
        /// The binary that is measured
        #[arg(long)]
        daemon: PathBuf,
        /// Where logs go meanwhile: a directory in memory
        #[arg(long)]
        scratch: PathBuf,
        /// Fewer rounds, and shorter ones
        #[arg(long)]
        quick: bool,
        /// Only these groups
        only: Vec<String>,
    },
    /// Make traffic
    Generate(generate::Args),
    /// Hold so many sockets
    Hold { count: usize },
    /// Attach empty programs by these methods
    Empty { methods: Vec<String> },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cost: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> Result<()> {
    match what {
        What::Measure { daemon, scratch, quick, only } => {
            measure::Bench { daemon, quick, scratch }.run(&only)
        }
        What::Generate(args) => generate::run(&args),
        What::Hold { count } => crowd::hold(count),
        What::Empty { methods } => {
            let is_named = |method: &Method| methods.iter().any(|name| name == method.name());
            empty::run(&Method::ALL.into_iter().filter(is_named).collect::<Vec<_>>())
        }
    }
}
