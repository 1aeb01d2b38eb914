//! What is released: a version, and the commit whose time stands in everything that has a time.

use std::{env, fs};

use anyhow::{Context as _, Result};

use super::tool;
use crate::{environment::plain, progress::say, workspace::Workspace};

/// A release.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) version: String,
    /// Seconds since 1970: `SOURCE_DATE_EPOCH` if set, else when the commit was made.
    pub(super) epoch: u64,
    pub(super) architecture: Architecture,
}

/// The one that is built for, by everybody's name of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Architecture {
    pub(super) rust: &'static str,
    pub(super) debian: &'static str,
}

const ARCHITECTURES: [Architecture; 2] =
    [Architecture { rust: "x86_64", debian: "amd64" }, Architecture { rust: "aarch64", debian: "arm64" }];

impl Release {
    /// The one at hand. Says so if it is more than a commit.
    pub(super) fn of(workspace: &Workspace) -> Result<Self> {
        let git = |arguments: &[&str]| {
            let mut git = plain("git");
            git.arg("-C").arg(&workspace.root).args(arguments);
            tool::run(git)
        };
        let epoch = match env::var("SOURCE_DATE_EPOCH") {
            Ok(set) => set,
            Err(_) => match git(&["log", "-1", "--format=%ct"]) {
                Ok(time) => {
                    if git(&["status", "--porcelain"])?.lines().next().is_some() {
                        say("the work tree differs from its commit: what is made of it is no release");
                    }
                    time
                }
                Err(_) => archived(workspace)?,
            },
        };
        let epoch = epoch.trim().parse().context("SOURCE_DATE_EPOCH is not a number of seconds")?;
        let architecture = ARCHITECTURES.into_iter().find(|one| one.rust == env::consts::ARCH);
        let architecture = architecture.with_context(|| format!("no packages for {}", env::consts::ARCH))?;
        Ok(Self { version: env!("CARGO_PKG_VERSION").to_owned(), epoch, architecture })
    }

    /// The time by `date`, in UTC.
    pub(super) fn date(&self, format: &str) -> Result<String> {
        let mut date = plain("date");
        date.args(["--utc", &format!("--date=@{}", self.epoch), format]);
        Ok(tool::run(date)?.trim().to_owned())
    }
}

/// An archive of the sources made by git notes commit and time (`.gitattributes`).
fn archived(workspace: &Workspace) -> Result<String> {
    let noted = fs::read_to_string(workspace.root.join(".commit")).unwrap_or_default();
    let time = noted.split_whitespace().nth(1).filter(|word| word.parse::<u64>().is_ok());
    time.map(str::to_owned).context("neither a clone nor an archive made by git: set SOURCE_DATE_EPOCH")
}
