//! A process with hostile names: the path of its program, its arguments and its thread names contain what
//! looks like a log line, move the cursor, and reverse the text direction. The log must stay one object per
//! line, and a terminal must get none of these bytes unescaped.

use std::{
    ffi::OsStr,
    fs,
    net::Ipv4Addr,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{
    client::connect_to_self,
    daemon::{HookVariant, TestDaemon, is_event, selfconn},
    netns::TestNetns,
};

/// A line break, a log line, a colour, a text direction mark, and a byte that is not UTF-8.
const HOSTILE_NAME: &[u8] = b"\n{\"event\":\"fake\"}\x1b[31m\xe2\x80\xae\xff";

/// Checks that output is safe for a terminal: no control character except the end of a line, and no text
/// direction mark.
#[track_caller]
fn assert_terminal_safe(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8(output.to_vec()).unwrap();
    let bad = text.chars().find(|c| (c.is_control() && *c != '\n') || matches!(c, '\u{202a}'..='\u{202e}'));
    assert_eq!(bad, None, "{text:?}");
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    assert!(lines.iter().all(|line| !line.trim_start().starts_with('{')), "{text}");
    lines
}

#[test]
fn hostile_process_names_stay_in_their_fields() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let (program, log) =
        (folder.path().join(OsStr::from_bytes(HOSTILE_NAME)), folder.path().join("events.jsonl"));
    fs::copy(selfconn(), &program).unwrap();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--log", log.to_str().unwrap()]);

    // The first argument alone is longer than the part of the command line that is reported.
    let mut client = Command::new(&program);
    client.arg0(OsStr::from_bytes(&HOSTILE_NAME.repeat(4_096 / HOSTILE_NAME.len() + 1)));
    client.args(["repro", "--json", "--hold", "600", "--thread", "\r\u{1b}[2K\u{202e}"]);
    let mut client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let reported = daemon.expect(1, is_event("established", net.inode)).pop().unwrap();
    let lossy = String::from_utf8_lossy(HOSTILE_NAME);
    assert_eq!(reported["pid"], client.id(), "{reported}");
    assert_eq!(reported["comm"].as_str().unwrap().as_bytes(), &HOSTILE_NAME[..15], "{reported}");
    assert_eq!(reported["thread_comm"], "\r\u{1b}[2K\u{202e}", "{reported}");
    assert!(reported["exe"].as_str().unwrap().ends_with(&*lossy), "{reported}");
    let arguments = reported["cmdline"].as_array().unwrap();
    assert_eq!(arguments.len(), 1, "truncated within the first argument: {reported}");
    assert!(arguments[0].as_str().unwrap().starts_with(&*lossy), "{reported}");

    let scan = Command::new(selfconn()).args(["scan"]).output().unwrap();
    let shown = assert_terminal_safe(&scan.stdout);
    assert!(
        shown.iter().any(|line| line.contains("\\n{\"event\":\"fa")),
        "the name is shown escaped: {shown:?}"
    );
    assert_terminal_safe(&scan.stderr);

    kill_process(Pid::from_child(&client), Signal::INT).unwrap();
    client.wait().unwrap();
    // Then one more self-connection, of a process with ordinary names.
    drop(connect_to_self(Ipv4Addr::LOCALHOST.into()));
    daemon.expect(2, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    assert!(events.iter().all(|event| event["event"] != "fake"), "{events:#?}");

    let written = fs::read(&log).unwrap();
    let lines: Vec<&[u8]> = written.strip_suffix(b"\n").unwrap().split(|byte| *byte == b'\n').collect();
    let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_slice(line).unwrap()).collect();
    assert_eq!(lines, events, "the log has the same events as stdout, one per line");

    let tail = Command::new(selfconn()).arg("tail").arg(&log).output().unwrap();
    let shown = assert_terminal_safe(&tail.stdout);
    assert!(shown.iter().any(|line| line.contains("\\n{\"event\":\"fa")), "{shown:?}");
    assert!(tail.status.success());
}
