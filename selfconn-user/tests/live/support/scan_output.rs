//! Runs `selfconn scan --json` and parses its output.

use std::process::Command;

use serde_json::Value;

use super::{daemon::selfconn, netns::TestNetns, schema::parse_line};

/// Both ways to read the socket table of the kernel.
pub(crate) const METHODS: [&[&str]; 2] = [&[], &["--procfs"]];

/// The output of `selfconn scan --json`.
#[derive(Debug)]
pub(crate) struct ScanOutput {
    pub(crate) code: Option<i32>,
    pub(crate) rows: Vec<Value>,
    pub(crate) stderr: String,
}

impl ScanOutput {
    pub(crate) fn run(options: &[&str]) -> Self {
        Self::from_command(Command::new(selfconn()).arg("scan").args(options))
    }

    pub(crate) fn from_command(command: &mut Command) -> Self {
        let output = command.arg("--json").output().unwrap();
        Self {
            code: output.status.code(),
            rows: String::from_utf8(output.stdout)
                .unwrap()
                .lines()
                .map(|line| parse_line("scan", line))
                .collect(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The rows of one namespace. Other tests run at the same time.
    pub(crate) fn rows_in(&self, net: TestNetns) -> Vec<&Value> {
        self.rows.iter().filter(|row| row["netns"] == net.inode).collect()
    }

    /// The lines of stderr, except those about processes that even root may not inspect without
    /// CAP_SYS_PTRACE.
    pub(crate) fn unexpected_stderr(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| !line.contains("CAP_SYS_PTRACE")).collect()
    }

    #[track_caller]
    pub(crate) fn only_row_in(&self, net: TestNetns) -> &Value {
        let rows = self.rows_in(net);
        assert_eq!(rows.len(), 1, "{self:#?}");
        rows[0]
    }
}
