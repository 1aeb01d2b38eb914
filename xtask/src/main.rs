//! selfconn's build and test commands: `cargo xtask COMMAND`. Each installs what it needs, or prints the
//! command that does. Exit code 2 is an error.

mod architecture;
mod bench;
mod build_ebpf;
mod daemon;
mod dist;
mod environment;
mod fingerprint;
mod image;
mod libtest;
mod operations;
mod packages;
mod prometheus_rule;
mod remap;
mod run;
mod strip;
mod suites;
mod test;
#[cfg(test)]
mod threat_model;
mod toolchain;
#[cfg(test)]
mod unsafe_code;
mod vm;
#[cfg(test)]
mod workflow;
mod workspace;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use architecture::Architecture;
use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, max_term_width = 100)]
struct XtaskCli {
    #[command(subcommand)]
    command: XtaskCommand,
}

#[derive(Subcommand)]
enum XtaskCommand {
    /// Build the eBPF object that the daemon embeds
    ///
    /// Finds or installs a Rust with the sources of its library, LLVM's development files, and bpf-linker. One object
    /// has the programs of all architectures.
    BuildEbpf {
        /// The architecture that the object must serve. It is the same object for each
        #[arg(long, value_name = "NAME", value_parser = architecture::NAMES)]
        arch: Option<String>,
    },
    /// Build all, for release: target/release/selfconn
    Build {
        /// Build a static binary for this architecture: target/NAME-unknown-linux-musl/release/selfconn
        #[arg(long, value_name = "NAME", value_parser = architecture::NAMES)]
        arch: Option<String>,
    },
    /// Build all and start the daemon (through sudo, if you are not root)
    Run {
        /// Options of `selfconn run`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run everything that must pass: format, lints, unit tests, and as root live tests, CLI tests and other
    /// kernels
    Test {
        /// Run only the tests with this in their name
        filter: Option<String>,
        /// Boot no virtual machines: by default the oldest kernel, the newest, the newest under lockdown, and one of
        /// the other architecture
        #[arg(long)]
        no_kernels: bool,
    },
    /// Check the unit, the alert rules and the metrics with systemd's and Prometheus's own programs
    Operations,
    /// Write the alert rules as an object of the Prometheus operator, for packaging/kubernetes
    PrometheusRule,
    /// Make the release: packages, a tarball, bills of materials, checksums
    Dist(dist::DistArgs),
    /// Build the container image, and run it as the DaemonSet would
    Image(dist::ArchitectureArgs),
    /// Install, rotate, kill, upgrade and purge the packages under systemd in virtual machines
    Service(vm::service::ServiceArgs),
    /// Build kernels without BTF, kprobes or tracefs from Debian's kernel source, and boot them
    ReducedKernels,
    /// Run the live tests on other kernels, in virtual machines
    Vm(vm::VmArgs),
    /// Run test suites in Python, Node and Rust under `selfconn exec`
    Suites,
    /// Measure what selfconn costs, and compare it with its targets
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let XtaskCli { command } = XtaskCli::parse();
    match Workspace::find().and_then(|workspace| dispatch(&command, &workspace)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn dispatch(command: &XtaskCommand, workspace: &Workspace) -> Result<()> {
    match command {
        XtaskCommand::BuildEbpf { arch: _ } => build_ebpf::build(workspace),
        XtaskCommand::Build { arch: Some(name) } => {
            daemon::build_for(workspace, Architecture::named(Some(name))?)
        }
        XtaskCommand::Build { arch: None } => daemon::build(workspace),
        XtaskCommand::Run { arguments } => daemon::run(workspace, arguments),
        XtaskCommand::Test { filter, no_kernels } => test::test(workspace, filter.as_deref(), !no_kernels),
        XtaskCommand::Operations => operations::operations(workspace),
        XtaskCommand::PrometheusRule => prometheus_rule::write(workspace),
        XtaskCommand::Dist(arguments) => dist::run(arguments, workspace),
        XtaskCommand::Image(arguments) => image::run(arguments, workspace),
        XtaskCommand::Service(arguments) => vm::service::run(arguments, workspace),
        XtaskCommand::ReducedKernels => vm::reduced::run(workspace),
        XtaskCommand::Vm(arguments) => vm::run(arguments, workspace),
        XtaskCommand::Suites => suites::run(workspace),
        XtaskCommand::Bench(arguments) => bench::run(arguments, workspace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_can_be_asked_for_by_each_architecture_and_no_other() {
        let parse = |arguments: &[&str]| {
            let arguments = [&["xtask", "build-ebpf"], arguments].concat();
            XtaskCli::try_parse_from(arguments)
                .map(|cli| matches!(cli.command, XtaskCommand::BuildEbpf { .. }))
        };
        assert!(parse(&[]).unwrap());
        for name in architecture::NAMES {
            assert!(parse(&["--arch", name]).unwrap(), "{name}");
        }
        let error = parse(&["--arch", "riscv64"]).unwrap_err().to_string();
        assert!(error.contains("[possible values: x86_64, aarch64]"), "{error}");
    }
}
