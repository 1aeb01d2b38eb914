//! `selfconn repro` from outside: the real binary, the real kernel, and what it leaves behind. Needs no
//! privilege; the tests that need a network namespace of their own make one, or say that they could not.

#![expect(clippy::unwrap_used, reason = "what a test's helper can't do fails the test")]

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// `SELFCONN_BIN` names another build, as of a release.
fn binary() -> String {
    std::env::var("SELFCONN_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_selfconn").to_owned())
}

fn repro(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("repro").args(args);
    command
}

fn run(args: &[&str]) -> Output {
    repro(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Each step, in order, by its name.
fn steps(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn step<'a>(steps: &'a [Value], event: &str) -> &'a Value {
    steps.iter().find(|step| step["event"] == event).unwrap_or_else(|| panic!("no {event} in {steps:#?}"))
}

/// An error is one line on stderr, and the exit code 2.
fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(text.starts_with("selfconn: ") && text.ends_with('\n') && text.lines().count() == 1, "{text:?}");
    text
}

/// Runs a shell script in a network namespace of its own, where `$SELFCONN` is the binary and `lo` is down; none
/// if this user may not make one.
fn in_namespace(script: &str) -> Option<Output> {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-ec", script]).env("SELFCONN", binary());
        command.output()
    };
    if !unshare("ip link set lo up").is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: cannot make a network namespace here");
        return None;
    }
    Some(unshare(script).unwrap())
}

/// A process that is held open, and ended by the test whatever happens.
struct Held(Child);

