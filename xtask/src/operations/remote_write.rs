//! Prometheus writes the metrics to VictoriaMetrics, from the distribution's package, which is down for a while.
//! Nothing is missing there.

use std::{net::SocketAddr, path::Path, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    background::{BackgroundProcess, free_address},
    document::Document,
    prometheus::{Prometheus, scraped_daemon},
};
use crate::{environment, packages, run, workspace::Workspace};

/// A store that outlives its server.
pub(super) struct VictoriaMetrics {
    program: PathBuf,
}

impl VictoriaMetrics {
    /// The program of the package, which is not installed, because its installation starts a service.
    pub(super) fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        let directory = workspace.target.join("operations/victoria-metrics");
        let program = directory.join("usr/bin/victoria-metrics");
        if !program.is_file() {
            packages::unpack(&["victoria-metrics"], &directory)?;
        }
        Ok(Self { program })
    }

    fn serve(&self, address: SocketAddr, dir: &Path) -> Result<BackgroundProcess> {
        let mut command = environment::plain(&self.program);
        command.current_dir(dir).args([
            &format!("-httpListenAddr={address}"),
            "-storageDataPath=victoria-metrics",
            "-retentionPeriod=1",
            // A sample can be asked for at once.
            "-search.latencyOffset=0s",
        ]);
        BackgroundProcess::start(command, "victoria-metrics.log", dir)
    }

    /// Makes self-connections before, while and after the store is down, and compares it with Prometheus.
    pub(super) fn gets_everything(&self, prometheus: &Prometheus, workspace: &Workspace) -> Result<String> {
        let dir = tempfile::tempdir().context("make a directory for VictoriaMetrics")?;
        let dir = dir.path();
        let selfconn = workspace.target.join("debug/selfconn");
        let (daemon, metrics) = scraped_daemon(&selfconn, dir)?;
        let (api, store_api) = (free_address()?, free_address()?);
        let mut store = self.serve(store_api, dir)?;
        let config = format!(
            "global: {{ scrape_interval: 1s }}\nscrape_configs:\n  - job_name: selfconn\n    \
             static_configs: [{{ targets: [\"{metrics}\"] }}]\n\
             remote_write:\n  - url: http://{store_api}/api/v1/write\n    queue_config: {{ max_backoff: 1s, batch_send_deadline: 1s }}\n"
        );
        let mut server = prometheus.serve(&config, api, dir)?;
        let load = |count: usize| -> Result<()> {
            (0..count).try_for_each(|_| {
                run::output(environment::plain(&selfconn).args(["repro", "--mode", "bind"])).map(drop)
            })
        };
        let has = |at: SocketAddr, expression: &str| {
            // The query fails until the server listens.
            Ok(prometheus.ask(at, expression).is_ok_and(|found| !found.trim().is_empty()))
        };
        load(3)?;
        store.wait_until("three are stored", || has(store_api, &format!("{BOUND} == 3")))?;
        store.end();
        load(2)?;
        server.wait_until("five are scraped", || has(api, &format!("{BOUND} == 5")))?;
        // Longer than Prometheus waits between two attempts.
        thread::sleep(Duration::from_secs(3));
        let mut store = self.serve(store_api, dir)?;
        load(1)?;
        store.wait_until("six are stored", || has(store_api, &format!("{BOUND} == 6")))?;
        // The last scrape finds no daemon. From then on the number of samples stays.
        drop(daemon);
        store.wait_until("the end is stored", || has(store_api, "up{job=\"selfconn\"} == 0"))?;
        let samples = format!("count_over_time({BOUND}[1h])");
        let scraped = value_of(&prometheus.ask(api, &samples)?)?;
        let stored = value_of(&prometheus.ask(store_api, &samples)?)?;
        ensure!(scraped == stored, "of {scraped} samples {stored} are stored");

        let page = Document::read(workspace, "fleet.md")?;
        let answer = prometheus.ask(store_api, page.block("promql")?)?;
        ensure!(answer.contains(&metrics.to_string()), "the question: {answer:?}");
        Ok(format!("scraped {scraped} samples, stored {stored}; {}", answer.trim()))
    }
}

/// The series of the connections that the check makes.
const BOUND: &str = "selfconn_connections_total{cause=\"bound\"}";

/// The value in the answer of promtool: `{labels} => value @[time]`.
fn value_of(answer: &str) -> Result<u64> {
    let value = answer.split(" => ").nth(1).and_then(|rest| rest.split(' ').next());
    value.and_then(|value| value.parse().ok()).with_context(|| format!("no number in {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_an_answer_is_between_arrow_and_time() {
        assert_eq!(value_of("{cause=\"bound\"} => 17 @[1764225600]\n").unwrap(), 17);
        assert!(value_of("").is_err());
    }
}
