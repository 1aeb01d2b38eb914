//! A process that chooses its names to deceive: its program's path, its arguments and its threads' names say what a line
//! of the log says, move the cursor, and turn text around. The log stays one object a line, and a terminal shows none of
//! it raw.

use std::{
    ffi::OsStr,
    fs,
    net::Ipv4Addr,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    client::connect_to_self,
    daemon::{Daemon, Variant, of, selfconn},
    net::Net,
};

/// A line break, a line of the log, a colour, a mark of direction, and a byte that is not UTF-8.
const NAME: &[u8] = b"\n{\"event\":\"fake\"}\x1b[31m\xe2\x80\xae\xff";

/// What a terminal may get: no control character but the end of a line, and nothing that turns text around.
#[track_caller]
fn assert_harmless(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8(output.to_vec()).unwrap();
    let bad = text.chars().find(|c| (c.is_control() && *c != '\n') || matches!(c, '\u{202a}'..='\u{202e}'));
    assert_eq!(bad, None, "{text:?}");
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    assert!(lines.iter().all(|line| !line.trim_start().starts_with('{')), "{text}");
    lines
}

#[test]
fn names_that_deceive_stay_in_their_fields() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let (program, log) = (folder.path().join(OsStr::from_bytes(NAME)), folder.path().join("events.jsonl"));
    fs::copy(selfconn(), &program).unwrap();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--log", log.to_str().unwrap()]);

    // Its first argument alone is as long as what is told of all of them.
    let mut client = Command::new(&program);
    client.arg0(OsStr::from_bytes(&NAME.repeat(4_096 / NAME.len() + 1)));
    client.args(["repro", "--json", "--hold", "600", "--thread", "\r\u{1b}[2K\u{202e}"]);
    let mut client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let told = daemon.expect(1, of("established", net.inode)).pop().unwrap();
    let lossy = String::from_utf8_lossy(NAME);
    assert_eq!(told["pid"], client.id(), "{told}");
    assert_eq!(told["comm"].as_str().unwrap().as_bytes(), &NAME[..15], "{told}");
    assert_eq!(told["thread_comm"], "\r\u{1b}[2K\u{202e}", "{told}");
    assert!(told["exe"].as_str().unwrap().ends_with(&*lossy), "{told}");
    let arguments = told["cmdline"].as_array().unwrap();
    assert_eq!(arguments.len(), 1, "cut within the first: {told}");
    assert!(arguments[0].as_str().unwrap().starts_with(&*lossy), "{told}");

    let scan = Command::new(selfconn()).args(["scan"]).output().unwrap();
    let shown = assert_harmless(&scan.stdout);
    assert!(shown.iter().any(|line| line.contains("\\n{\"event\":\"fa")), "it is shown, escaped: {shown:?}");
    assert_harmless(&scan.stderr);

    kill_process(Pid::from_child(&client), Signal::INT).unwrap();
    client.wait().unwrap();
    // And one whose names are its own.
    drop(connect_to_self(Ipv4Addr::LOCALHOST.into()));
    daemon.expect(2, of("closed", net.inode));
    let (events, _) = daemon.stop();
    assert!(events.iter().all(|event| event["event"] != "fake"), "{events:#?}");

    let written = fs::read(&log).unwrap();
    let lines: Vec<&[u8]> = written.strip_suffix(b"\n").unwrap().split(|byte| *byte == b'\n').collect();
    let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_slice(line).unwrap()).collect();
    assert_eq!(lines, events, "the log has what stdout has, a line each");

    let tail = Command::new(selfconn()).arg("tail").arg(&log).output().unwrap();
    let shown = assert_harmless(&tail.stdout);
    assert!(shown.iter().any(|line| line.contains("\\n{\"event\":\"fa")), "{shown:?}");
    assert!(tail.status.success());
}
