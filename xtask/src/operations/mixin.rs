//! Checks of the jsonnet mixin, and of the commands of docs/metrics.md that configure rules and dashboard. jsonnet
//! makes the files, and Prometheus reads them; what it has read is compared.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    background::{free_address, http_get},
    dashboard::Dashboard,
    document::Document,
    prometheus::{Prometheus, last_line},
};
use crate::{environment, packages, run, workspace::Workspace};

/// The selector of the shipped rules.
const SHIPPED_SELECTOR: &str = "job=~\"(.+/)?selfconn\"";

/// The runbook of the shipped rules.
const SHIPPED_RUNBOOK: &str = "docs/runbook.md";

/// The folder of the package that the commands of the documents name.
const INSTALLED: &str = "/usr/share/selfconn";

pub(super) struct Mixin {
    /// The directory of `jsonnet`, if it is not in PATH.
    bin: Option<PathBuf>,
}

impl Mixin {
    /// jsonnet in PATH, or that of the distribution's package.
    pub(super) fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        if environment::is_in_path("jsonnet") {
            return Ok(Self { bin: None });
        }
        let directory = workspace.target.join("operations/jsonnet");
        let bin = directory.join("usr/bin");
        if !bin.join("jsonnet").is_file() {
            packages::unpack(&["jsonnet"], &directory)?;
        }
        Ok(Self { bin: Some(bin) })
    }

    /// With its own configuration the mixin gives the shipped rules and the shipped dashboard.
    pub(super) fn is_what_is_shipped(
        &self,
        workspace: &Workspace,
        prometheus: &Prometheus,
    ) -> Result<String> {
        let dir = tempfile::tempdir().context("make a directory for the mixin")?;
        let mixin = "import \"mixin/mixin.libsonnet\"";
        let script = format!(
            "jsonnet -J {INSTALLED} -e '({mixin}).prometheusAlerts' >selfconn.rules.json\n\
             jsonnet -J {INSTALLED} -m . -e '({mixin}).grafanaDashboards'\n"
        );
        self.run_script(workspace, &script, dir.path())?;
        let rules = workspace.root.join("packaging/prometheus/selfconn.rules.yml");
        let [shipped, made] =
            alerts(prometheus, [&rules, &dir.path().join("selfconn.rules.json")], dir.path())?;
        ensure!(shipped == made, "the rules of the mixin differ: shipped {shipped:#?}, made {made:#?}");
        let dashboard = Dashboard::read(&dir.path().join("selfconn.json"))?;
        let is_same = dashboard == Dashboard::read(&workspace.root.join("packaging/grafana/selfconn.json"))?;
        ensure!(is_same, "the dashboard of the mixin differs from the shipped one");
        Ok(format!("{} alerts and a dashboard", shipped.len()))
    }

    /// The configuration and the commands of docs/metrics.md: every alert and every query has the selector, every alert
    /// has the address of the runbook, and every alert fires when it must.
    pub(super) fn takes_a_configuration(
        &self,
        workspace: &Workspace,
        prometheus: &Prometheus,
    ) -> Result<String> {
        let docs = Document::read(workspace, "metrics.md")?;
        let site = docs.block("jsonnet")?;
        let selector = quoted_after(site, "selfconnSelector: ").context("site.jsonnet has no selector")?;
        let runbook = quoted_after(site, "runbookUrl: ").context("site.jsonnet has no runbook")?;
        let commands = docs.block("sh")?;
        let dir = tempfile::tempdir().context("make a directory for the mixin")?;
        fs::write(dir.path().join("site.jsonnet"), site).context("write site.jsonnet")?;
        self.run_script(workspace, commands, dir.path())?;

        let (by_mixin, by_sed) =
            (dir.path().join("selfconn.rules.json"), dir.path().join("selfconn.rules.yml"));
        let [made, edited] = alerts(prometheus, [&by_mixin, &by_sed], dir.path())?;
        ensure!(made == edited, "sed makes other rules: mixin {made:#?}, sed {edited:#?}");
        for alert in &made {
            let name = alert["name"].as_str().context("an alert has no name")?;
            let query = alert["query"].as_str().context("an alert has no expression")?;
            ensure!(each_selector_has(query, selector), "{name} does not select {selector}: {query}");
            let address = format!("{runbook}#{}", name.to_ascii_lowercase());
            let found = &alert["annotations"]["runbook_url"];
            ensure!(*found == address, "the runbook of {name} is {found}, and not {address}");
        }
        let dashboard = Dashboard::read(&dir.path().join("selfconn.json"))?;
        let queries = [dashboard.of_panels(), dashboard.of_variables()].concat();
        for query in &queries {
            ensure!(each_selector_has(query, selector), "the dashboard does not select {selector}: {query}");
        }
        last_line(prometheus.promtool(&["check", "rules", "selfconn.rules.json"]).current_dir(dir.path()))?;
        fire(workspace, prometheus, selector, runbook, dir.path())?;
        Ok(format!("{} alerts fire with {selector}, {} queries have it", made.len(), queries.len()))
    }

    /// Runs a script in a directory. What it takes from the installed package is that of the repository.
    fn run_script(&self, workspace: &Workspace, script: &str, dir: &Path) -> Result<()> {
        let mut shell = environment::plain("sh");
        shell.args(["-e", "-c", &script.replace(INSTALLED, "\"$PACKAGING\"")]).current_dir(dir);
        shell.env("PACKAGING", workspace.root.join("packaging"));
        if let Some(bin) = &self.bin {
            shell.env("PATH", before_path(bin)?);
        }
        run::output(&mut shell).map(drop)
    }
}

