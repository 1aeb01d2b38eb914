//! The version of the release, and the time of its commit, which is the time of every file in it.

use std::{env, fs};

use anyhow::{Context as _, Result};

use crate::{
    environment::plain,
    run::{self, say},
    workspace::Workspace,
};

/// A release.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) version: String,
    /// Seconds since 1970: `SOURCE_DATE_EPOCH` if it is set, else the time of the commit.
    pub(super) epoch: u64,
    pub(super) architecture: Architecture,
}

/// An architecture, by its names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Architecture {
    pub(super) rust: &'static str,
    pub(super) debian: &'static str,
}

const ARCHITECTURES: [Architecture; 2] =
    [Architecture { rust: "x86_64", debian: "amd64" }, Architecture { rust: "aarch64", debian: "arm64" }];

impl Release {
    /// The release of the checked-out sources. Warns if they differ from the commit.
    pub(super) fn current(workspace: &Workspace) -> Result<Self> {
        let git =
            |arguments: &[&str]| run::output(plain("git").arg("-C").arg(&workspace.root).args(arguments));
        let epoch = match (env::var("SOURCE_DATE_EPOCH"), git(&["log", "-1", "--format=%ct"])) {
            (Ok(epoch), _) => epoch,
            (_, Ok(time)) => {
                if git(&["status", "--porcelain"])?.lines().next().is_some() {
                    say("the work tree differs from its commit: the result is not a release");
                }
                time
            }
            (..) => time_of_archive(workspace)?,
        };
        let epoch = epoch.trim().parse().context("SOURCE_DATE_EPOCH is not a number of seconds")?;
        let architecture = ARCHITECTURES.into_iter().find(|one| one.rust == env::consts::ARCH);
        let architecture = architecture.with_context(|| format!("no packages for {}", env::consts::ARCH))?;
        Ok(Self { version: env!("CARGO_PKG_VERSION").to_owned(), epoch, architecture })
    }

    /// Its time in this format of `date`, in UTC.
    pub(super) fn date(&self, format: &str) -> Result<String> {
        let date = run::output(plain("date").args(["--utc", &format!("--date=@{}", self.epoch), format]))?;
        Ok(date.trim().to_owned())
    }
}

/// git writes commit and time into `.commit` of an archive of the sources (`.gitattributes`).
fn time_of_archive(workspace: &Workspace) -> Result<String> {
    let commit = fs::read_to_string(workspace.root.join(".commit")).unwrap_or_default();
    let time = commit.split_whitespace().nth(1).filter(|word| word.parse::<u64>().is_ok());
    time.map(str::to_owned).context("neither a clone nor an archive made by git: set SOURCE_DATE_EPOCH")
}
