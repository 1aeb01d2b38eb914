//! The cures, as text to run, to write into a file or into a pod's description.

use std::{borrow::Cow, fmt::Write as _};

use super::{
    grade::{Risk, Row},
    look::Seen,
};
use crate::sink::text::escape;

/// What keeps the kernel from choosing a port, in each network namespace for itself.
pub(super) const RESERVED: &str = "net.ipv4.ip_local_reserved_ports";

/// Behind the files that a distribution brings; the last name decides.
const DROP_IN: &str = "/etc/sysctl.d/90-selfconn.conf";

/// How to be rid of the risks in one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fix {
    /// Until the namespace ends.
    pub(super) now: String,
    /// For good; `None`: whoever makes this namespace has to do it.
    pub(super) lasting: Option<String>,
}

/// All ports at risk are reserved at once: the list is set as a whole, so a fix for each alone would undo the others'.
pub(super) fn fix(seen: &Seen, rows: &[Row]) -> Option<Fix> {
    let at_risk: Vec<_> = rows.iter().filter(|row| row.risk != Risk::None).map(|row| row.port).collect();
    if at_risk.is_empty() {
        return None;
    }
    let value = seen.ports.reserved.with(at_risk);
    let set = format!("sysctl -w {RESERVED}={value}");
    let namespace = &seen.namespace;
    let path = quoted(&namespace.path.display().to_string()).into_owned();
    let now = if namespace.is_own { set } else { format!("nsenter --net={path} {set}") };
    let lasting = match seen.lasts {
        Some(Lasts::SysctlD) => {
            let of = if namespace.is_own { "self" } else { &path };
            Some(format!("selfconn audit --netns {of} --sysctl > {DROP_IN}"))
        }
        Some(Lasts::Pod) => {
            Some(format!("securityContext: {{sysctls: [{{name: {RESERVED}, value: \"{value}\"}}]}}"))
        }
        None => None,
    };
    Some(Fix { now, lasting })
}

/// Where a setting of a namespace comes from when it is made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lasts {
    /// The host's: from the files of sysctl.d.
    SysctlD,
    /// A pod's: from the pod's description.
    Pod,
}

/// A file for sysctl.d: what is reserved, and what is at risk.
pub(super) fn sysctl_d(seen: &Seen, rows: &[Row]) -> String {
    let mut out =
        String::from("# Made by `selfconn audit --sysctl`: ports that no client may get as its source,\n");
    out.push_str("# for one that is dialled while its server is down would then be connected to itself.\n");
    let range = seen.ports.range;
    let _ = writeln!(out, "# Network namespace {}, source ports {range}.", seen.namespace.inode);
    if !seen.ports.reserved.is_empty() {
        let _ = writeln!(out, "# Reserved before: {}", seen.ports.reserved);
    }
    let at_risk = || rows.iter().filter(|row| row.risk != Risk::None);
    for row in at_risk() {
        let (end, who) = (row.end(), row.who());
        let who = if who.is_empty() { String::new() } else { format!(", {who}") };
        let _ = writeln!(out, "# Added, {} risk: {}", row.risk.name(), escape(&format!("{end}{who}")));
    }
    let value = seen.ports.reserved.with(at_risk().map(|row| row.port));
    // An empty value would be one that some sysctl programs refuse.
    let _ = match value.is_empty() {
        true => writeln!(out, "# Nothing is at risk, and nothing is reserved."),
        false => writeln!(out, "{RESERVED} = {value}"),
    };
    out
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-@:+,%".contains(c);
    match word.chars().all(is_plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_the_shell() {
        for (path, word) in [
            ("/run/netns/blue", "/run/netns/blue"),
            ("/proc/12/ns/net", "/proc/12/ns/net"),
            ("/run/netns/cni-1b2c", "/run/netns/cni-1b2c"),
            ("/run/netns/a b", "'/run/netns/a b'"),
            ("/run/netns/$(reboot)", "'/run/netns/$(reboot)'"),
            ("/run/netns/it's", r"'/run/netns/it'\''s'"),
        ] {
            assert_eq!(quoted(path), word);
        }
    }
}
