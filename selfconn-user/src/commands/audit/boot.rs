//! Reads the files of sysctl.d, and compares the values that the next boot sets with the running values.
//!
//! `sysctl --system` and systemd-sysctl read the same directories. If several directories have a file of the
//! same name, only the file of the first directory counts. The remaining files are read in the order of their
//! names, and the last line that sets a value wins. `sysctl --system` reads `/etc/sysctl.conf` last;
//! systemd-sysctl reads it only if a link in one of the directories points to it. Not supported: keys with
//! wildcards, which systemd-sysctl accepts, and sysctls on the kernel command line.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::Serialize;

use crate::ports::{
    PortRange, ReservedPorts,
    sysctl::{RANGE_KEY, RESERVED_KEY},
};

/// The directories in order of precedence, relative to the root directory.
const SYSCTL_D_DIRECTORIES: [&str; 5] =
    ["etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d"];
const SYSCTL_CONF: &str = "etc/sysctl.conf";

/// The default of the kernel: `inet_init_net`, net/ipv4/af_inet.c at v6.12. By default no port is reserved.
const DEFAULT_RANGE: PortRange = PortRange { low: 32_768, high: 60_999 };

/// A value and the file that sets it. The last line that sets the value wins.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    file: PathBuf,
    value: String,
}

/// The settings that the files make at the next boot.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct BootSettings {
    range: Option<Setting>,
    reserved: Option<Setting>,
    /// The files that could not be read, and why.
    pub(super) unseen: Vec<String>,
}

/// A running value that the next boot will change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct Disagreement {
    pub(super) key: &'static str,
    /// The file that sets the value at boot. Null: no file sets it, so the default of the kernel applies.
    pub(super) file: Option<String>,
    /// The value after the next boot.
    pub(super) at_boot: String,
    pub(super) running: String,
}

/// Reads the files below `root`, which is `/` except in tests.
pub(super) fn read(root: &Path) -> BootSettings {
    let mut settings = BootSettings::default();
    let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in SYSCTL_D_DIRECTORIES {
        let entries = match fs::read_dir(root.join(directory)) {
            Ok(entries) => entries,
            Err(error) => {
                settings.record_unreadable(&root.join(directory), &error);
                continue;
            }
        };
        for entry in
            entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().ends_with(b".conf"))
        {
            files.entry(entry.file_name()).or_insert_with(|| entry.path());
        }
    }
    for path in files.into_values().chain([root.join(SYSCTL_CONF)]) {
        match fs::read(&path) {
            Ok(text) => settings.apply_file(&path, &String::from_utf8_lossy(&text)),
            Err(error) => settings.record_unreadable(&path, &error),
        }
    }
    settings
}

impl BootSettings {
    fn record_unreadable(&mut self, path: &Path, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.unseen.push(format!("settings of the next boot: {}: {error}", path.display()));
        }
    }

    fn apply_file(&mut self, path: &Path, text: &str) {
        for (key, value) in text.lines().filter_map(parse_assignment) {
            let setting = Setting { file: path.to_owned(), value: value.to_owned() };
            match key.as_str() {
                RANGE_KEY => self.range = Some(setting),
                RESERVED_KEY => self.reserved = Some(setting),
                _ => {}
            }
        }
    }

    /// The running values that the next boot will change.
    pub(super) fn disagreements(&self, range: PortRange, reserved: &ReservedPorts) -> Vec<Disagreement> {
        let mut found = Vec::new();
        let mut compare = |key, setting: Option<&Setting>, default: String, running: String, agrees: bool| {
            if !agrees {
                let file = setting.map(|setting| setting.file.display().to_string());
                let at_boot = setting.map_or(default, |setting| setting.value.clone());
                found.push(Disagreement { key, file, at_boot, running });
            }
        };
        // The kernel rejects a value that cannot be parsed, so such a value never agrees.
        let at_boot =
            self.range.as_ref().map_or(Ok(DEFAULT_RANGE), |setting| PortRange::parse(&setting.value));
        let default = format!("{} {}", DEFAULT_RANGE.low, DEFAULT_RANGE.high);
        let running = format!("{} {}", range.low, range.high);
        compare(RANGE_KEY, self.range.as_ref(), default, running, at_boot == Ok(range));
        let value = self.reserved.as_ref().map_or("", |setting| &setting.value);
        let agrees = ReservedPorts::parse(value).as_ref() == Ok(reserved);
        compare(RESERVED_KEY, self.reserved.as_ref(), String::new(), reserved.to_string(), agrees);
        found
    }
}

