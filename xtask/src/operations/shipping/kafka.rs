//! rsyslog into Kafka's protocol. The broker is the mock of librdkafka, inside of kcat, which also consumes.

use std::{collections::BTreeSet, fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    super::background::BackgroundProcess,
    Shipping,
    log_source::{HOST, LogSource, number_of, whole_lines},
};
use crate::{run, workspace::Workspace};

/// What kcat has consumed: the number of each event, in order.
fn consumed(output: &Path) -> Result<Vec<u64>> {
    // Messages of the mock broker are in between.
    let text = fs::read_to_string(output).context("read what kcat has consumed")?;
    whole_lines(&text).filter(|line| line.starts_with("{\"time\"")).map(number_of).collect()
}

pub(super) fn ships(packages: &Shipping, workspace: &Workspace) -> Result<String> {
    let dir = tempfile::tempdir().context("make a directory for Kafka")?;
    let dir = dir.path();
    let mut kcat = packages.program("usr/bin/kcat");
    kcat.args(["-C", "-u", "-q", "-X", "test.mock.num.brokers=1", "-d", "mock", "-b", "127.0.0.1:1"]);
    kcat.args(["-t", "selfconn", "-o", "beginning"]);
    let mut broker = BackgroundProcess::start(kcat, "kcat", dir)?;
    let output = dir.join("kcat");
    let address = || {
        let text = fs::read_to_string(&output).ok()?;
        let after = text.split("bootstrap.servers=").nth(1)?;
        Some(after.split(char::is_whitespace).next()?.to_owned())
    };
    broker.wait_until("the broker listens", || Ok(address().is_some()))?;
    let address = address().context("the broker has no address")?;
    let mut source = LogSource::start(workspace, dir)?;
    let changes = [("127.0.0.1:9092", &*address)];
    let rsyslog = packages.rsyslog(workspace, "rsyslog-kafka.conf", dir, &changes)?;

    source.load(20)?;
    source.rotate()?;
    source.load(10)?;
    // A broker that answers nothing.
    broker.signal(Signal::STOP)?;
    source.load(10)?;
    thread::sleep(Duration::from_secs(3));
    broker.signal(Signal::CONT)?;
    source.load(10)?;
    // Then nothing is in the memory of the producer, which a crash would take away.
    broker.wait_until("all events so far are consumed", || {
        let written = source.written()?.numbers;
        Ok(written.is_subset(&consumed(&output)?.into_iter().collect()))
    })?;
    let rsyslog = rsyslog.restart_after_kill(|| source.load(10))?;
    source.load(10)?;
    let written = source.finish()?;
    let last = written.numbers.last().copied().unwrap_or_default();
    broker.wait_until("the last event is consumed", || Ok(consumed(&output)?.contains(&last)))?;
    drop(rsyslog);
    let numbers = consumed(&output)?;
    let distinct: BTreeSet<u64> = numbers.iter().copied().collect();
    let missing: Vec<_> = written.numbers.difference(&distinct).collect();
    ensure!(missing.is_empty(), "missing: {missing:?}");
    let mut keys = packages.program("usr/bin/kcat");
    keys.args(["-C", "-q", "-e", "-b", &address, "-t", "selfconn", "-o", "beginning", "-f", "%k\n"]);
    let keys = run::output(&mut keys)?;
    let keys: BTreeSet<_> = keys.lines().collect();
    ensure!(keys == [HOST].into(), "the keys of the messages: {keys:?}");
    Ok(format!(
        "made {}, consumed {}, twice {}, missing 0, from a mock broker",
        written.numbers.len(),
        numbers.len(),
        numbers.len() - distinct.len()
    ))
}
