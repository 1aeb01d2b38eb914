//! What the tests of the command line share: the binary under test, its one-line errors, and a terminal. No tests.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::machine;

/// The path of the binary under test. The test shares the machine with others from now on, so that no live test
/// runs at the same time.
pub(crate) fn binary() -> PathBuf {
    machine::share();
    std::env::var_os("SELFCONN_BIN").map_or_else(|| env!("CARGO_BIN_EXE_selfconn").into(), PathBuf::from)
}

pub(crate) fn selfconn() -> Command {
    Command::new(binary())
}

/// The binary as an unprivileged user. It is copied, because other users may have no access to the build
/// directory. Another process copies it: a descriptor that this process writes to would be in each process that
/// another test starts at that moment, and a file that is open for writing cannot be executed (ETXTBSY).
pub(crate) fn unprivileged_selfconn() -> (tempfile::TempDir, Command) {
    let directory =
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let copy = directory.path().join("selfconn");
    assert!(Command::new("cp").arg(binary()).arg(&copy).status().unwrap().success());
    let mut command = Command::new(copy);
    command.uid(65_534).gid(65_534).current_dir("/");
    (directory, command)
}

/// Checks for exit code 2 and one line on stderr that contains these texts.
#[track_caller]
pub(crate) fn assert_one_line_error(output: &Output, expected: &[&str]) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("selfconn: ") && stderr.ends_with('\n'), "{stderr}");
    for text in expected {
        assert!(stderr.contains(text), "{text} is not in: {stderr}");
    }
}

/// The exit code and the output of a command on a terminal.
pub(crate) fn on_a_terminal(mut command: Command) -> (Option<i32>, String) {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let slave = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    command.stdin(Stdio::null()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut child = command.spawn().unwrap();
    // The command has the last other descriptors of the slave.
    drop(command);
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    // A read fails with EIO after the other end of the terminal is closed.
    while let Ok(length @ 1..) = File::from(terminal.try_clone().unwrap()).read(&mut chunk) {
        text.extend_from_slice(&chunk[..length]);
    }
    (child.wait().unwrap().code(), String::from_utf8(text).unwrap())
}
