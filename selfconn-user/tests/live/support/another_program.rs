//! A second program for processes that call execve(): the test binary by another path.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    process::Command,
};

/// The name of the program, which is in its `exe` and the first of its arguments.
pub(crate) const NAME: &str = "another-program";

/// The program, which can be executed without the right to reach its path.
pub(crate) struct AnotherProgram(File);

impl AnotherProgram {
    /// Needs the right to write to the folder of this binary.
    pub(crate) fn new() -> Self {
        let this = fs::read_link("/proc/self/exe").unwrap();
        let link = this.with_file_name(format!("{NAME}-{}", std::process::id()));
        fs::hard_link(this, &link).unwrap();
        let file = File::open(&link).unwrap();
        fs::remove_file(link).unwrap();
        Self(file)
    }

    /// The command without arguments, to be executed in this process.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(format!("/proc/self/fd/{}", self.0.as_raw_fd()));
        command.arg0(NAME);
        command
    }
}
