//! Runs `selfconn tail` on logs of other versions, and on rotated, truncated, hostile and large logs.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use crate::support::{on_a_terminal, selfconn};

const DEADLINE: Duration = Duration::from_secs(60);

fn tail() -> Command {
    let mut command = selfconn();
    command.arg("tail").env_remove("NO_COLOR").env("TERM", "xterm").stdin(Stdio::null());
    command
}

#[track_caller]
fn stdout_lines(output: &Output) -> Vec<String> {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    stdout.lines().map(ToOwned::to_owned).collect()
}

fn event(kind: &str, id: usize, port: u16, comm: &str) -> String {
    format!(
        "{{\"time\":\"2026-11-24T03:00:{:02}.000000000Z\",\"event\":\"{kind}\",\"id\":\"{id}\",\"addr\":\
         \"127.0.0.1\",\"port\":{port},\"pid\":{id},\"comm\":\"{comm}\",\"cause\":\"ephemeral\",\
         \"duration_ns\":5000000,\"how\":\"fin\"}}\n",
        id % 60
    )
}

/// A log with three connections, one of which is still open.
fn example_log() -> String {
    [
        "{\"time\":\"2026-11-24T02:59:00.000000000Z\",\"event\":\"started\",\"version\":\"0.1.0\",\"kernel\":\"6.1\",\"pid\":1}\n",
        &event("established", 1, 5432, "java"),
        &event("state", 1, 5432, "java"),
        &event("established", 2, 44446, "nginx"),
        &event("closed", 1, 5432, "java"),
        &event("established", 3, 5432, "java"),
        "{\"time\":\"2026-11-24T03:00:04.000000000Z\",\"event\":\"of_a_newer_version\",\"port\":5432,\"news\":{\"a\":[1]}}\n",
        &event("closed", 3, 5432, "java"),
    ]
    .concat()
}

struct Log {
    folder: tempfile::TempDir,
    path: PathBuf,
}

impl Log {
    fn of(bytes: impl AsRef<[u8]>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        fs::write(&path, bytes).unwrap();
        Self { folder, path }
    }

    fn add(&self, line: &str) {
        let mut file = OpenOptions::new().append(true).create(true).open(&self.path).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }

    fn rotated_path(&self) -> PathBuf {
        self.folder.path().join("events.jsonl.1")
    }

    #[track_caller]
    fn shows(&self, options: &[&str]) -> Vec<String> {
        stdout_lines(&tail().args(options).arg(&self.path).output().unwrap())
    }
}

/// The second column of each line, and the first word after it.
fn words(lines: &[String]) -> Vec<(&str, &str)> {
    lines
        .iter()
        .map(|line| {
            let mut words = line.get(26..).unwrap_or_default().split_whitespace();
            (words.next().unwrap_or_default(), words.next().unwrap_or_default())
        })
        .collect()
}

#[test]
fn a_unit_a_container_and_a_namespace_select_events() {
    let of = |port: u16, fields: &str| {
        format!(
            "{{\"time\":\"2026-11-24T03:00:00.000000000Z\",\"event\":\"blocked\",\"addr\":\"127.0.0.1\",\"port\":{port},\
             {fields}}}\n"
        )
    };
    let own = fs::metadata("/proc/self/ns/net").map(|own| std::os::unix::fs::MetadataExt::ino(&own)).unwrap();
    let log = Log::of(
        [
            of(1, "\"netns\":7,\"unit\":\"web.service\",\"container\":\"0123456789abcdef\""),
            of(2, &format!("\"netns\":{own},\"unit\":null,\"container\":null")),
        ]
        .concat(),
    );
    let ports = |options: &[&str]| {
        let output = tail().args(["--json", "-n", "all"]).args(options).arg(&log.path).output().unwrap();
        let lines = stdout_lines(&output);
        lines.iter().map(|line| if line.contains("\"port\":1,") { 1 } else { 2 }).collect::<Vec<_>>()
    };
    for (options, expected) in [
        (&["--unit", "web.service"][..], &[1][..]),
        (&["--unit", "web"], &[]),
        (&["--container", "0123456789ab"], &[1]),
        (&["--container", "123456789ab"], &[]),
        (&["--netns", "7"], &[1]),
        (&["--netns", "self"], &[2]),
        (&["--netns", "/proc/self/ns/net"], &[2]),
        (&["--netns", "7", "--netns", "self"], &[1, 2]),
        (&["--netns", "all"], &[1, 2]),
        (&["--netns", "7", "--unit", "other.service"], &[]),
    ] {
        assert_eq!(ports(options), expected, "{options:?}");
    }
    let absent = tail().args(["--netns", "/run/no/such"]).arg(&log.path).output().unwrap();
    assert_eq!(absent.status.code(), Some(2), "{absent:?}");
    assert!(String::from_utf8_lossy(&absent.stderr).contains("--netns /run/no/such"), "{absent:?}");
}

