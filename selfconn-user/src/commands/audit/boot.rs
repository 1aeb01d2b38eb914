//! What the next boot sets: the files of sysctl.d, and where they disagree with what runs.
//!
//! `sysctl --system` and systemd-sysctl take the same folders: of files with the same name only that of the foremost
//! folder counts, those that are left are read in the order of their names, and the last line to set a value decides.
//! `/etc/sysctl.conf` comes last for `sysctl --system`; systemd-sysctl reads it only where a link in a folder leads to
//! it. Not followed: names with wildcards, which systemd-sysctl also takes, and the kernel's command line.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::ports::{PortRange, ReservedPorts};

/// The foremost first.
const FOLDERS: [&str; 5] =
    ["etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d"];
const LAST: &str = "etc/sysctl.conf";

const RANGE: &str = "net.ipv4.ip_local_port_range";
const RESERVED: &str = super::fix::RESERVED;

/// What the kernel begins with: `inet_init_net`, net/ipv4/af_inet.c at v6.12; nothing is reserved.
const DEFAULT_RANGE: PortRange = PortRange { low: 32_768, high: 60_999 };

/// A line that sets a value, where no later one does.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    file: PathBuf,
    value: String,
}

/// What the files say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Boot {
    range: Option<Setting>,
    reserved: Option<Setting>,
    /// Files that could not be read, and why.
    pub(super) unseen: Vec<String>,
}

/// A setting that won't outlive this boot, or is not yet in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Disagreement {
    pub(super) key: &'static str,
    /// The file that decides at boot; null: none does, and it will be the kernel's default.
    pub(super) file: Option<String>,
    /// What it will be.
    pub(super) at_boot: String,
    pub(super) running: String,
}

/// Reads the files below this folder, which is `/` but for tests.
pub(super) fn read(root: &Path) -> Boot {
    let mut boot = Boot::default();
    let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for folder in FOLDERS {
        let entries = match fs::read_dir(root.join(folder)) {
            Ok(entries) => entries,
            Err(error) => {
                boot.unreadable(&root.join(folder), &error);
                continue;
            }
        };
        for entry in
            entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().ends_with(b".conf"))
        {
            files.entry(entry.file_name()).or_insert_with(|| entry.path());
        }
    }
    for path in files.into_values().chain([root.join(LAST)]) {
        match fs::read(&path) {
            Ok(text) => boot.take(&path, &String::from_utf8_lossy(&text)),
            Err(error) => boot.unreadable(&path, &error),
        }
    }
    boot
}

impl Boot {
    fn unreadable(&mut self, path: &Path, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.unseen.push(format!("what the next boot sets: {}: {error}", path.display()));
        }
    }

    fn take(&mut self, path: &Path, text: &str) {
        for (key, value) in text.lines().filter_map(assignment) {
            let setting = Setting { file: path.to_owned(), value: value.to_owned() };
            match key.as_str() {
                RANGE => self.range = Some(setting),
                RESERVED => self.reserved = Some(setting),
                _ => {}
            }
        }
    }

    /// What will be otherwise than it is.
    pub(super) fn disagreements(&self, range: PortRange, reserved: &ReservedPorts) -> Vec<Disagreement> {
        let mut found = Vec::new();
        let mut compare = |key, setting: Option<&Setting>, default: String, running: String, agrees: bool| {
            if !agrees {
                let file = setting.map(|setting| setting.file.display().to_string());
                let at_boot = setting.map_or(default, |setting| setting.value.clone());
                found.push(Disagreement { key, file, at_boot, running });
            }
        };
        // What can't be parsed, the kernel won't take.
        let at_boot =
            self.range.as_ref().map_or(Ok(DEFAULT_RANGE), |setting| PortRange::parse(&setting.value));
        let default = format!("{} {}", DEFAULT_RANGE.low, DEFAULT_RANGE.high);
        let running = format!("{} {}", range.low, range.high);
        compare(RANGE, self.range.as_ref(), default, running, at_boot == Ok(range));
        let value = self.reserved.as_ref().map_or("", |setting| &setting.value);
        let agrees = ReservedPorts::parse(value).as_ref() == Ok(reserved);
        compare(RESERVED, self.reserved.as_ref(), String::new(), reserved.to_string(), agrees);
        found
    }
}

