//! `cargo xtask operations`: checks the files that are shipped for operators with the programs that read them: the unit
//! with systemd; alert rules, metrics and the dashboard's queries with Prometheus, which scrapes a daemon that sees a
//! self-connection; the mixin of rules and dashboard with jsonnet; the configurations for rsyslog and
//! systemd-journal-upload with these; the tables of stores with the stores; and the manifests with the schemas of
//! Kubernetes.

mod background;
mod dashboard;
mod document;
pub(crate) mod kubernetes;
mod mixin;
mod prometheus;
mod python;
mod remote_write;
mod shipping;
mod unit;

pub(crate) use background::http_get;

use std::{rc::Rc, time::Instant};

use anyhow::{Context as _, Result, bail};

use crate::{
    build_ebpf, environment, packages,
    run::{self, say, seconds_since},
    workspace::Workspace,
};

/// A check, and its name. It returns what it found.
type NamedCheck<'a> = (&'static str, Box<dyn Fn() -> Result<String> + 'a>);

pub(crate) struct Checks<'a> {
    pub(crate) all: Vec<NamedCheck<'a>>,
    /// What can't be checked on this machine, with the reason.
    pub(crate) skipped: Vec<String>,
}

/// `cargo xtask operations`: runs all checks, also after a failure.
pub(crate) fn operations(workspace: &Workspace) -> Result<()> {
    let mut failed = Vec::new();
    let Checks { all, skipped } = checks(workspace)?;
    skipped.iter().for_each(|what| say(format!("skipped: {what}")));
    for (name, check) in all {
        let start = Instant::now();
        match check().with_context(|| name.to_owned()) {
            Ok(found) => say(format!("{name}: passed, {}: {found}", seconds_since(start))),
            Err(error) => {
                say(format!("FAILED: {error:#}"));
                failed.push(name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}: their output is above", failed.join(", ")) }
}

/// Installs what the checks need, and builds the daemon.
pub(crate) fn checks(workspace: &Workspace) -> Result<Checks<'_>> {
    packages::must_be_root("the daemon needs root", "operations")?;
    packages::install_programs(&[("systemd-analyze", "systemd")])?;
    let tools = Rc::new(prometheus::Prometheus::find_or_fetch(workspace)?);
    let shipping = Rc::new(shipping::Shipping::find_or_fetch(workspace)?);
    let validator = kubernetes::Validator::find_or_install(workspace)?;
    let engine = shipping::ClickHouse::find_or_install(workspace)?;
    let mixin = Rc::new(mixin::Mixin::find_or_fetch(workspace)?);
    let store = remote_write::VictoriaMetrics::find_or_fetch(workspace)?;
    build_ebpf::build(workspace)?;
    let mut cargo = environment::cargo();
    cargo.args(["build", "--quiet", "--package", "selfconn-user"]).current_dir(&workspace.root);
    run::step("building the daemon", &mut cargo)?;

    let (rules, tests, scrape) = (Rc::clone(&tools), Rc::clone(&tools), Rc::clone(&tools));
    let (shipped, configured) = ((Rc::clone(&mixin), Rc::clone(&tools)), (mixin, Rc::clone(&tools)));
    let (postgresql, kafka, journal) = (Rc::clone(&shipping), Rc::clone(&shipping), shipping);
    let all: Vec<NamedCheck<'_>> = vec![
        ("systemd understands the unit", Box::new(|| unit::is_understood(workspace))),
        ("the unit exposes little", Box::new(|| unit::exposes_little(workspace))),
        ("each drop-in is enough", Box::new(|| unit::drop_ins_are_enough(workspace))),
        ("Kubernetes takes the manifests", Box::new(move || validator.takes_the_manifests(workspace))),
        ("the alert rules are valid", Box::new(move || rules.rules_are_valid(workspace))),
        ("each alert fires when it must, and only then", Box::new(move || tests.rules_fire(workspace))),
        (
            "the mixin is what is shipped",
            Box::new(move || shipped.0.is_what_is_shipped(workspace, &shipped.1)),
        ),
        (
            "the mixin takes a configuration",
            Box::new(move || configured.0.takes_a_configuration(workspace, &configured.1)),
        ),
        ("Prometheus sees a self-connection", Box::new(move || scrape.sees_a_self_connection(workspace))),
        (
            "VictoriaMetrics gets what Prometheus scrapes",
            Box::new(move || store.gets_everything(&tools, workspace)),
        ),
        ("rsyslog ships each event to PostgreSQL", Box::new(move || postgresql.to_postgresql(workspace))),
        ("ClickHouse keeps each event once", Box::new(move || engine.keeps_each_event_once(workspace))),
        ("rsyslog ships each event to Kafka", Box::new(move || kafka.to_kafka(workspace))),
        (
            "journal-upload ships each event to another journal",
            Box::new(move || journal.to_a_journal(workspace)),
        ),
    ];
    Ok(Checks { all, skipped: kubernetes::skipped().into_iter().collect() })
}
