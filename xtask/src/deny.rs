//! `cargo xtask deny`: what may come into the tree (`deny.toml`), asked of cargo-deny.

use std::path::Path;

use anyhow::{Result, bail};

use crate::{
    environment::{cargo, plain},
    progress::{self, say},
    workspace::{Workspace, here},
};

/// Built once, from the registry, into `tools/` of the target directory. Pinned: a newer one may deny more, and that
/// should be a change of ours.
const VERSION: &str = "0.20.2";

/// Licences, bans and sources always; advisories where their database can be had.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let tools = workspace.target.join("tools");
    let program = tools.join("bin/cargo-deny");
    if !is_there(&program) {
        let mut install = cargo();
        install.args(["install", "--locked", "--no-default-features", "--version", VERSION, "--root"]);
        install.arg(&tools).arg("cargo-deny").current_dir(&workspace.root);
        progress::must(&format!("building {}", here(&program)), install)?;
    }
    let deny = |arguments: &[&str]| {
        let mut deny = plain(&program);
        deny.args(arguments).current_dir(&workspace.root);
        // It asks cargo, and that has to be the one which builds us.
        deny.env("CARGO", cargo().get_program());
        deny
    };
    progress::must("checking licenses, bans and sources", deny(&["check", "licenses", "bans", "sources"]))?;
    let fetched = progress::run("fetching the database of advisories", deny(&["fetch", "db"]), None)?;
    if !fetched.succeeded() {
        let why =
            fetched.output.lines().rfind(|line| line.contains("fatal: ")).unwrap_or_default().to_owned();
        let why = if why.is_empty() { fetched.why() } else { why };
        say(format!("licenses, bans and sources are fine; advisories were not checked: {why}"));
        return Ok(());
    }
    let checked = progress::run("checking advisories", deny(&["check", "advisories"]), None)?;
    if !checked.succeeded() {
        eprint!("{}", checked.output);
        bail!("a crate has an advisory, or was yanked: what cargo-deny said is above");
    }
    say("licenses, bans, sources and advisories are fine");
    Ok(())
}

fn is_there(program: &Path) -> bool {
    let version = plain(program).arg("--version").output();
    version.is_ok_and(|version| version.stdout.trim_ascii_end() == format!("cargo-deny {VERSION}").as_bytes())
}