fn before_path(bin: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = [bin.to_owned()].into_iter().chain(env::split_paths(&path));
    env::join_paths(directories).context("add a directory to PATH")
}

/// The alerts of two files of rules, as a Prometheus has read them.
fn alerts(prometheus: &Prometheus, files: [&Path; 2], dir: &Path) -> Result<[Vec<Value>; 2]> {
    let api = free_address()?;
    let mut server = prometheus.serve(&json!({ "rule_files": files }).to_string(), api, dir)?;
    let is_ready = || Ok(http_get(api, "/-/ready").is_ok_and(|(status, _)| status == "200"));
    server.wait_until("Prometheus is ready", is_ready)?;
    let (status, body) = http_get(api, "/api/v1/rules")?;
    ensure!(status == "200", "/api/v1/rules: {status}: {body}");
    let body: Value = serde_json::from_str(&body).context("parse /api/v1/rules")?;
    let groups = body["data"]["groups"].as_array().context("/api/v1/rules has no groups")?;
    let read = files.map(|file| {
        let of_file = groups.iter().filter(|group| group["file"].as_str().map(Path::new) == Some(file));
        let rules: Vec<_> =
            of_file.filter_map(|group| group["rules"].as_array()).flatten().map(definition).collect();
        rules
    });
    ensure!(read.iter().all(|rules| !rules.is_empty()), "Prometheus has read no rules: {body}");
    Ok(read)
}

/// What a file says of a rule, without what Prometheus adds when it evaluates the rule.
fn definition(rule: &Value) -> Value {
    let field = |name: &str| (name.to_owned(), rule[name].clone());
    ["type", "name", "query", "duration", "labels", "annotations"].into_iter().map(field).collect()
}

/// True if each selector of a PromQL expression has these matchers.
fn each_selector_has(query: &str, matchers: &str) -> bool {
    let selectors: Vec<_> = query.split('{').skip(1).filter_map(|rest| rest.split('}').next()).collect();
    !selectors.is_empty()
        && selectors.iter().all(|selector| selector.contains(matchers))
        && !query.contains(SHIPPED_SELECTOR)
}

/// Runs the tests of the rules against the rules of the mixin, with the job and the address that these have.
fn fire(
    workspace: &Workspace,
    prometheus: &Prometheus,
    selector: &str,
    runbook: &str,
    dir: &Path,
) -> Result<()> {
    let job = selector.strip_prefix("job=\"").and_then(|rest| rest.strip_suffix('"'));
    let job = job.with_context(|| format!("{selector} does not select one job"))?;
    let tests = workspace.root.join("packaging/prometheus/selfconn.rules.test.yml");
    let tests = fs::read_to_string(&tests).with_context(|| format!("read {}", tests.display()))?;
    let tests = tests
        .replace("monitoring/selfconn", job)
        .replace("job=\"selfconn\"", selector)
        .replace("job: selfconn,", &format!("job: {job},"))
        // absent() has the labels that the selector compares with one value.
        .replace(
            "exp_labels: { severity: warning }",
            &format!("exp_labels: {{ severity: warning, job: {job} }}"),
        )
        .replace(SHIPPED_RUNBOOK, runbook)
        .replace("- selfconn.rules.yml", "- selfconn.rules.json");
    fs::write(dir.join("tests.yml"), tests).context("write the tests")?;
    last_line(prometheus.promtool(&["test", "rules", "tests.yml"]).current_dir(dir)).map(drop)
}

/// The text in single quotes after `before`.
fn quoted_after<'a>(text: &'a str, before: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("{before}'"))?;
    Some(rest.split_once('\'')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_without_the_matchers_is_found() {
        let has = |query| each_selector_has(query, "job=\"a\"");
        assert!(has("up{job=\"a\"} offset 1h unless up{job=\"a\",x=\"y\"}"));
        assert!(!has("up{job=\"a\"} unless up{x=\"y\"}"));
        assert!(!has("up"));
        assert!(!has("up{job=\"a\",job=~\"(.+/)?selfconn\"}"));
    }

    #[test]
    fn a_setting_is_the_text_in_quotes_after_its_name() {
        assert_eq!(quoted_after("a: 'b=\"c\"', d: 'e'", "d: "), Some("e"));
        assert_eq!(quoted_after("a: 'b=\"c\"', d: 'e'", "a: "), Some("b=\"c\""));
    }
}
