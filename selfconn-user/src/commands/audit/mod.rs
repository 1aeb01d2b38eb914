//! `selfconn audit`: finds the ports at risk of a self-connection, and prints the risk, its cause and the
//! fix. It changes nothing on the host.
//!
//! No client self-connects to a port that has a listener. The risk begins when the listener is gone and
//! clients still connect. So the audit covers all listeners, and also the services that the user names,
//! because these may be down.
//!
//! Each step knows only the steps before it: `collect` reads the state of the host, `assess` rates it without
//! I/O, `fix` removes the risks, and `print` writes the output. `services` and `boot` are two more inputs.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, bail};

use crate::{event::text::escape, sockets::NamespaceSelection, system::logger};
pub(super) use print::AuditLine;
use print::NamespaceReport;
use print::RiskCounts;
use services::RequestedServices;

mod assess;
mod boot;
mod collect;
mod fix;
mod groups;
mod print;
mod reservation;
mod services;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn audit                     exit code 0: nothing at risk, 1: something, 2: error
  selfconn audit --port 44446        a service that may be down now, when it matters most
  selfconn audit --port 30000-32767  the node ports of Kubernetes, which have no listener
  selfconn audit --sysctl > /etc/sysctl.d/90-selfconn.conf   1 if one write cannot set all
  selfconn audit --json | jq -r 'select(.risk == \"high\") | \"\\(.netns) \\(.port)\"'

high: connect() itself can choose the port. low: only a client that binds port 0 before
connect() or uses IP_LOCAL_PORT_RANGE gets the port, or any client when all better ports are
taken. none: only a client that names the port gets it. Fixes and reasons: docs/remedies.md.
Root sees every network namespace that a process, a descriptor or a mount leads to. Other users see their own.
What could not be looked at is listed as not seen, and as unseen in the summary; the exit code is about the rest.";

/// Options of `audit`.
#[derive(Debug, clap::Args)]
pub struct AuditArgs {
    /// Network namespace to audit: the current one, a file such as /run/netns/NAME or
    /// /proc/PID/ns/net, the one with this inode, or all [default: all; with --sysctl self]
    #[arg(long, value_name = "self|PATH|INODE|all")]
    netns: Option<String>,
    /// Also audit this port, or these (30000-32767), with or without a listener; can be repeated
    #[arg(long = "port", value_name = "N[-N]")]
    ports: Vec<String>,
    /// Also audit the services in this file: a line is `port [addr]` or `first-last [addr]`, and # starts
    /// a comment
    #[arg(long, value_name = "FILE")]
    services: Option<PathBuf>,
    /// Print only a sysctl.d file that removes the risks of one namespace
    #[arg(long, conflicts_with = "json")]
    sysctl: bool,
    /// Print one JSON object per line: one for each port, and a summary
    #[arg(long)]
    json: bool,
    /// Read /proc/net/tcp instead of asking sock_diag
    #[arg(long, hide = true)]
    procfs: bool,
}

/// Runs the audit and prints its result.
///
/// # Errors
/// If an argument is invalid, if the services file cannot be read, if no namespace can be inspected, or if
/// stdout cannot be written.
pub fn run(args: &AuditArgs) -> Result<ExitCode> {
    logger::init(0, false);
    let selection = namespace_selection(args)?;
    let services = requested_services(args)?;
    let mut input = collect::collect(&selection, args.procfs, &services)?;
    let boot_settings = input.init_namespace.map(|_| boot::read(Path::new("/")));
    input.unseen.extend(boot_settings.iter().flat_map(|settings| &settings.unseen).cloned());
    let report = |(index, namespace_info): (usize, collect::NamespaceInfo)| {
        let assessments = assess::assess(&namespace_info);
        let settings = boot_settings.as_ref().filter(|_| input.init_namespace == Some(index));
        let ports = &namespace_info.local_ports;
        let disagreements = settings.map(|settings| settings.disagreements(ports.range, &ports.reserved));
        let fix = fix::fix(&namespace_info, &assessments, &port_options(args));
        NamespaceReport { assessments, fix, disagreements: disagreements.unwrap_or_default(), namespace_info }
    };
    let reports: Vec<_> = input.namespaces.into_iter().enumerate().map(report).collect();
    for item in &input.unseen {
        let _ = writeln!(io::stderr(), "selfconn: not seen: {}", escape(item));
    }
    let (out, is_safe) = match (args.sysctl, args.json) {
        (true, _) => sysctl_file(&reports),
        (false, is_json) => {
            let RiskCounts { high, low, .. } = RiskCounts::of(&reports);
            let out = match is_json {
                true => print::json(&reports, &input.unseen)?,
                false => print::text(&reports).into_bytes(),
            };
            (out, high + low == 0)
        }
    };
    super::print(&out)?;
    Ok(if is_safe { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// The sysctl.d file, and true if it removes all risks. What it leaves out is also said on stderr, because
/// stdout is usually redirected.
fn sysctl_file(reports: &[NamespaceReport]) -> (Vec<u8>, bool) {
    let text = |report: &NamespaceReport| fix::sysctl_d(&report.namespace_info, &report.assessments);
    let notes = reports.iter().filter_map(|report| report.fix.as_ref()?.note.as_ref());
    let mut is_complete = true;
    for note in notes {
        is_complete = false;
        let _ = writeln!(io::stderr(), "selfconn: {note}; the file has the command");
    }
    (reports.iter().map(text).collect::<String>().into_bytes(), is_complete)
}

/// The options that name ports, for a command that runs `audit` again.
fn port_options(args: &AuditArgs) -> String {
    let ports = args.ports.iter().map(|ports| format!(" --port {}", fix::shell_quoted(ports)));
    let services = args.services.iter().map(|path| {
        // The command may run in another directory.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        format!(" --services {}", fix::shell_quoted(&path.display().to_string()))
    });
    ports.chain(services).collect()
}

fn namespace_selection(args: &AuditArgs) -> Result<NamespaceSelection> {
    match args.netns.as_deref().map(NamespaceSelection::parse) {
        None if args.sysctl => Ok(NamespaceSelection::Current),
        None => Ok(NamespaceSelection::All),
        Some(NamespaceSelection::All) if args.sysctl => {
            bail!("--sysctl needs one network namespace: use --netns self or --netns /run/netns/NAME")
        }
        Some(selection) => Ok(selection),
    }
}

fn requested_services(args: &AuditArgs) -> Result<Vec<RequestedServices>> {
    let mut services = match &args.services {
        Some(path) => services::read(path)?,
        None => vec![],
    };
    for ports in &args.ports {
        services.push(RequestedServices { addr: None, ports: services::parse_ports(ports)? });
    }
    Ok(services)
}
