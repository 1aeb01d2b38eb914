//! rsyslog into PostgreSQL: nothing is missing, and nothing is there twice.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    super::{
        background::{BackgroundProcess, free_address},
        document::Document,
    },
    Shipping,
    log_source::LogSource,
};
use crate::{environment, run, workspace::Workspace};

/// PostgreSQL refuses to run as root.
const NOBODY: u32 = 65_534;

/// A server with a cluster of its own.
struct Postgres {
    bin: PathBuf,
    data: PathBuf,
    dir: PathBuf,
    port: String,
    process: Option<BackgroundProcess>,
}

impl Postgres {
    fn start(dir: &Path) -> Result<Self> {
        let versions = fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
        let bin =
            versions.flatten().map(|entry| entry.path().join("bin")).find(|bin| bin.join("initdb").is_file());
        let bin = bin.context("PostgreSQL has no initdb")?;
        let data = dir.join("postgresql");
        fs::create_dir(&data)?;
        chown(&data, Some(NOBODY), Some(NOBODY))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        let mut initdb = environment::plain(bin.join("initdb"));
        initdb.arg("--pgdata").arg(&data).args([
            "--username=selfconn",
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
        ]);
        run::output(initdb.uid(NOBODY).gid(NOBODY).current_dir(&data))?;
        let port = free_address()?.port().to_string();
        let mut this = Self { bin, data, dir: dir.to_owned(), port, process: None };
        this.resume()?;
        Ok(this)
    }

    fn resume(&mut self) -> Result<()> {
        let mut command = environment::plain(self.bin.join("postgres"));
        command.arg("-D").arg(&self.data).arg("-k").arg(&self.data).args([
            "-p",
            &self.port,
            "-c",
            "fsync=off",
        ]);
        command.uid(NOBODY).gid(NOBODY).current_dir(&self.data);
        let mut process = BackgroundProcess::start(command, "postgres", &self.dir)?;
        process.wait_until("PostgreSQL answers", || Ok(self.query_in("postgres", "select 1").is_ok()))?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it at once. Its clients lose their connections.
    fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |process| process.signal(Signal::INT))
    }

    fn query_in(&self, database: &str, query: &str) -> Result<String> {
        let mut psql = environment::plain("psql");
        psql.args([
            "--host=127.0.0.1",
            "--username=selfconn",
            "--no-psqlrc",
            "--quiet",
            "--no-align",
            "--tuples-only",
        ]);
        psql.args(["--set=ON_ERROR_STOP=1", "--port", &self.port, "--dbname", database, "--command", query]);
        Ok(run::output(&mut psql)?.trim().to_owned())
    }

    fn query(&self, query: &str) -> Result<String> {
        self.query_in("selfconn", query)
    }

    fn number(&self, query: &str) -> Result<u64> {
        let text = self.query(query)?;
        text.parse().with_context(|| format!("{query}: {text:?} is not a number"))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

pub(super) fn ships(packages: &Shipping, workspace: &Workspace) -> Result<String> {
    let dir = tempfile::tempdir().context("make a directory for PostgreSQL")?;
    let dir = dir.path();
    let mut store = Postgres::start(dir)?;
    store.query_in("postgres", "create database selfconn")?;
    store.query(&fs::read_to_string(workspace.root.join("packaging/shipping/postgresql.sql"))?)?;
    let mut source = LogSource::start(workspace, dir)?;
    let server = format!("server=\"127.0.0.1\" serverport=\"{}\"", store.port);
    let changes = [("server=\"127.0.0.1\"", &*server)];
    let rsyslog = packages.rsyslog(workspace, "rsyslog-postgresql.conf", dir, &changes)?;

    source.load(30)?;
    source.rotate()?;
    source.load(20)?;
    store.stop()?;
    source.load(20)?;
    // Longer than rsyslog waits between two attempts.
    thread::sleep(Duration::from_secs(6));
    store.resume()?;
    source.load(20)?;
    let mut rsyslog = rsyslog.restart_after_kill(|| {
        source.load(10)?;
        source.rotate()?;
        source.load(10)
    })?;
    source.load(10)?;
    let written = source.finish()?;
    let count = || store.number("select count(*) from selfconn_events");
    let is_complete = || -> Result<bool> {
        Ok(store.number("select count(*) from selfconn where event = 'stopped'")? == 1)
    };
    // An event is an insert of its own, and a busy machine makes hundreds of them a second, or less.
    while !is_complete()? {
        let before = count()?;
        rsyslog.process.wait_until("another event arrives", || Ok(count()? > before || is_complete()?))?;
    }
    let made = written.numbers.len() as u64;
    let stored = count()?;
    let twice = stored - store.number("select count(distinct (boot_id, run, seq)) from selfconn")?;
    ensure!((stored, twice) == (made, 0), "of {made} events {stored} are stored, {twice} of them twice");
    let longest = store.number("select max(octet_length(body->>'cmdline')) from selfconn_events")?;
    let section = Document::read(workspace, "fleet.md")?.section("PostgreSQL")?;
    let queries = section.blocks("sql");
    ensure!(queries.len() == 2, "docs/fleet.md has {} queries", queries.len());
    let (answer, complete) = (store.query(queries[0])?, store.query(queries[1])?);
    ensure!(answer.contains(super::log_source::HOST), "the question: {answer:?}");
    ensure!(complete.is_empty(), "no run is incomplete, but: {complete}");
    // The end of a run that did not arrive is seen as soon as the host has begun another one.
    store.query("delete from selfconn_events where body->>'event' = 'stopped'")?;
    let running = store.query(queries[1])?;
    ensure!(running.is_empty(), "the newest run may go on, but: {running}");
    store.query(
        "insert into selfconn_events select body || '{\"run\": \"2\", \"time\": \"2999-01-01T00:00:00Z\"}' \
         from selfconn_events where (body->>'seq')::bigint = 1",
    )?;
    let killed = store.query(queries[1])?;
    ensure!(killed.contains(super::log_source::HOST), "a missing end is not seen: {killed:?}");
    store.query("delete from selfconn_events where body->>'run' = '2'")?;
    // An event that a store did not get is seen.
    store.query("delete from selfconn_events where (body->>'seq')::bigint = 2")?;
    let incomplete = store.query(queries[1])?;
    ensure!(incomplete.contains(super::log_source::HOST), "a missing event is not seen: {incomplete:?}");
    Ok(format!(
        "made {made}, stored {stored}, twice {twice}, missing 0; longest line {} bytes, its command line {longest}; {}",
        written.longest,
        answer.lines().next().unwrap_or_default()
    ))
}
