//! The version of the release, and the time of its commit, which is the time of every file in it.

use std::{env, fs};

use anyhow::{Context as _, Result};

use crate::{
    architecture::Architecture,
    environment::plain,
    run::{self, say},
    workspace::Workspace,
};

/// A release.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) version: String,
    /// The commit, or `unknown`.
    pub(crate) revision: String,
    /// Seconds since 1970: `SOURCE_DATE_EPOCH` if it is set, else the time of the commit.
    pub(crate) epoch: u64,
    pub(crate) architecture: &'static Architecture,
}

impl Release {
    /// The release of the checked-out sources for this architecture. Warns if they differ from the commit.
    pub(super) fn current(workspace: &Workspace, architecture: &'static Architecture) -> Result<Self> {
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
            (..) => of_archive(workspace, 1)
                .context("neither a clone nor an archive made by git: set SOURCE_DATE_EPOCH")?,
        };
        let revision = git(&["rev-parse", "HEAD"]).ok().or_else(|| of_archive(workspace, 0));
        let revision = revision.map_or_else(|| "unknown".to_owned(), |revision| revision.trim().to_owned());
        let epoch = epoch.trim().parse().context("SOURCE_DATE_EPOCH is not a number of seconds")?;
        Ok(Self { version: env!("CARGO_PKG_VERSION").to_owned(), revision, epoch, architecture })
    }

    /// Its time in this format of `date`, in UTC.
    pub(super) fn date(&self, format: &str) -> Result<String> {
        let date = run::output(plain("date").args(["--utc", &format!("--date=@{}", self.epoch), format]))?;
        Ok(date.trim().to_owned())
    }
}

/// A word of `.commit`, into which git writes the commit and its time when it makes an archive of the sources
/// (`.gitattributes`).
fn of_archive(workspace: &Workspace, word: usize) -> Option<String> {
    let commit = fs::read_to_string(workspace.root.join(".commit")).ok()?;
    // Outside of an archive the file has only placeholders.
    let words: Vec<_> = commit.split_whitespace().collect();
    words.get(1)?.parse::<u64>().ok()?;
    words.get(word).map(|word| (*word).to_owned())
}
