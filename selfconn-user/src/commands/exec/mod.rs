//! `selfconn exec`: runs a command, and reports the self-connections of its processes at the end. The watch is a daemon
//! of its own (`watch`), which reports one control group (`group`); the rest of the host is no part of it.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    path::PathBuf,
    process::{ExitCode, ExitStatus},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{
    event::text::escape,
    guard::GuardMode,
    ports::{ReservedPorts, sysctl},
    system::process,
};
use findings::Findings;
use group::CommandGroup;
use report::ReportContext;
use signals::{SignalMask, Signals};
use watch::{Watch, WatchOptions};

mod command;
mod findings;
mod github;
mod group;
mod report;
mod signals;
mod tree;
mod user;
mod watch;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn exec -- make test           below sudo it runs as you, and only the watch as root
  selfconn exec --fail -- pytest       exit code 1 if a self-connection was found
  selfconn exec --guard refuse -- npm test
                                       no process of the command can connect to itself

Exit codes: the command's; 1 with --fail if something was found; 2 if it could not be watched,
and then the command was not run; 126 and 127 as a shell.";

#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// The command, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    /// Exit with 1 if a self-connection was found, or a server that one kept out, and the command succeeded
    #[arg(long)]
    fail: bool,
    /// Write the report into FILE instead of stderr
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Report the events as JSON lines, as `selfconn run --json` writes them
    #[arg(long)]
    json: bool,
    /// Also print annotations on stderr, and write a summary of the job if its variable is set
    #[arg(long, value_enum, value_name = "ECOSYSTEM")]
    annotate: Option<Ecosystem>,
    /// What to do about a connect of the command to itself, before there is a self-connection
    #[arg(long, value_enum, value_name = "MODE", default_value_t = GuardMode::Off)]
    guard: GuardMode,
    /// Run the command as this user; by default as the user who called sudo
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Make no control group
    #[arg(long, hide = true)]
    process_tree: bool,
    /// Run the command also if it can't be watched
    #[arg(long)]
    best_effort: bool,
}

/// Whose annotations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Ecosystem {
    /// GitHub Actions
    Github,
}

