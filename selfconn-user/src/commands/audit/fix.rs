//! The fixes for ports at risk: as a command to run, as a sysctl.d file, or as a part of a pod specification.

use std::{borrow::Cow, fmt::Write as _};

use super::{
    assess::{PortAssessment, Risk},
    collect::{NamespaceInfo, Persistence},
    groups::group,
    reservation::{self, Reservation},
};
use crate::{
    event::text::{escape, group_thousands},
    ports::{ReservedPorts, sysctl::RESERVED_KEY},
    sockets::Namespace,
};

/// The file name sorts behind the files of a distribution, because the last file that sets a value wins.
const SYSCTL_D_FILE: &str = "/etc/sysctl.d/90-selfconn.conf";
/// The file of [`RESERVED_KEY`].
const RESERVED_FILE: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// How to remove all risks of one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fix {
    /// A command whose effect lasts as long as the namespace.
    pub(super) immediate: String,
    /// A permanent setting. `None`: unknown, because the program that creates this namespace must set it.
    pub(super) persistent: Option<String>,
    /// What `persistent` leaves out, and what to do about it.
    pub(super) note: Option<String>,
}

/// The fix for all ports at risk together. A write replaces the whole list of reserved ports, so separate
/// fixes for each port would undo each other. `options` name the ports in a command that runs `audit`
/// again. `None`: no port is at risk.
pub(super) fn fix(info: &NamespaceInfo, rows: &[PortAssessment], options: &str) -> Option<Fix> {
    if rows.iter().all(|row| row.risk == Risk::None) {
        return None;
    }
    let reservation = Reservation::new(&info.local_ports.reserved, rows);
    let persistent = match info.persistence {
        Some(Persistence::SysctlD) => {
            // It is the namespace of process 1. Another process may end before the command is run.
            let netns = if info.namespace.is_current { "self" } else { "/proc/1/ns/net" };
            Some(format!("selfconn audit --netns {netns}{options} --sysctl > {SYSCTL_D_FILE}"))
        }
        Some(Persistence::Pod) => Some(format!(
            "securityContext: {{sysctls: [{{name: {RESERVED_KEY}, value: \"{}\"}}]}}",
            reservation.fitting
        )),
        None => None,
    };
    let setting = match info.persistence {
        Some(Persistence::Pod) => "a pod's specification",
        _ => "a file of sysctl.d",
    };
    let note = (!reservation.fits_one_write()).then(|| {
        format!("{}, so {setting} leaves them out: run the command again {}", left_out(&reservation), {
            match info.persistence {
                Some(Persistence::SysctlD) => "after each boot",
                _ => "in each new namespace",
            }
        })
    });
    Some(Fix { immediate: command(&reservation.all, &info.namespace), persistent, note })
}

/// The command that reserves exactly these ports. What one write does not take, dd writes next, on the same
/// descriptor, and the kernel adds it. sysctl(8) writes once.
fn command(ports: &ReservedPorts, namespace: &Namespace) -> String {
    let list = ports.to_string();
    match list.len() <= reservation::WRITE_BYTES {
        true => run_in(namespace, &format!("sysctl -w {RESERVED_KEY}={list}")),
        false => {
            let dd = format!("dd of={RESERVED_FILE} bs=1M iflag=fullblock status=none");
            format!("echo {list} | {}", run_in(namespace, &dd))
        }
    }
}

/// The command, to be run in this namespace. Until then the process that leads to the namespace may have ended, and
/// another user may have a process with its pid, in the namespace of the host. So the shell that has entered a
/// namespace compares the inode before it writes. Nobody can exchange the namespace after that.
fn run_in(Namespace { id, path, is_current }: &Namespace, command: &str) -> String {
    if *is_current {
        return command.to_owned();
    }
    let (path, inode) = (path.display().to_string(), id.inode);
    format!(
        "nsenter --net={} sh -c '[ $(stat -Lc %i /proc/self/ns/net) = {inode} ] || {{ echo The path does not lead to \
         network namespace {inode} any more, so nothing is written. >&2; exit 1; }}; {command}'",
        shell_quoted(&path)
    )
}

/// How many ports one write leaves out.
pub(super) fn left_out(reservation: &Reservation) -> String {
    let count = |ports: &ReservedPorts| group_thousands(ports.ports().count() as u64);
    let (left_out, all) = (count(&reservation.left_out), count(&reservation.all));
    format!(
        "{left_out} of {all} ports do not fit in one write of {} bytes",
        group_thousands(reservation::WRITE_BYTES as u64)
    )
}

