//! The fixes for ports at risk: as a command to run, as a sysctl.d file, or as a part of a pod specification.

use std::{borrow::Cow, fmt::Write as _};

use super::{
    assess::{PortAssessment, Risk},
    collect::{NamespaceInfo, Persistence},
};
use crate::{event::text::escape, ports::sysctl::RESERVED_KEY};

/// The file name sorts behind the files of a distribution, because the last file that sets a value wins.
const SYSCTL_D_FILE: &str = "/etc/sysctl.d/90-selfconn.conf";

/// How to remove all risks of one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fix {
    /// A command whose effect lasts as long as the namespace.
    pub(super) immediate: String,
    /// A permanent setting. `None`: unknown, because the program that creates this namespace must set it.
    pub(super) persistent: Option<String>,
}

/// The fix for all ports at risk together. A write replaces the whole list of reserved ports, so separate
/// fixes for each port would undo each other. `None`: no port is at risk.
pub(super) fn fix(info: &NamespaceInfo, rows: &[PortAssessment]) -> Option<Fix> {
    let at_risk: Vec<_> = rows.iter().filter(|row| row.risk != Risk::None).map(|row| row.port).collect();
    if at_risk.is_empty() {
        return None;
    }
    let value = info.local_ports.reserved.with(at_risk);
    let command = format!("sysctl -w {RESERVED_KEY}={value}");
    let namespace = &info.namespace;
    let path = shell_quoted(&namespace.path.display().to_string()).into_owned();
    let immediate = if namespace.is_current { command } else { format!("nsenter --net={path} {command}") };
    let persistent = match info.persistence {
        Some(Persistence::SysctlD) => {
            let netns = if namespace.is_current { "self" } else { &path };
            Some(format!("selfconn audit --netns {netns} --sysctl > {SYSCTL_D_FILE}"))
        }
        Some(Persistence::Pod) => {
            Some(format!("securityContext: {{sysctls: [{{name: {RESERVED_KEY}, value: \"{value}\"}}]}}"))
        }
        None => None,
    };
    Some(Fix { immediate, persistent })
}

/// A sysctl.d file that reserves the ports already reserved and the ports at risk.
pub(super) fn sysctl_d(info: &NamespaceInfo, rows: &[PortAssessment]) -> String {
    let mut out = String::from(
        "# Made by `selfconn audit --sysctl`: ports that the kernel must not choose as source ports,\n",
    );
    out.push_str("# because a client that connects to one while its server is down can connect to itself.\n");
    let range = info.local_ports.range;
    let _ = writeln!(out, "# Network namespace {}, source ports {range}.", info.namespace.id.inode);
    if !info.local_ports.reserved.is_empty() {
        let _ = writeln!(out, "# Reserved before: {}", info.local_ports.reserved);
    }
    let at_risk = || rows.iter().filter(|row| row.risk != Risk::None);
    for row in at_risk() {
        let (endpoint, listener) = (row.endpoint_text(), row.listener_text());
        let listener = if listener.is_empty() { String::new() } else { format!(", {listener}") };
        let _ =
            writeln!(out, "# Added, {} risk: {}", row.risk.name(), escape(&format!("{endpoint}{listener}")));
    }
    let value = info.local_ports.reserved.with(at_risk().map(|row| row.port));
    // Without a setting, because some sysctl programs reject an empty value.
    let _ = match value.is_empty() {
        true => writeln!(out, "# No port is at risk, and no port is reserved."),
        false => writeln!(out, "{RESERVED_KEY} = {value}"),
    };
    out
}

/// Quotes a word for the shell where needed.
fn shell_quoted(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-@:+,%".contains(c);
    match word.chars().all(is_plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        commands::audit::{
            assess::{
                assess,
                tests::{audited, java, namespace},
            },
            collect::RouteSource,
        },
        ports::LocalPorts,
    };

    #[test]
    fn a_path_is_quoted_as_one_shell_word() {
        for (path, word) in [
            ("/run/netns/blue", "/run/netns/blue"),
            ("/proc/12/ns/net", "/proc/12/ns/net"),
            ("/run/netns/cni-1b2c", "/run/netns/cni-1b2c"),
            ("/run/netns/a b", "'/run/netns/a b'"),
            ("/run/netns/$(reboot)", "'/run/netns/$(reboot)'"),
            ("/run/netns/it's", r"'/run/netns/it'\''s'"),
        ] {
            assert_eq!(shell_quoted(path), word);
        }
    }

    #[test]
    fn the_fix_keeps_reserved_ports_and_adds_all_ports_at_risk() {
        let mut info = namespace(
            "40000 40199",
            "8080,40104",
            vec![
                audited(Some("127.0.0.1"), 40_102, RouteSource::Same, java()),
                audited(Some("127.0.0.1"), 40_103, RouteSource::Same, java()),
                audited(Some("127.0.0.1"), 22, RouteSource::Same, java()),
            ],
        );
        let set = "sysctl -w net.ipv4.ip_local_reserved_ports=8080,40102-40104";
        let rows = assess(&info);
        let made = |info: &NamespaceInfo| fix(info, &rows).unwrap();
        assert_eq!(made(&info).immediate, format!("nsenter --net=/run/netns/blue {set}"));
        assert_eq!(made(&info).persistent, None);
        let safe =
            namespace("40000 40199", "", vec![audited(Some("127.0.0.1"), 22, RouteSource::Same, java())]);
        assert_eq!(fix(&safe, &assess(&safe)), None);
        info.persistence = Some(Persistence::Pod);
        assert_eq!(
            made(&info).persistent.unwrap(),
            "securityContext: {sysctls: [{name: net.ipv4.ip_local_reserved_ports, value: \"8080,40102-40104\"}]}"
        );
        info.persistence = Some(Persistence::SysctlD);
        info.namespace.is_current = true;
        assert_eq!(made(&info).immediate, set);
        assert!(
            made(&info)
                .persistent
                .unwrap()
                .starts_with("selfconn audit --netns self --sysctl > /etc/sysctl.d/")
        );
    }

    #[test]
    fn a_process_name_cannot_add_a_line_to_the_sysctl_d_file() {
        let mut hostile = java();
        hostile.as_mut().unwrap().comm = Some("x\nkernel.panic = 1".to_owned());
        let namespace = |audited_ports| namespace("40000 40199", "8080", audited_ports);
        let at_risk = namespace(vec![audited(Some("127.0.0.1"), 40_102, RouteSource::Same, hostile)]);
        let text = sysctl_d(&at_risk, &assess(&at_risk));
        let settings: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(settings, ["net.ipv4.ip_local_reserved_ports = 8080,40102"], "{text}");
        assert!(text.contains("# Added, high risk: 127.0.0.1:40102, x\\nkernel.panic = 1[812]"), "{text}");
        let without_risk = namespace(vec![]);
        assert!(sysctl_d(&without_risk, &[]).ends_with("\nnet.ipv4.ip_local_reserved_ports = 8080\n"));
        let without_reserved =
            NamespaceInfo { local_ports: LocalPorts::parse("40000 40199", "").unwrap(), ..without_risk };
        assert!(sysctl_d(&without_reserved, &[]).lines().all(|line| line.starts_with('#')));
    }
}
