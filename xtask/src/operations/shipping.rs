//! Ships events with the shipped configurations, by programs of the distribution's packages: rsyslog into a real
//! PostgreSQL, and into the mock broker of librdkafka, which speaks Kafka's protocol; systemd-journal-upload into
//! another journal. Rotation, a store that is down and a SIGKILL come between. ClickHouse's engine gets the log without
//! an agent. Then the store is asked what docs/fleet.md asks.

mod clickhouse;
mod journal;
mod kafka;
mod log_source;
mod postgresql;

pub(super) use clickhouse::ClickHouse;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::background::BackgroundProcess;
use crate::{environment, packages, workspace::Workspace};

/// rsyslog with its modules, the programs for journals of other hosts, and the libraries that they need.
const PACKAGES: [&str; 10] = [
    "rsyslog",
    "rsyslog-pgsql",
    "rsyslog-kafka",
    "libestr0",
    "libfastjson4",
    "librdkafka1",
    "kcat",
    "libyajl2",
    "systemd-journal-remote",
    "libmicrohttpd12",
];

/// Where the packages are unpacked. They are not installed, because rsyslog's installation starts a service.
pub(super) struct Shipping {
    root: PathBuf,
}

impl Shipping {
    pub(super) fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        packages::install_programs(&[
            ("psql", "postgresql-client"),
            ("/usr/lib/postgresql", "postgresql"),
            ("/lib/systemd/systemd-journald", "systemd"),
            ("openssl", "openssl"),
            ("jq", "jq"),
        ])?;
        let root = workspace.target.join("operations/shipping");
        if !root.join("lib/systemd/systemd-journal-remote").is_file() {
            packages::unpack(&PACKAGES, &root)?;
        }
        Ok(Self { root })
    }

    /// A program of the unpacked packages, with their libraries.
    fn program(&self, path: &str) -> Command {
        let mut command = environment::plain(self.root.join(path));
        command.env("LD_LIBRARY_PATH", self.libraries());
        command
    }

    /// The folder of libraries, whose name has the machine's.
    fn libraries(&self) -> PathBuf {
        packages::libraries_in(&self.root.join("usr/lib"))
    }

    pub(super) fn to_postgresql(&self, workspace: &Workspace) -> Result<String> {
        postgresql::ships(self, workspace)
    }

    pub(super) fn to_kafka(&self, workspace: &Workspace) -> Result<String> {
        kafka::ships(self, workspace)
    }

    pub(super) fn to_a_journal(&self, workspace: &Workspace) -> Result<String> {
        journal::ships(self, workspace)
    }

    /// Starts rsyslog with one of the shipped configurations. `changes` are what a user would edit in it.
    fn rsyslog(
        &self,
        workspace: &Workspace,
        name: &str,
        dir: &Path,
        changes: &[(&str, &str)],
    ) -> Result<Rsyslog<'_>> {
        let file = workspace.root.join("packaging/shipping").join(name);
        let mut config = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let log = dir.join("events.jsonl");
        let work = format!("global(workDirectory={dir:?} maxMessageSize");
        let log = log.to_str().context("the log's path is not UTF-8")?;
        let here = [("/var/log/selfconn/events.jsonl", log), ("global(maxMessageSize", &*work)];
        for (from, to) in here.iter().chain(changes) {
            ensure!(config.contains(from), "{name} has no {from}");
            config = config.replace(from, to);
        }
        fs::write(dir.join("rsyslog.conf"), config).context("write rsyslog.conf")?;
        Rsyslog::start(self, dir)
    }
}

struct Rsyslog<'a> {
    packages: &'a Shipping,
    dir: PathBuf,
    process: BackgroundProcess,
}

impl<'a> Rsyslog<'a> {
    fn start(packages: &'a Shipping, dir: &Path) -> Result<Self> {
        let mut command = packages.program("usr/sbin/rsyslogd");
        command.arg("-n").arg("-i").arg(dir.join("rsyslogd.pid"));
        command.arg("-M").arg(packages.libraries().join("rsyslog")).arg("-f").arg(dir.join("rsyslog.conf"));
        let process = BackgroundProcess::start(command, "rsyslogd", dir)?;
        Ok(Self { packages, dir: dir.to_owned(), process })
    }

    /// Kills it and starts another one. `meanwhile` happens between the two.
    fn restart_after_kill(self, meanwhile: impl FnOnce() -> Result<()>) -> Result<Self> {
        let Self { packages, dir, process } = self;
        process.signal(Signal::KILL)?;
        drop(process);
        // The killed one has left it.
        let _ = fs::remove_file(dir.join("rsyslogd.pid"));
        meanwhile()?;
        Self::start(packages, &dir)
    }
}