#[test]
fn a_connection_is_one_line_and_open_connections_come_last() {
    let lines = Log::of(example_log()).shows(&[]);
    assert_eq!(
        words(&lines),
        [
            ("started", "selfconn"),
            ("closed", "127.0.0.1:5432"),
            ("?", "of_a_newer_version"),
            ("closed", "127.0.0.1:5432"),
            ("OPEN", "127.0.0.1:44446"),
        ]
    );
    assert_eq!(
        lines[1],
        "2026-11-24 03:00:01.000Z  closed       127.0.0.1:5432        java[1] after 5.0ms, by FIN"
    );
    assert!(
        lines[4].contains("nginx[2] is connected to itself") && lines[4].contains("; for "),
        "{}",
        lines[4]
    );
    assert!(!lines.concat().contains('\u{1b}'), "no colour in a pipe");
}

#[test]
fn only_events_that_match_the_options_are_shown() {
    let log = Log::of(example_log());
    let closed = ("closed", "127.0.0.1:5432");
    let open = ("OPEN", "127.0.0.1:44446");
    let unknown = ("?", "of_a_newer_version");
    for (options, expected) in [
        (&["--port", "44446"][..], &[open][..]),
        (&["--port", "5432"], &[closed, unknown, closed]),
        (&["--pid", "3"], &[closed]),
        (&["--comm", "nginx"], &[open]),
        (&["--comm", "nginx", "--comm", "java", "--event", "closed"], &[closed, closed]),
        (&["--event", "state"], &[("state", "127.0.0.1:5432")]),
        (&["--port", "1"], &[]),
        (&["-n", "2"], &[unknown, closed]),
        (&["-n", "4"], &[closed, unknown, closed, open]),
        (&["-n", "1"], &[closed]),
        (&["-n", "0"], &[]),
        (&["-n", "1", "--port", "44446"], &[open]),
        (&["--since", "2026-11-24T03:00:03Z"], &[unknown, closed]),
        (&["--since", "1s"], &[]),
    ] {
        assert_eq!(words(&log.shows(options)), expected, "{options:?}");
    }
}

#[test]
fn json_passes_through_byte_for_byte() {
    let unusual =
        "{ \"event\" : \"closed\",\"id\":\"\\u001b\", \"big\":18446744073709551615, \"port\":5432.0 }\n";
    let log = Log::of(example_log() + unusual);
    let output = tail().args(["-n", "all", "--json", "--event", "closed"]).arg(&log.path).output().unwrap();
    let expected =
        [event("closed", 1, 5432, "java"), event("closed", 3, 5432, "java"), unusual.to_owned()].concat();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    let last = tail().args(["-n", "1", "--json"]).arg(&log.path).output().unwrap();
    assert_eq!(String::from_utf8(last.stdout).unwrap(), unusual);
    let through_stdin =
        tail().args(["-n", "1", "--json", "-"]).stdin(File::open(&log.path).unwrap()).output().unwrap();
    assert_eq!(String::from_utf8(through_stdin.stdout).unwrap(), unusual);
}

#[test]
fn invalid_lines_are_skipped_and_counted() {
    let mut bytes = b"\x00\xff\xfe\n[]\n{\"no\":\"event\"}\n{\"event\":\"closed\",\"id\":\"to\n".to_vec();
    bytes.extend(event("closed", 1, 80, "one").bytes());
    bytes.extend(vec![b'x'; 3 << 20]);
    bytes.push(b'\n');
    bytes.extend(event("closed", 2, 80, "two").bytes());
    bytes.extend(b"{\"event\":\"torn");
    let log = Log::of(bytes);
    for options in [&["-n", "all"][..], &["-n", "2"]] {
        let output = tail().args(options).arg(&log.path).output().unwrap();
        assert_eq!(words(&stdout_lines(&output)), [("closed", "127.0.0.1:80"); 2], "{options:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        let count = if options[1] == "all" { "skipped 6 lines" } else { "skipped 2 lines" };
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains(count), "{stderr}");
    }
}

#[test]
fn hostile_names_are_escaped() {
    let hostile = event("closed", 1, 80, r"\u001b[2J\u202e\nfake\tname\u009b");
    let lines = Log::of(hostile).shows(&[]);
    assert_eq!(lines.len(), 1);
    let is_harmless = |c: char| !c.is_control() && c != '\u{202e}';
    assert!(lines[0].chars().all(is_harmless), "{}", lines[0]);
    assert!(lines[0].contains(r"\u{1b}[2J\u{202e}\nfake\tname\u{9b}[1]"), "{}", lines[0]);
}

