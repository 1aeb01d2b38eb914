//! As which user the command runs: under sudo as the one who called it, because only the watch needs root.

use std::{env, process::Command};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Gid, Uid};

/// A user, and his groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    pub(super) groups: Vec<Gid>,
}

/// The user who runs the command: the one who is named; else the one who called sudo. `None`: the user of this process.
///
/// # Errors
/// If there is no such user.
pub(super) fn command_user(named: Option<&str>) -> Result<Option<User>> {
    if let Some(name) = named {
        return lookup(name).with_context(|| format!("--user {name}")).map(Some);
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let variable = |name| env::var(name).ok();
    match (variable("SUDO_UID").and_then(|uid| uid.parse::<u32>().ok()), variable("SUDO_USER")) {
        (None | Some(0), _) => Ok(None),
        (Some(uid), name) => {
            let name = name.unwrap_or_else(|| uid.to_string());
            lookup(&name).with_context(|| format!("the user {name} who called sudo")).map(Some)
        }
    }
}

/// Asks `id`, which knows every source of users that this host has.
fn lookup(name: &str) -> Result<User> {
    let ask = |option: &str| -> Result<Vec<u32>> {
        let output = Command::new("id").args([option, "--", name]).output().context("cannot run id")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("id: "));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_whitespace().map(|id| id.parse().with_context(|| format!("id printed {id}"))).collect()
    };
    let first = |ids: Vec<u32>| ids.first().copied().context("id printed nothing");
    Ok(User {
        uid: Uid::from_raw(first(ask("-u")?)?),
        gid: Gid::from_raw(first(ask("-g")?)?),
        groups: ask("-G")?.into_iter().map(Gid::from_raw).collect(),
    })
}
