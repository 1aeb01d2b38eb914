//! Prometheus and promtool, from the distribution's package. It is unpacked and not installed, for an installation
//! starts a service.

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::running::{Running, free_port, get};
use crate::{environment, packages, progress::must, workspace::Workspace};

pub(super) struct Tools {
    promtool: PathBuf,
    prometheus: PathBuf,
}

impl Tools {
    /// Those in the path, or the package's.
    pub(super) fn get(workspace: &Workspace) -> Result<Self> {
        if environment::is_in_path("promtool") && environment::is_in_path("prometheus") {
            return Ok(Self { promtool: "promtool".into(), prometheus: "prometheus".into() });
        }
        let dir = workspace.target.join("operations/prometheus");
        let bin = dir.join("usr/bin");
        let tools = Self { promtool: bin.join("promtool"), prometheus: bin.join("prometheus") };
        if !tools.prometheus.is_file() {
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
            if fetch(&dir).is_err() {
                // Lists that are older than the mirror name files that it no longer has.
                packages::update()?;
                fetch(&dir)?;
            }
            let package = fs::read_dir(&dir)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
                .context("apt-get download left no package")?;
            let mut unpack = environment::plain("dpkg-deb");
            unpack.arg("--extract").args([&package, &dir]);
            must("unpacking prometheus", unpack)?;
            fs::remove_file(&package)?;
        }
        Ok(tools)
    }

    fn promtool(&self, arguments: &[&str]) -> Command {
        let mut command = environment::plain(&self.promtool);
        command.args(arguments);
        command
    }

    pub(super) fn rules_are_valid(&self, workspace: &Workspace) -> Result<String> {
        let mut check = self.promtool(&["check", "rules", "selfconn.rules.yml"]);
        said(check.current_dir(workspace.root.join("packaging/prometheus")))
    }

    pub(super) fn rules_fire(&self, workspace: &Workspace) -> Result<String> {
        let mut test = self.promtool(&["test", "rules", "selfconn.rules.test.yml"]);
        said(test.current_dir(workspace.root.join("packaging/prometheus")))
    }

    /// A daemon, a Prometheus that scrapes it with our rules, and a self-connection.
    pub(super) fn sees_a_self_connection(&self, workspace: &Workspace) -> Result<String> {
        let dir = tempfile::tempdir().context("a directory for Prometheus")?;
        let selfconn = workspace.target.join("debug/selfconn");
        let (metrics, api) = (free_port()?, free_port()?);
        let mut run = environment::other(&selfconn);
        let log = dir.path().join("events.jsonl");
        run.args(["run", "--json", "--metrics", &metrics.to_string(), "--log"]).arg(log);
        let mut daemon = Running::start(run, dir.path())?;
        daemon.until("the daemon is healthy", || {
            Ok(get(metrics, "/healthz").is_ok_and(|(status, body)| status == "200" && body == "ok\n"))
        })?;
        let (status, text) = get(metrics, "/metrics")?;
        ensure!(status == "200", "/metrics: {status}: {text}");
        self.accepts(&text)?;

        let rules = workspace.root.join("packaging/prometheus/selfconn.rules.yml");
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [{rules:?}]\nscrape_configs:\n  \
             - job_name: selfconn\n    static_configs: [{{ targets: [\"{metrics}\"] }}]\n"
        );
        let config_path = dir.path().join("prometheus.yml");
        fs::write(&config_path, config)?;
        let mut serve = environment::other(&self.prometheus);
        serve.current_dir(dir.path()).arg("--config.file").arg(&config_path).args([
            &format!("--web.listen-address={api}"),
            "--storage.tsdb.path=data",
            "--log.level=warn",
        ]);
        let mut prometheus = Running::start(serve, dir.path())?;
        let mut holds = |expression: &str| {
            prometheus.until(expression, || Ok(!self.query(&api.to_string(), expression)?.is_empty()))
        };
        holds("up{job=\"selfconn\"} == 1")?;
        holds("selfconn_healthy == 1")?;
        holds("count(selfconn_connections_total) == 3")?;
        // What it is asked for by name, so that its cause is known.
        let mut repro = environment::plain(&selfconn);
        repro.args(["repro", "--mode", "bind"]);
        said(&mut repro)?;
        holds("selfconn_connections_total{cause=\"bound\"} >= 1")?;
        holds("ALERTS{alertname=\"SelfConnectionsMade\", alertstate=\"firing\"}")?;
        drop(daemon);
        holds("up{job=\"selfconn\"} == 0")?;
        Ok("up, counted, alerted, down".to_owned())
    }

    /// `promtool check metrics` has nothing to say.
    fn accepts(&self, text: &str) -> Result<()> {
        let mut check = self.promtool(&["check", "metrics"]);
        let mut child = check
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("promtool")?;
        child.stdin.take().context("a pipe was asked for")?.write_all(text.as_bytes())?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && said.trim().is_empty(),
            "promtool check metrics: {said}of\n{text}"
        );
        Ok(())
    }

    /// What an expression gives now; nothing while the server isn't there yet.
    fn query(&self, api: &str, expression: &str) -> Result<String> {
        let output = self
            .promtool(&["query", "instant", &format!("http://{api}"), expression])
            .output()
            .context("run promtool")?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

fn fetch(dir: &PathBuf) -> Result<()> {
    let mut download = environment::plain("apt-get");
    // As root apt would give the file to a user who may not write here.
    download.args(["--option", "APT::Sandbox::User=root", "download", "prometheus"]).current_dir(dir);
    must("fetching prometheus", download)
}

/// What a program said, if it succeeded.
fn said(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {name}"))?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{name}: {}: {text}", output.status);
    }
    Ok(text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned())
}