impl Held {
    /// Starts it, and waits until it says that it holds the connection. What it says later can be read on.
    fn start(args: &[&str]) -> (Self, Value, impl Iterator<Item = Value>) {
        let mut child = repro(args).arg("--json").stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut steps = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let held = Self(child);
        let holding = steps.find(|step| step["event"] == "holding").expect("it never held the connection");
        (held, holding, steps)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn each_kind_of_loopback_address_connects_to_itself() {
    let rows = [
        ("127.0.0.1", "ipv4", "127.0.0.1"),
        ("127.0.0.2", "ipv4", "127.0.0.2"),
        ("::1", "ipv6", "::1"),
        ("::ffff:127.0.0.1", "ipv6", "127.0.0.1"),
    ];
    for (address, family, addr) in rows {
        let child =
            repro(&[address, "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let told = steps(&stdout(&child.wait_with_output().unwrap()));

        let names: Vec<_> = told.iter().map(|step| step["event"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["bound", "connected", "checked", "echoed", "closed", "after", "summary"],
            "{address}"
        );
        let checked = step(&told, "checked");
        assert_eq!(checked["local"], checked["remote"]);
        assert_eq!(checked["state"], "ESTABLISHED");
        let summary = step(&told, "summary");
        assert_eq!(summary["pid"], pid);
        assert_eq!(summary["comm"], "selfconn");
        assert_eq!(summary["cause"], "bound");
        assert_eq!(summary["family"], family, "{address}");
        assert_eq!(summary["addr"], addr, "{address}");
        assert_eq!(summary["how"], "fin");
    }
}

#[test]
fn the_port_stays_blocked_in_time_wait() {
    let told = steps(&stdout(&run(&["--json"])));
    let after = step(&told, "after");
    assert_eq!(after["state"], "TIME_WAIT");
    let left = Duration::from_nanos(after["port_blocked_ns"].as_u64().unwrap());
    assert!((Duration::from_secs(50)..=Duration::from_secs(60)).contains(&left), "{left:?}");
    assert_eq!((&after["bind"], &after["bind_reuseaddr"]), (&"EADDRINUSE".into(), &"EADDRINUSE".into()));

    // Not only by its own account: the standard library's listener has SO_REUSEADDR.
    let port = step(&told, "summary")["port"].as_u64().unwrap().try_into().unwrap();
    let error = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

    let again = self::error(&run(&["127.0.0.1", &port.to_string()]));
    assert!(again.contains("a TIME_WAIT has it for"), "{again}");
}

#[test]
fn a_named_port_is_the_port() {
    // A port that was free a moment ago may be somebody else's by now; ten in a row are not.
    let (port, output) = (0..10)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port())
        .map(|port| (port, run(&["127.0.0.1", &port.to_string(), "--json"])))
        .find(|(_, output)| output.status.success())
        .unwrap();
    let told = steps(&stdout(&output));
    assert_eq!(step(&told, "bound")["chosen_by_kernel"], false);
    assert_eq!(step(&told, "summary")["port"], port);
}

#[test]
fn the_story_is_numbered_and_ends_with_the_chart() {
    let story = stdout(&run(&[]));
    let mut rest = story.as_str();
    for next in [
        "1. bind",
        "2. connect",
        "3. look",
        "4. write",
        "5. read",
        "6. close",
        "7. look",
        "SYN_SENT ",
        "SYN_RECV ",
        "ESTABLISHED ",
        "FIN_WAIT1 ",
        "CLOSING ",
        "TIME_WAIT ",
        "ss -tK",
    ] {
        let at = rest.find(next).unwrap_or_else(|| panic!("no {next:?} in its place:\n{story}"));
        rest = &rest[at..];
    }
    assert!(story.lines().all(|line| line.chars().count() <= 80), "{story}");
    assert!(!story.contains('\x1b') && !story.contains('\r'), "{story:?}");
}

#[test]
fn the_accident_happens_on_the_default_range() {
    let told = steps(&stdout(&run(&["--mode", "retry", "--json"])));
    let (dialling, connected, summary) =
        (step(&told, "dialling"), step(&told, "connected"), step(&told, "summary"));
    assert_eq!(summary["cause"], "ephemeral");
    assert_eq!(summary["attempts"], connected["attempts"]);
    assert!(connected["attempts"].as_u64() <= dialling["limit"].as_u64());
    let (low, port) = (dialling["range"][0].as_u64().unwrap(), summary["port"].as_u64().unwrap());
    assert_eq!(port % 2, low % 2, "connect() chooses the low bound's parity");
}

#[test]
fn a_listener_is_named_and_left_alone() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let text = error(&run(&["127.0.0.1", &port]));
    assert!(text.contains(&format!("(pid {}) listens on it", std::process::id())), "{text}");
    // Dialled, the port may as well be refused for its parity.
    error(&run(&["127.0.0.1", &port, "--mode", "retry"]));
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "it was dialled");
}

#[test]
fn only_an_address_of_this_host_is_accepted() {
    for (address, want) in [
        ("198.51.100.7", "not an address of this host"),
        ("2001:db8::7", "not an address of this host"),
        ("fe80::dead:beef%lo", "not an address of this host"),
        ("0.0.0.0", "every address"),
        ("::", "every address"),
    ] {
        for mode in ["bind", "retry"] {
            let text = error(&run(&[address, "--mode", mode]));
            assert!(text.contains(want), "{address}: {text}");
        }
    }
}

#[test]
fn bad_arguments_end_with_code_2() {
    for args in [
        &["localhost"][..],
        &["55555"],
        &["127.0.0.1", "0"],
        &["127.0.0.1", "65536"],
        &["--mode", "luck"],
        &["--hold", "-1"],
        &["--hold", "nan"],
        &["--attempts", "0"],
        &["--attempts", "5"],
        &["--thread", ""],
        &["--frobnicate"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}

#[test]
fn a_signal_ends_the_hold_and_the_story_is_told_to_its_end() {
    for signal in [Signal::INT, Signal::TERM] {
        let (mut held, holding, rest) = Held::start(&["--hold", "600"]);
        // Held: nobody else can have the port.
        let port = holding["port"].as_u64().unwrap().try_into().unwrap();
        let error = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

        held.signal(signal);
        let rest: Vec<_> = rest.collect();
        assert_eq!(step(&rest, "closed")["how"], "fin");
        assert_eq!(step(&rest, "summary")["port"], port);
        assert!(held.0.wait().unwrap().success(), "{signal:?}");
    }
}

#[test]
fn the_hold_ends_when_its_time_is_up() {
    let begin = Instant::now();
    let told = steps(&stdout(&run(&["--hold", "0.3", "--json"])));
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert!(step(&told, "summary")["duration_ns"].as_u64() >= Some(300_000_000));
}

#[test]
fn a_thread_connects_under_its_own_name() {
    let told = steps(&stdout(&run(&["--thread", "worker-7", "--json"])));
    let summary = step(&told, "summary");
    assert_eq!((&summary["comm"], &summary["thread_comm"]), (&"selfconn".into(), &"worker-7".into()));
    assert_ne!(summary["pid"], summary["tid"]);
}

#[test]
fn a_thousand_in_a_row_are_a_thousand_ports() {
    let told = steps(&stdout(&run(&["--count", "1000", "--json"])));
    let ports: BTreeSet<_> =
        told.iter().filter(|step| step["event"] == "summary").map(|step| step["port"].as_u64()).collect();
    assert_eq!(ports.len(), 1000);
}

#[test]
fn a_closed_stdout_is_no_error() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut child = repro(&[]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!((child.wait().unwrap().code(), text.as_str()), (Some(0), ""));
}

#[test]
fn a_small_range_is_hit_soon() {
    let script = "ip link set lo up
                  echo 40000 40199 > /proc/sys/net/ipv4/ip_local_port_range
                  \"$SELFCONN\" repro --mode retry --json; \"$SELFCONN\" repro ::1 40100 --mode retry --json";
    let Some(output) = in_namespace(script) else { return };
    let told = steps(&stdout(&output));
    assert_eq!(step(&told, "dialling")["expected_dials"], 100);
    let ports: Vec<_> =
        told.iter().filter(|step| step["event"] == "summary").map(|step| &step["port"]).collect();
    assert_eq!(ports.len(), 2);
    assert!((40000..40200).contains(&ports[0].as_u64().unwrap()));
    assert_eq!(ports[1], 40100);
}

#[test]
fn a_port_that_no_dial_can_hit_is_refused_at_once() {
    // Longer than the first buffer of most readers, and 40150 is at its end.
    let reserved = (1..40).map(|port| port.to_string()).collect::<Vec<_>>().join(",");
    for (sysctls, args, want) in [
        ("", "127.0.0.1 40001", "chooses even ports"),
        ("", "127.0.0.1 39998", "outside of net.ipv4.ip_local_port_range, 40000-40199"),
        ("RESERVED,40150", "127.0.0.1 40150", "listed in net.ipv4.ip_local_reserved_ports"),
        ("40000-40199", "", "covers every port"),
        ("", "127.0.0.2", "leaves from 127.0.0.1"),
    ] {
        let reserve = sysctls.replace("RESERVED", &reserved);
        let script = format!(
            "ip link set lo up
             echo 40000 40199 > /proc/sys/net/ipv4/ip_local_port_range
             echo {reserve} > /proc/sys/net/ipv4/ip_local_reserved_ports
             exec \"$SELFCONN\" repro {args} --mode retry"
        );
        let Some(output) = in_namespace(&script) else { return };
        let text = error(&output);
        assert!(text.contains(want), "{args}: {text}");
    }
}

#[test]
fn a_local_address_that_is_not_loopback_connects_to_itself() {
    let script = "ip link set lo up
                  echo 40000 40199 > /proc/sys/net/ipv4/ip_local_port_range
                  ip address add 192.0.2.7/32 dev lo
                  ip -6 address add 2001:db8::7/128 dev lo nodad
                  for address in 192.0.2.7 2001:db8::7; do
                      for mode in bind retry; do \"$SELFCONN\" repro $address --mode $mode --json; done
                  done";
    let Some(output) = in_namespace(script) else { return };
    let told = steps(&stdout(&output));
    let summaries: Vec<_> = told
        .iter()
        .filter(|step| step["event"] == "summary")
        .map(|step| (step["addr"].as_str().unwrap(), step["cause"].as_str().unwrap()))
        .collect();
    let want = [
        ("192.0.2.7", "bound"),
        ("192.0.2.7", "ephemeral"),
        ("2001:db8::7", "bound"),
        ("2001:db8::7", "ephemeral"),
    ];
    assert_eq!(summaries, want);
}

#[test]
fn a_foreign_address_stays_foreign_where_any_can_be_bound() {
    let script = "ip link set lo up; ip address add 192.0.2.7/32 dev lo; ip route add 192.0.2.0/24 dev lo
                  echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind
                  \"$SELFCONN\" repro 192.0.2.7 > /dev/null
                  exec \"$SELFCONN\" repro 192.0.2.8";
    let Some(output) = in_namespace(script) else { return };
    let text = error(&output);
    assert!(text.contains("does not show as an address of this host"), "{text}");
}

#[test]
fn a_loopback_that_is_down_is_told_with_the_cure() {
    for address in ["127.0.0.1", "::1"] {
        let script = format!("exec \"$SELFCONN\" repro {address}");
        let Some(output) = in_namespace(&script) else { return };
        let text = error(&output);
        assert!(text.contains("ip link set lo up"), "{text}");
    }
}
