//! Checks with Prometheus and promtool, from the distribution's package. The package is unpacked and not
//! installed, because its installation starts a service.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    background::{BackgroundProcess, free_address, http_get},
    dashboard::Dashboard,
};
use crate::{environment, packages, run, workspace::Workspace};

pub(super) struct Prometheus {
    promtool: PathBuf,
    server: PathBuf,
}

impl Prometheus {
    /// The programs in PATH, or those of the package.
    pub(super) fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        if environment::is_in_path("promtool") && environment::is_in_path("prometheus") {
            return Ok(Self { promtool: "promtool".into(), server: "prometheus".into() });
        }
        let directory = workspace.target.join("operations/prometheus");
        let bin = directory.join("usr/bin");
        let tools = Self { promtool: bin.join("promtool"), server: bin.join("prometheus") };
        if !tools.server.is_file() {
            packages::unpack(&["prometheus"], &directory)?;
        }
        Ok(tools)
    }

    pub(super) fn promtool(&self, arguments: &[&str]) -> Command {
        let mut command = environment::plain(&self.promtool);
        command.args(arguments);
        command
    }

    /// The answer to a query: a line for each series.
    pub(super) fn ask(&self, api: SocketAddr, expression: &str) -> Result<String> {
        run::output(&mut self.promtool(&["query", "instant", &format!("http://{api}"), expression]))
    }

    /// Starts a Prometheus with this configuration. Its files are in `dir`.
    pub(super) fn serve(&self, config: &str, api: SocketAddr, dir: &Path) -> Result<BackgroundProcess> {
        let config_path = dir.join("prometheus.yml");
        fs::write(&config_path, config).context("write prometheus.yml")?;
        let mut serve = environment::other(&self.server);
        serve.current_dir(dir).arg("--config.file").arg(&config_path).args([
            &format!("--web.listen-address={api}"),
            "--storage.tsdb.path=data",
            "--log.level=warn",
        ]);
        BackgroundProcess::start(serve, "prometheus", dir)
    }

    pub(super) fn rules_are_valid(&self, workspace: &Workspace) -> Result<String> {
        let mut check = self.promtool(&["check", "rules", "selfconn.rules.yml"]);
        last_line(check.current_dir(workspace.root.join("packaging/prometheus")))
    }

    pub(super) fn rules_fire(&self, workspace: &Workspace) -> Result<String> {
        let mut test = self.promtool(&["test", "rules", "selfconn.rules.test.yml"]);
        last_line(test.current_dir(workspace.root.join("packaging/prometheus")))
    }

    /// Starts a daemon and a Prometheus that scrapes it with our rules, makes a self-connection, and asks what the
    /// dashboard asks.
    pub(super) fn sees_a_self_connection(&self, workspace: &Workspace) -> Result<String> {
        let dir = tempfile::tempdir().context("make a directory for Prometheus")?;
        let selfconn = workspace.target.join("debug/selfconn");
        let (daemon, metrics) = scraped_daemon(&selfconn, dir.path())?;
        let api = free_address()?;
        let (status, text) = http_get(metrics, "/metrics")?;
        ensure!(status == "200", "/metrics: {status}: {text}");
        let complaints = run::filter(&mut self.promtool(&["check", "metrics"]), text.as_bytes())?;
        ensure!(complaints.is_empty(), "promtool: {} of\n{text}", String::from_utf8_lossy(&complaints));

        let rules = workspace.root.join("packaging/prometheus/selfconn.rules.yml");
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [{rules:?}]\nscrape_configs:\n  \
             - job_name: selfconn\n    static_configs: [{{ targets: [\"{metrics}\"] }}]\n"
        );
        let mut server = self.serve(&config, api, dir.path())?;
        let ask = |expression: &str| self.ask(api, expression);
        let mut wait_for = |expression: &str| {
            // The query fails until the server listens.
            server.wait_until(expression, || Ok(ask(expression).is_ok_and(|found| !found.trim().is_empty())))
        };
        wait_for("up{job=\"selfconn\"} == 1")?;
        wait_for("selfconn_healthy == 1")?;
        wait_for("count(selfconn_connections_total) == 3")?;
        // This mode binds the port, so the cause is known.
        run::output(environment::plain(&selfconn).args(["repro", "--mode", "bind"]))?;
        wait_for("selfconn_connections_total{cause=\"bound\"} >= 1")?;
        wait_for("ALERTS{alertname=\"SelfConnectionsMade\", alertstate=\"firing\"}")?;
        let dashboard = Dashboard::read(&workspace.root.join("packaging/grafana/selfconn.json"))?;
        let queries = dashboard.finds_something(ask)?;
        drop(daemon);
        wait_for("up{job=\"selfconn\"} == 0")?;
        Ok(format!("up, counted, alerted, {queries} queries of the dashboard, down"))
    }
}

/// A healthy daemon, and the address of its metrics.
pub(super) fn scraped_daemon(selfconn: &Path, dir: &Path) -> Result<(BackgroundProcess, SocketAddr)> {
    let metrics = free_address()?;
    let mut run = environment::other(selfconn);
    run.args(["run", "--json", "--metrics", &metrics.to_string(), "--log"]).arg(dir.join("log"));
    let mut daemon = BackgroundProcess::start(run, "selfconn", dir)?;
    daemon.wait_until("the daemon is healthy", || {
        Ok(http_get(metrics, "/healthz").is_ok_and(|(status, body)| status == "200" && body == "ok\n"))
    })?;
    Ok((daemon, metrics))
}

/// The last line of a program's output.
pub(super) fn last_line(command: &mut Command) -> Result<String> {
    let output = run::output(command)?;
    Ok(output.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned())
}