#[test]
fn the_last_lines_include_the_file_that_was_just_rotated() {
    let log = Log::of(example_log());
    fs::rename(&log.path, log.rotated_path()).unwrap();
    log.add(&event("closed", 2, 44446, "nginx"));
    let closed = ("closed", "127.0.0.1:5432");
    assert_eq!(words(&log.shows(&["-n", "2"])), [closed, ("closed", "127.0.0.1:44446")]);
    assert_eq!(words(&log.shows(&["-n", "1"])), [("closed", "127.0.0.1:44446")]);
}

#[test]
fn the_end_of_a_log_larger_than_any_disk_is_found_at_once() {
    let log = Log::of("");
    let mut file = OpenOptions::new().write(true).open(&log.path).unwrap();
    // A hole that is too large to be read before the deadline.
    file.seek(SeekFrom::Start(1 << 42)).unwrap();
    file.write_all(("\n".to_owned() + &example_log()).as_bytes()).unwrap();
    drop(file);
    assert_eq!(log.shows(&["-n", "2"]).len(), 2);
}

#[test]
fn an_error_is_one_line_with_a_hint() {
    for (arguments, expected) in [
        (&["/no/such/file"][..], "--journal"),
        (&["/"], "directory"),
        (&["--since", "yesterday"], "--since"),
        (&["-n", "some"], "--lines"),
        (&["--journal-dir", "/"], "--journal"),
    ] {
        let output = tail().args(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains(expected), "{expected} is not in: {stderr}");
    }
}

/// A `tail -f` process and its output lines.
struct FollowingTail {
    child: Child,
    lines: Receiver<String>,
}

impl FollowingTail {
    fn start(path: &Path) -> Self {
        let mut child = tail().args(["-f", "-n", "all"]).arg(path).stdout(Stdio::piped()).spawn().unwrap();
        let stdout: ChildStdout = child.stdout.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                if sender.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        Self { child, lines }
    }

    #[track_caller]
    fn expect(&self, word: &str, text: &str) {
        let line = self.lines.recv_timeout(DEADLINE).unwrap();
        assert!(line.contains(word) && line.contains(text), "{word} {text} is not in: {line}");
    }
}

impl Drop for FollowingTail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn following_continues_after_a_rename_a_removal_and_a_truncation() {
    let log = Log::of(event("established", 1, 80, "one"));
    let tail = FollowingTail::start(&log.path);
    tail.expect("OPEN", "one[1]");
    log.add(&event("closed", 1, 80, "one"));
    tail.expect("closed", "one[1]");
    // A line in two pieces is one line.
    let line = event("established", 2, 80, "two");
    log.add(&line[..40]);
    std::thread::sleep(Duration::from_millis(20));
    log.add(&line[40..]);
    tail.expect("ESTABLISHED", "two[2]");
    // A process can still write to the old file after the rename.
    let mut old = OpenOptions::new().append(true).open(&log.path).unwrap();
    fs::rename(&log.path, log.rotated_path()).unwrap();
    old.write_all(event("closed", 3, 80, "three").as_bytes()).unwrap();
    tail.expect("closed", "three[3]");
    log.add(&event("closed", 4, 80, "four"));
    tail.expect("closed", "four[4]");
    fs::remove_file(&log.path).unwrap();
    log.add(&event("closed", 5, 80, "five"));
    tail.expect("closed", "five[5]");
    log.add(&event("closed", 6, 80, "six"));
    tail.expect("closed", "six[6]");
    OpenOptions::new().write(true).open(&log.path).unwrap().set_len(0).unwrap();
    log.add(&event("closed", 7, 80, "seven"));
    tail.expect("closed", "seven[7]");
}

#[test]
fn following_ends_when_the_reader_closes_the_pipe_even_without_new_events() {
    let log = Log::of(event("closed", 1, 80, "one"));
    let mut child = tail().arg("-f").arg(&log.path).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("one[1]"));
    assert_eq!(child.wait().unwrap().code(), Some(0), "a broken pipe is not an error");
}

#[test]
fn colour_is_only_used_on_capable_terminals_without_no_color() {
    let log = Log::of(event("established", 1, 80, "one"));
    let shown = |variables: &[(&str, &str)]| {
        let mut command = tail();
        command.arg(&log.path).envs(variables.iter().copied());
        let (code, text) = on_a_terminal(command);
        assert_eq!(code, Some(0), "{text}");
        text
    };
    assert!(shown(&[]).contains("\u{1b}["));
    assert!(!shown(&[("NO_COLOR", "1")]).contains('\u{1b}'));
    assert!(!shown(&[("TERM", "dumb")]).contains('\u{1b}'));
}