/// A line `key = value`; in the key slashes may stand for dots, and a dash before it says that failure is fine.
fn assignment(line: &str) -> Option<(String, &str)> {
    let line = line.trim();
    if line.starts_with(['#', ';']) {
        return None;
    }
    let (key, value) = line.split_once('=')?;
    let key = key.trim().trim_start_matches('-').trim().replace('/', ".");
    Some((key, value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_sysctl_reads_them() {
        for (line, want) in [
            ("net.ipv4.ip_local_port_range = 1 2", Some(("net.ipv4.ip_local_port_range", "1 2"))),
            ("  net/ipv4/ip_local_port_range=1\t2 ", Some(("net.ipv4.ip_local_port_range", "1\t2"))),
            ("-net.ipv4.ip_local_reserved_ports =", Some(("net.ipv4.ip_local_reserved_ports", ""))),
            ("# net.ipv4.ip_local_port_range = 1 2", None),
            ("; net.ipv4.ip_local_port_range = 1 2", None),
            ("-net.ipv4.ip_local_port_range", None),
            ("", None),
        ] {
            let got = assignment(line);
            assert_eq!(got.as_ref().map(|(key, value)| (key.as_str(), *value)), want, "{line:?}");
        }
    }

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn reserved(value: &str) -> String {
        format!("net.ipv4.ip_local_reserved_ports = {value}\n")
    }

    #[test]
    fn the_foremost_folder_hides_and_the_last_name_decides() {
        let (one, two, three) = (reserved("1"), reserved("2"), reserved("3"));
        type Files<'a> = &'a [(&'a str, &'a str)];
        let rows: [(Files<'_>, Option<&str>); 8] = [
            (&[], None),
            (&[("etc/sysctl.d/a.conf", &one)], Some("1")),
            (&[("etc/sysctl.d/a.conf", &one), ("usr/lib/sysctl.d/b.conf", &two)], Some("2")),
            (&[("etc/sysctl.d/b.conf", &one), ("usr/lib/sysctl.d/a.conf", &two)], Some("1")),
            (&[("run/sysctl.d/a.conf", &one), ("usr/lib/sysctl.d/a.conf", &two)], Some("1")),
            (&[("etc/sysctl.d/a.conf", ""), ("usr/lib/sysctl.d/a.conf", &two)], None),
            (&[("etc/sysctl.d/zz.conf", &one), ("etc/sysctl.conf", &three)], Some("3")),
            (&[("etc/sysctl.d/README", &one), ("lib/sysctl.d/a.conf", &two)], Some("2")),
        ];
        for (files, want) in rows {
            let root = tree(files);
            let boot = read(root.path());
            assert_eq!(boot.reserved.as_ref().map(|setting| setting.value.as_str()), want, "{files:?}");
            assert_eq!(boot.unseen, [""; 0]);
        }
    }

    #[test]
    fn only_what_differs_in_meaning_disagrees() {
        let rows = [
            // The files, what runs, what disagrees.
            ("", "32768 60999", "", vec![]),
            ("", "32768 60999", "8080", vec![(RESERVED, "", "8080")]),
            ("", "1024 65535", "", vec![(RANGE, "32768 60999", "1024 65535")]),
            ("net.ipv4.ip_local_reserved_ports = 2,1\n", "32768 60999", "1-2", vec![]),
            ("net.ipv4.ip_local_reserved_ports = 1\n", "32768 60999", "", vec![(RESERVED, "1", "")]),
            ("net.ipv4.ip_local_port_range = 1024\t65535\n", "1024 65535", "", vec![]),
            (
                "net.ipv4.ip_local_port_range = wide\n",
                "32768 60999",
                "",
                vec![(RANGE, "wide", "32768 60999")],
            ),
        ];
        for (file, range, reserved, want) in rows {
            let root = tree(&[("etc/sysctl.d/a.conf", file)]);
            let found = read(root.path())
                .disagreements(PortRange::parse(range).unwrap(), &ReservedPorts::parse(reserved).unwrap());
            let got: Vec<_> = found.iter().map(|d| (d.key, d.at_boot.as_str(), d.running.as_str())).collect();
            assert_eq!(got, want, "{file:?}");
            let is_set = |d: &Disagreement| file.contains(d.key);
            assert!(found.iter().all(|d| d.file.is_some() == is_set(d)), "{found:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let root = tree(&[("etc/sysctl.d/a.conf/inside", "")]);
        let boot = read(root.path());
        assert_eq!(boot.unseen.len(), 1);
        assert!(boot.unseen[0].contains("a.conf: Is a directory"), "{:?}", boot.unseen);
    }
}
