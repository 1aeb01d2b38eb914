//! `selfconn audit`: which ports can hit themselves, how likely that is, and what prevents it. It changes nothing.
//!
//! A port that somebody listens on can't be hit: it can as soon as the listener is gone and its clients still dial. So
//! what is looked at are listeners, and services that the user names because they may be down just now.

mod boot;
mod fix;
mod grade;
mod look;
mod print;
mod services;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, bail};

use self::{
    print::{Counts, Report},
    services::Asked,
};
use crate::{logger, sink::text::escape, sockets::Which};

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn audit                     exit code 0: nothing at risk, 1: something, 2: error
  selfconn audit --port 44446        a service that may be down now, when it matters most
  selfconn audit --sysctl > /etc/sysctl.d/90-selfconn.conf
  selfconn audit --json | jq -r 'select(.risk == \"high\") | \"\\(.netns) \\(.port)\"'

high: connect() itself may choose the port. low: a client must bind port 0 before it connects,
use IP_LOCAL_PORT_RANGE, or find the better ports taken. none: nothing but the client itself
chooses it. What to do about it, and the reasons: docs/remedies.md.
As root it sees every network namespace; as another user its own, and says what it could not see.";

/// Options of `audit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The network namespace to look at: this one, that of a file as /run/netns/NAME or
    /// /proc/PID/ns/net, or every one [default: all; with --sysctl self]
    #[arg(long, value_name = "self|PATH|all")]
    netns: Option<PathBuf>,
    /// Look at this port, too, whether or not somebody listens on it now; may be given again
    #[arg(long = "port", value_name = "N")]
    ports: Vec<String>,
    /// Look at the services of this file, too: a line is `port [addr]`, # begins a comment
    #[arg(long, value_name = "FILE")]
    services: Option<PathBuf>,
    /// Print a file for sysctl.d that prevents what is found in one namespace, and nothing else
    #[arg(long, conflicts_with = "json")]
    sysctl: bool,
    /// One JSON object a line for each port, and one for the summary
    #[arg(long)]
    json: bool,
    /// Read /proc/net/tcp instead of asking sock_diag
    #[arg(long, hide = true)]
    procfs: bool,
}

/// Looks, judges, and tells.
///
/// # Errors
/// When what the user names can't be read, no namespace can be looked at, or stdout not written.
pub fn run(args: &Args) -> Result<ExitCode> {
    logger::init(0, false);
    let which = which(args)?;
    let asked = asked(args)?;
    let mut looked = look::look(&which, args.procfs, &asked)?;
    let boot = looked.boot.map(|_| boot::read(Path::new("/")));
    looked.unseen.extend(boot.iter().flat_map(|boot| &boot.unseen).cloned());
    let report = |(index, seen): (usize, look::Seen)| {
        let rows = grade::grade(&seen);
        let boot = boot.as_ref().filter(|_| looked.boot == Some(index));
        let disagreements = boot.map(|boot| boot.disagreements(seen.ports.range, &seen.ports.reserved));
        Report { rows, disagreements: disagreements.unwrap_or_default(), seen }
    };
    let reports: Vec<_> = looked.namespaces.into_iter().enumerate().map(report).collect();
    for what in &looked.unseen {
        let _ = writeln!(io::stderr(), "selfconn: not seen: {}", escape(what));
    }
    let out = match (args.sysctl, args.json) {
        (true, _) => {
            let text = |Report { seen, rows, .. }: &Report| fix::sysctl_d(seen, rows);
            reports.iter().map(text).collect::<String>().into_bytes()
        }
        (false, true) => print::json(&reports, &looked.unseen)?,
        (false, false) => print::text(&reports).into_bytes(),
    };
    super::print(&out)?;
    let Counts { high, low, .. } = Counts::of(&reports);
    Ok(if args.sysctl || high + low == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn which(args: &Args) -> Result<Which> {
    match args.netns.as_deref() {
        None if args.sysctl => Ok(Which::Own),
        None => Ok(Which::All),
        Some(name) if name == Path::new("self") => Ok(Which::Own),
        Some(name) if name == Path::new("all") && args.sysctl => {
            bail!(
                "--sysctl is for one network namespace: name it, as in --netns self or --netns /run/netns/NAME"
            )
        }
        Some(name) if name == Path::new("all") => Ok(Which::All),
        Some(path) => Ok(Which::At(path.to_owned())),
    }
}

fn asked(args: &Args) -> Result<Vec<Asked>> {
    let mut asked = match &args.services {
        Some(path) => services::read(path)?,
        None => vec![],
    };
    for port in &args.ports {
        asked.push(Asked { addr: None, port: services::port(port)? });
    }
    Ok(asked)
}