/// Parses a line `key = value`. The key can have slashes instead of dots. A dash before the key means that a
/// failure to set it is ignored.
fn parse_assignment(line: &str) -> Option<(String, &str)> {
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
    fn lines_are_parsed_as_sysctl_parses_them() {
        for (line, want) in [
            ("net.ipv4.ip_local_port_range = 1 2", Some(("net.ipv4.ip_local_port_range", "1 2"))),
            ("  net/ipv4/ip_local_port_range=1\t2 ", Some(("net.ipv4.ip_local_port_range", "1\t2"))),
            ("-net.ipv4.ip_local_reserved_ports =", Some(("net.ipv4.ip_local_reserved_ports", ""))),
            ("# net.ipv4.ip_local_port_range = 1 2", None),
            ("; net.ipv4.ip_local_port_range = 1 2", None),
            ("-net.ipv4.ip_local_port_range", None),
            ("", None),
        ] {
            let got = parse_assignment(line);
            assert_eq!(got.as_ref().map(|(key, value)| (key.as_str(), *value)), want, "{line:?}");
        }
    }

    fn create_files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn reserved_line(value: &str) -> String {
        format!("net.ipv4.ip_local_reserved_ports = {value}\n")
    }

    #[test]
    fn the_first_directory_hides_files_of_the_same_name_and_the_last_file_wins() {
        let (one, two, three) = (reserved_line("1"), reserved_line("2"), reserved_line("3"));
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
            let root = create_files(files);
            let settings = read(root.path());
            assert_eq!(settings.reserved.as_ref().map(|setting| setting.value.as_str()), want, "{files:?}");
            assert_eq!(settings.unseen, [""; 0]);
        }
    }

    #[test]
    fn only_values_that_differ_in_meaning_disagree() {
        let rows = [
            // The file, the running range, the running reserved ports, the disagreements.
            ("", "32768 60999", "", vec![]),
            ("", "32768 60999", "8080", vec![(RESERVED_KEY, "", "8080")]),
            ("", "1024 65535", "", vec![(RANGE_KEY, "32768 60999", "1024 65535")]),
            ("net.ipv4.ip_local_reserved_ports = 2,1\n", "32768 60999", "1-2", vec![]),
            ("net.ipv4.ip_local_reserved_ports = 1\n", "32768 60999", "", vec![(RESERVED_KEY, "1", "")]),
            ("net.ipv4.ip_local_port_range = 1024\t65535\n", "1024 65535", "", vec![]),
            (
                "net.ipv4.ip_local_port_range = wide\n",
                "32768 60999",
                "",
                vec![(RANGE_KEY, "wide", "32768 60999")],
            ),
        ];
        for (file, range, reserved, want) in rows {
            let root = create_files(&[("etc/sysctl.d/a.conf", file)]);
            let found = read(root.path())
                .disagreements(PortRange::parse(range).unwrap(), &ReservedPorts::parse(reserved).unwrap());
            let got: Vec<_> = found.iter().map(|d| (d.key, d.at_boot.as_str(), d.running.as_str())).collect();
            assert_eq!(got, want, "{file:?}");
            let is_set = |d: &Disagreement| file.contains(d.key);
            assert!(found.iter().all(|d| d.file.is_some() == is_set(d)), "{found:?}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_reported() {
        let root = create_files(&[("etc/sysctl.d/a.conf/inside", "")]);
        let settings = read(root.path());
        assert_eq!(settings.unseen.len(), 1);
        assert!(settings.unseen[0].contains("a.conf: Is a directory"), "{:?}", settings.unseen);
    }
}
