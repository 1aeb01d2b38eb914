//! selfconn's build and test commands: `cargo xtask COMMAND`. Each sets up what it needs, or says how to.

mod bench;
mod build_ebpf;
mod daemon;
mod deny;
mod dist;
mod environment;
mod fingerprint;
mod fuzz;
mod operations;
mod packages;
mod progress;
mod remap;
mod soak;
mod strip;
mod test;
mod toolchain;
#[cfg(test)]
mod unsafe_code;
mod vm;
mod workspace;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the eBPF object that the daemon embeds
    ///
    /// Finds or installs what that takes: a Rust with the sources of its library, and bpf-linker.
    BuildEbpf,
    /// Build all, for release: target/release/selfconn
    Build,
    /// Build all and start the daemon (through sudo, if you are not root)
    Run {
        /// Options of `selfconn run`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run everything that must pass: format, lints, unit tests, and as root live tests, CLI tests and other kernels
    Test {
        /// Only the tests with this in their name
        filter: Option<String>,
        /// Boot no other kernels: without this the oldest, the newest, and that one under lockdown
        #[arg(long)]
        no_kernels: bool,
    },
    /// Run the fuzz targets, each for a bounded time, and tell what was tried
    Fuzz(fuzz::Args),
    /// Run the released daemon under mixed load for a long time, and tell what became of everything
    Soak(soak::Args),
    /// Check what is shipped for operators with systemd's and Prometheus's own programs
    Operations,
    /// Make what is handed to others: a Debian package, a tarball, a bill of materials, checksums
    Dist(dist::Args),
    /// Check licenses, sources and known faults of what we depend on, with cargo-deny
    Deny,
    /// Run the Debian package under systemd, in a virtual machine: installed, rotated, killed, upgraded, purged
    Service(vm::service::Args),
    /// Run the live tests on other kernels, in virtual machines
    Vm(vm::Args),
    /// Measure what selfconn costs, and judge it by its targets
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    match Workspace::find().and_then(|workspace| run(&command, &workspace)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &Command, workspace: &Workspace) -> Result<()> {
    match command {
        Command::BuildEbpf => build_ebpf::build(workspace),
        Command::Build => daemon::build(workspace),
        Command::Run { arguments } => daemon::run(workspace, arguments),
        Command::Service(arguments) => vm::service::run(arguments, workspace),
        Command::Test { filter, no_kernels } => test::test(workspace, filter.as_deref(), !no_kernels),
        Command::Fuzz(arguments) => fuzz::run(arguments, workspace),
        Command::Soak(arguments) => soak::run(arguments, workspace),
        Command::Operations => operations::operations(workspace),
        Command::Deny => deny::run(workspace),
        Command::Dist(arguments) => dist::run(arguments, workspace),
        Command::Vm(arguments) => vm::run(arguments, workspace),
        Command::Bench(arguments) => bench::run(arguments, workspace),
    }
}