/// A sysctl.d file that reserves the ports already reserved and the ports at risk, as far as one write takes
/// them, and says how to set the others.
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
    let reservation = Reservation::new(&info.local_ports.reserved, rows);
    for group in group(rows).iter().filter(|group| group.first.risk != Risk::None) {
        let listener = group.first.listener_text();
        let listener = if listener.is_empty() { String::new() } else { format!(", {listener}") };
        let text = escape(&format!("{}{listener}", group.endpoint_text()));
        let _ = writeln!(out, "# Added, {} risk: {text}", group.first.risk.name());
    }
    if !reservation.fits_one_write() {
        let _ = writeln!(out, "# Not set below, because {}:", left_out(&reservation));
        let _ = writeln!(out, "# {}", reservation.left_out);
        let _ = writeln!(out, "# This sets all ports. Run it as root after each boot:");
        let _ = writeln!(out, "# {}", command(&reservation.all, &info.namespace));
    }
    // Without a setting, because some sysctl programs reject an empty value.
    let _ = match reservation.fitting.is_empty() {
        true => writeln!(out, "# No port is at risk, and no port is reserved."),
        false => writeln!(out, "{RESERVED_KEY} = {}", reservation.fitting),
    };
    out
}

/// Quotes a word for the shell where needed.
pub(super) fn shell_quoted(word: &str) -> Cow<'_, str> {
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
        let made = |info: &NamespaceInfo| fix(info, &rows, "").unwrap();
        let check = "[ $(stat -Lc %i /proc/self/ns/net) = 7 ] || { echo The path does not lead to network namespace 7 \
                     any more, so nothing is written. >&2; exit 1; }";
        assert_eq!(made(&info).immediate, format!("nsenter --net=/run/netns/blue sh -c '{check}; {set}'"));
        assert_eq!(made(&info).persistent, None);
        let safe =
            namespace("40000 40199", "", vec![audited(Some("127.0.0.1"), 22, RouteSource::Same, java())]);
        assert_eq!(fix(&safe, &assess(&safe), ""), None);
        info.persistence = Some(Persistence::Pod);
        assert_eq!(
            made(&info).persistent.unwrap(),
            "securityContext: {sysctls: [{name: net.ipv4.ip_local_reserved_ports, value: \"8080,40102-40104\"}]}"
        );
        info.persistence = Some(Persistence::SysctlD);
        let persistent = made(&info).persistent.unwrap();
        assert!(persistent.starts_with("selfconn audit --netns /proc/1/ns/net --sysctl >"), "{persistent}");
        info.namespace.is_current = true;
        assert_eq!(made(&info).immediate, set);
        assert!(
            made(&info)
                .persistent
                .unwrap()
                .starts_with("selfconn audit --netns self --sysctl > /etc/sysctl.d/")
        );
        let persistent = fix(&info, &rows, " --port 40102").unwrap().persistent.unwrap();
        assert!(
            persistent.starts_with("selfconn audit --netns self --port 40102 --sysctl >"),
            "{persistent}"
        );
    }

    #[test]
    fn a_list_that_one_write_does_not_take_is_written_by_dd_and_the_rest_is_named() {
        let ports = (30_000..).step_by(4).take(1_000);
        let mut info = namespace(
            "30000 60999",
            "",
            ports.map(|port| audited(None, port, RouteSource::Same, None)).collect(),
        );
        let rows = assess(&info);
        let long = |info: &NamespaceInfo| fix(info, &rows, "").unwrap();
        let Fix { immediate, persistent, note } = long(&info);
        assert!(immediate.starts_with("echo 30000,30004,"), "{immediate}");
        assert!(immediate.contains(",33996 | nsenter --net=/run/netns/blue sh -c '[ "), "{immediate}");
        let end = "; dd of=/proc/sys/net/ipv4/ip_local_reserved_ports bs=1M iflag=fullblock status=none'";
        assert!(immediate.ends_with(end), "{immediate}");
        assert_eq!(persistent, None);
        let not_fitting = "318 of 1,000 ports do not fit in one write of 4,092 bytes";
        assert!(note.as_ref().unwrap().starts_with(not_fitting), "{note:?}");
        info.persistence = Some(Persistence::Pod);
        assert!(long(&info).persistent.unwrap().ends_with("32724\"}]}"), "{:?}", long(&info));
        let file = sysctl_d(&info, &rows);
        let setting = file.lines().last().unwrap();
        assert!(setting.ends_with(",32724"), "{setting}");
        assert!(file.contains(&format!("# Not set below, because {not_fitting}:\n# 32728,32732,")), "{file}");
        assert!(file.contains(&format!("\n# {immediate}\n")), "{file}");
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
