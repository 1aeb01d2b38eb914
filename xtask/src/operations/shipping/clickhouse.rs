//! The table for ClickHouse, in ClickHouse's engine without its server: an event that arrives twice is there once.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{
    super::{
        document::Document,
        python::{PythonEnvironment, Requirements},
    },
    log_source::{HOST, LogSource},
};
use crate::{run, workspace::Workspace};

/// The engine as a library, without the packages that only its other interfaces need.
const REQUIREMENTS: [Requirements; 1] =
    [Requirements { options: &["--no-deps"], packages: &["chdb-core==26.9.0"] }];

pub(crate) struct ClickHouse {
    python: PythonEnvironment,
}

impl ClickHouse {
    pub(crate) fn find_or_install(workspace: &Workspace) -> Result<Self> {
        Ok(Self { python: PythonEnvironment::find_or_make(workspace, "clickhouse", &REQUIREMENTS)? })
    }

    pub(crate) fn keeps_each_event_once(&self, workspace: &Workspace) -> Result<String> {
        let dir = tempfile::tempdir().context("make a directory for ClickHouse")?;
        let store = Store {
            python: &self.python,
            script: workspace.root.join("xtask/src/operations/shipping/clickhouse/query.py"),
            tables: dir.path().join("tables"),
        };
        store.query(&fs::read_to_string(workspace.root.join("packaging/shipping/clickhouse.sql"))?)?;
        let mut source = LogSource::start(workspace, dir.path())?;
        source.load(20)?;
        source.rotate()?;
        source.load(20)?;
        let written = source.finish()?;
        let files = source.files();
        // An agent that does not know how far it had come sends the first file once more.
        for file in files.iter().chain(&files[..1]) {
            let path = file.to_str().context("the log's path is not UTF-8")?;
            store.query(&format!(
                "INSERT INTO selfconn_events (body) SELECT line FROM file('{path}', 'LineAsString')"
            ))?;
        }
        let made = written.numbers.len() as u64;
        let stored = store.number("SELECT count() FROM selfconn_events")?;
        let kept = store.number("SELECT count() FROM selfconn_events FINAL")?;
        ensure!(stored > made, "no event arrived twice");
        ensure!(kept == made, "of {made} events {kept} are left");

        let section = Document::read(workspace, "fleet.md")?.section("ClickHouse")?;
        let queries = section.blocks("sql");
        ensure!(queries.len() == 2, "docs/fleet.md has {} queries", queries.len());
        let answer = store.query(queries[0])?;
        ensure!(answer.contains(HOST), "the question: {answer:?}");
        let incomplete = || store.query(queries[1]);
        let found = incomplete()?;
        ensure!(found.is_empty(), "no run is incomplete, but: {found}");
        for (what, condition) in [("event", "seq = 2".to_owned()), ("end", format!("seq = {made}"))] {
            // The engine runs a deletion in the background, unless it is to wait.
            store.query(&format!(
                "DELETE FROM selfconn_events WHERE {condition} SETTINGS mutations_sync = 1"
            ))?;
            let found = incomplete()?;
            ensure!(found.contains(HOST), "a missing {what} is not seen: {found:?}");
            store.query(&format!(
                "INSERT INTO selfconn_events (body) SELECT line FROM file('{}', 'LineAsString') \
                 WHERE JSONExtractUInt(line, 'seq') IN (2, {made})",
                dir.path().join("events.jsonl*").display()
            ))?;
            let found = incomplete()?;
            ensure!(found.is_empty(), "no run is incomplete any more, but: {found}");
        }
        Ok(format!(
            "made {made}, arrived {stored}, kept {kept}, missing 0; {}",
            answer.lines().next().unwrap_or_default()
        ))
    }
}

struct Store<'a> {
    python: &'a PythonEnvironment,
    script: PathBuf,
    tables: PathBuf,
}

impl Store<'_> {
    fn query(&self, query: &str) -> Result<String> {
        let mut command = self.python.script(&self.script);
        let rows =
            run::filter(command.arg(&self.tables), query.as_bytes()).with_context(|| query.to_owned())?;
        Ok(String::from_utf8(rows)?.trim_end().to_owned())
    }

    fn number(&self, query: &str) -> Result<u64> {
        let text = self.query(query)?;
        text.parse().with_context(|| format!("{query}: {text:?} is not a number"))
    }
}