/// Runs the command.
///
/// # Errors
/// If it can't be watched, and must be.
pub fn run(args: &ExecArgs) -> Result<ExitCode> {
    let user = user::command_user(args.user.as_deref())?;
    // Before anything is started, so that every thread and the watch have them blocked.
    let mut signals = Signals::block().context("cannot receive signals")?;
    let report = args.report.as_deref().map(|path| {
        fs::File::create(path).with_context(|| format!("cannot create the report {}", path.display()))
    });
    let mut report = report.transpose()?;
    let group = if args.process_tree { Err(anyhow!("none is wanted")) } else { CommandGroup::create() };
    let (group, no_group) = match group {
        Ok(group) => (Some(group), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let watch = start_watch(args, group.as_ref(), no_group.as_deref(), signals.before());
    let watch = match watch {
        Ok(watch) => Some(watch),
        Err(error) if args.best_effort => {
            say(&format!("the command is not watched: {error:#}"));
            None
        }
        Err(error) => {
            remove(group);
            return Err(error.context("the command was not run, because it can't be watched"));
        }
    };
    let outcome = command::start(&args.command, group.as_ref(), user, signals.before());
    let outcome = outcome.map(|child| command::wait(&child, watch.as_ref().map(Watch::pid), &mut signals));
    let watch_ended = outcome.as_ref().ok().and_then(|ended| ended.as_ref().ok()?.watch);
    let findings = watch.map(|watch| watch.end(watch_ended)).transpose();
    let (what, mut notes) = match (&group, no_group) {
        (Some(group), _) => (format!("control group {}", escape(&group.watched().path)), vec![]),
        (None, why) => ("the process tree".to_owned(), vec![tree::limits(why.as_deref())]),
    };
    notes.extend(remove(group));
    let status = match outcome {
        Ok(ended) => ended.context("cannot wait for the command")?.status,
        Err(error) => {
            say(&format!("{}: {error}", escape(&args.command[0].to_string_lossy())));
            return Ok(ExitCode::from(command::code_of(&error)));
        }
    };
    let mut has_found = false;
    match findings {
        Ok(Some(findings)) => {
            has_found = findings.has_found();
            let watched = ReportContext { what: &what, notes: &notes, reserved: reserved_ports() };
            let text = report::text(&findings, &watched);
            // The exit code is the command's all the same.
            if let Err(error) = write_report(args, report.as_mut(), &text, &findings) {
                say(&format!("{error:#}"));
            }
        }
        Ok(None) => {}
        Err(error) => say(&format!("the report is lost: {error:#}")),
    }
    Ok(exit_code(status, args.fail && has_found))
}

fn start_watch(
    args: &ExecArgs,
    group: Option<&CommandGroup>,
    no_group: Option<&str>,
    mask: SignalMask,
) -> Result<Watch> {
    if let (None, Some(why)) = (group, no_group) {
        if args.guard != GuardMode::Off {
            bail!("--guard is for one control group only, and {why}");
        }
        // Events have the pids of the initial one.
        if !process::is_in_initial_pid_ns() {
            bail!("this is not the initial pid namespace, and {why}");
        }
        tree::adopt_orphans().context("cannot become the parent of orphans")?;
    }
    let group = group.map(CommandGroup::watched);
    Watch::start(&WatchOptions { group, guard: args.guard, mask })
}

/// Removes the group. Returns what should be known about it.
fn remove(group: Option<CommandGroup>) -> Option<String> {
    match group?.remove() {
        Ok(0) => None,
        Ok(1) => Some("1 process of the command still runs, and is not watched any more".to_owned()),
        Ok(left) => Some(format!("{left} processes of the command still run, and are not watched any more")),
        Err(error) => Some(format!("the control group of the command can't be removed: {error}")),
    }
}

/// The reserved ports of this network namespace, and its inode.
fn reserved_ports() -> Option<(u64, ReservedPorts)> {
    let netns = fs::metadata("/proc/self/ns/net").ok()?.ino();
    Some((netns, sysctl::local_ports().ok()?.reserved))
}

fn write_report(args: &ExecArgs, file: Option<&mut fs::File>, text: &str, findings: &Findings) -> Result<()> {
    let mut json = Vec::new();
    if args.json {
        let lines = [&findings.started].into_iter().chain(&findings.events).chain(&findings.stopped);
        for event in lines {
            serde_json::to_writer(&mut json, event)?;
            json.push(b'\n');
        }
    }
    let bytes = if args.json { json.as_slice() } else { text.as_bytes() };
    match file {
        Some(file) => file.write_all(bytes).context("cannot write the report")?,
        // Its reader may be gone. The exit code is still the command's.
        None => drop(io::stderr().write_all(bytes)),
    }
    if args.annotate == Some(Ecosystem::Github) {
        let _ = io::stderr().write_all(github::annotations(findings).as_bytes());
        if let Some(path) = std::env::var_os(github::SUMMARY_VARIABLE) {
            let mut summary =
                fs::File::options().append(true).create(true).open(&path).with_context(|| {
                    format!("cannot open the summary of the job, {}", path.to_string_lossy())
                })?;
            summary
                .write_all(github::summary(text, findings).as_bytes())
                .context("cannot write the summary")?;
        }
    }
    Ok(())
}

fn say(message: &str) {
    let _ = writeln!(io::stderr(), "selfconn: {message}");
}

/// The exit code of the command, or its signal, which ends this process, too.
fn exit_code(status: ExitStatus, fails: bool) -> ExitCode {
    match (status.code(), status.signal()) {
        (Some(0), _) if fails => ExitCode::from(1),
        (Some(code), _) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        (None, Some(signal)) => signals::die_by(signal),
        (None, None) => ExitCode::from(1),
    }
}
