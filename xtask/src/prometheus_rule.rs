//! `cargo xtask prometheus-rule`: writes the alert rules as an object of the Prometheus operator, for
//! packaging/kubernetes. The rules have one source: packaging/prometheus/selfconn.rules.yml.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::workspace::{Workspace, write_if_changed};

/// What precedes the groups.
const HEAD: &str = "\
# The alert rules. Written by `cargo xtask prometheus-rule` from packaging/prometheus/selfconn.rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: selfconn
  namespace: selfconn
  labels:
    app.kubernetes.io/name: selfconn
spec:
";

pub(crate) fn write(workspace: &Workspace) -> Result<()> {
    write_if_changed(&file(&workspace.root), manifest(&workspace.root)?.as_bytes())
}

fn file(root: &Path) -> PathBuf {
    root.join("packaging/kubernetes/prometheus-operator/prometheusrule.yaml")
}

fn manifest(root: &Path) -> Result<String> {
    let rules = root.join("packaging/prometheus/selfconn.rules.yml");
    let rules = fs::read_to_string(&rules).with_context(|| format!("read {}", rules.display()))?;
    let (_, groups) = rules.split_once("\ngroups:\n").context("the alert rules have no groups")?;
    Ok(format!("{HEAD}  groups:\n{}", indented(groups)))
}

/// The same lines, two columns to the right.
fn indented(lines: &str) -> String {
    let indent = |line: &str| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") };
    lines.lines().map(indent).collect()
}

#[test]
fn the_prometheus_rule_has_the_alert_rules_of_the_rules_file() {
    let root = Workspace::find().unwrap().root;
    let written = fs::read_to_string(file(&root)).unwrap();
    assert!(written == manifest(&root).unwrap(), "the rules have changed: run: cargo xtask prometheus-rule");
}

#[test]
fn only_lines_with_text_are_indented() {
    assert_eq!(indented("  - name: a\n\n    rules:\n"), "    - name: a\n\n      rules:\n");
}
