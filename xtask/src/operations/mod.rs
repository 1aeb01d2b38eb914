//! `cargo xtask operations`: what is shipped for those who run the daemon, checked by the programs that will read it:
//! the unit by systemd, rules and metrics by Prometheus, which scrapes a daemon that meets a self-connection.

mod prometheus;
mod running;
mod unit;

use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::{
    environment, packages,
    progress::{must, say, seconds},
    workspace::Workspace,
};

/// `cargo xtask operations`.
pub(crate) fn operations(workspace: &Workspace) -> Result<()> {
    let Outcome { passed, failed } = check(workspace)?;
    println!("xtask: {passed} passed, {} failed, 0 skipped", failed.len());
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}: what was said is above", failed.join(", ")) }
}

/// What came of the checks.
pub(crate) struct Outcome {
    pub(crate) passed: u32,
    /// Their names.
    pub(crate) failed: Vec<&'static str>,
}

/// Checks all; a failure keeps none of the others from being looked at.
pub(crate) fn check(workspace: &Workspace) -> Result<Outcome> {
    if !packages::may_install() {
        bail!("the daemon needs root: run: sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask operations");
    }
    if !environment::is_in_path("systemd-analyze") {
        packages::install(&["systemd".to_owned()])?;
    }
    let tools = prometheus::Tools::get(workspace)?;
    let mut cargo = environment::cargo();
    cargo.args(["build", "--package", "selfconn-user"]).current_dir(&workspace.root);
    crate::build_ebpf::build(workspace)?;
    must("building the daemon", cargo)?;

    type Check<'a> = (&'static str, &'a dyn Fn() -> Result<String>);
    let checks: [Check<'_>; 5] = [
        ("the unit is understood", &|| unit::is_understood(workspace)),
        ("the unit exposes little", &|| unit::exposes_little(workspace)),
        ("the rules are valid", &|| tools.rules_are_valid(workspace)),
        ("each alert fires when it must, and only then", &|| tools.rules_fire(workspace)),
        ("Prometheus sees a self-connection", &|| tools.sees_a_self_connection(workspace)),
    ];
    let mut outcome = Outcome { passed: 0, failed: Vec::new() };
    for (name, check) in checks {
        let began = Instant::now();
        match check().with_context(|| name.to_owned()) {
            Ok(found) => {
                say(format!("{name}: passed, {}: {found}", seconds(began.elapsed())));
                outcome.passed += 1;
            }
            Err(error) => {
                say(format!("FAILED: {error:#}"));
                outcome.failed.push(name);
            }
        }
    }
    Ok(outcome)
}
