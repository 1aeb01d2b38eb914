//! Runs `selfconn repro` with the real binary on the real kernel, and checks what remains afterwards. Needs
//! no privilege. The tests that need a separate network namespace create one, or print that they are skipped.

use std::{
    collections::BTreeSet,
    io::{self, BufRead as _, BufReader, Read as _},
    net::{Ipv4Addr, TcpListener},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    machine,
    support::{assert_one_line_error, binary, selfconn, unprivileged_selfconn},
};

fn repro(args: &[&str]) -> Command {
    let mut command = selfconn();
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

/// All steps in order.
fn steps(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn step<'a>(steps: &'a [Value], event: &str) -> &'a Value {
    steps.iter().find(|step| step["event"] == event).unwrap_or_else(|| panic!("no {event} in {steps:#?}"))
}

/// Runs a shell script in a new network namespace. In it `$SELFCONN` is the binary, and `lo` is down. `None`:
/// this user may not create a network namespace.
fn in_namespace(script: &str) -> Option<Output> {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-ec", script]).env("SELFCONN", binary());
        command.output()
    };
    if !unshare("ip link set lo up").is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: cannot create a network namespace here");
        return None;
    }
    Some(unshare(script).unwrap())
}

/// A `repro --hold` process. It is killed at the end of the test in any case.
struct HoldingRepro(Child);

impl HoldingRepro {
    /// Starts the process, and waits until it reports that it holds the connection. The iterator yields the
    /// later steps.
    fn start(args: &[&str]) -> (Self, Value, impl Iterator<Item = Value>) {
        let mut child = repro(args).arg("--json").stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut steps = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let repro = Self(child);
        let holding = steps.find(|step| step["event"] == "holding").expect("it never held the connection");
        (repro, holding, steps)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for HoldingRepro {
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
        let steps = steps(&stdout(&child.wait_with_output().unwrap()));

        let names: Vec<_> = steps.iter().map(|step| step["event"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["bound", "connected", "checked", "echoed", "closed", "after", "summary"],
            "{address}"
        );
        let checked = step(&steps, "checked");
        assert_eq!(checked["local"], checked["remote"]);
        assert_eq!(checked["state"], "ESTABLISHED");
        let summary = step(&steps, "summary");
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
    let steps = steps(&stdout(&run(&["--json"])));
    let after = step(&steps, "after");
    assert_eq!(after["state"], "TIME_WAIT");
    let left = Duration::from_nanos(after["port_blocked_ns"].as_u64().unwrap());
    assert!((Duration::from_secs(50)..=Duration::from_secs(60)).contains(&left), "{left:?}");
    assert_eq!((&after["bind"], &after["bind_reuseaddr"]), (&"EADDRINUSE".into(), &"EADDRINUSE".into()));

    // Checked independently: the listener of the standard library sets SO_REUSEADDR.
    let port = step(&steps, "summary")["port"].as_u64().unwrap().try_into().unwrap();
    let error = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

    assert_one_line_error(&run(&["127.0.0.1", &port.to_string()]), &["a socket in TIME_WAIT has it for"]);
}

#[test]
fn a_named_port_is_used() {
    // Another process can take a port that was free a moment ago, but not ten in a row.
    let (port, output) = (0..10)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port())
        .map(|port| (port, run(&["127.0.0.1", &port.to_string(), "--json"])))
        .find(|(_, output)| output.status.success())
        .unwrap();
    let steps = steps(&stdout(&output));
    assert_eq!(step(&steps, "bound")["chosen_by_kernel"], false);
    assert_eq!(step(&steps, "summary")["port"], port);
}

#[test]
fn the_text_has_numbered_steps_and_ends_with_the_chart() {
    let text = stdout(&run(&[]));
    let mut rest = text.as_str();
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
        let at = rest.find(next).unwrap_or_else(|| panic!("no {next:?} in its place:\n{text}"));
        rest = &rest[at..];
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(!text.contains('\x1b') && !text.contains('\r'), "{text:?}");
}

#[test]
fn the_accident_happens_on_the_default_range() {
    let steps = steps(&stdout(&run(&["--mode", "retry", "--json"])));
    let (connect_loop, connected, summary) =
        (step(&steps, "dialling"), step(&steps, "connected"), step(&steps, "summary"));
    assert_eq!(summary["cause"], "ephemeral");
    assert_eq!(summary["attempts"], connected["attempts"]);
    assert!(connected["attempts"].as_u64() <= connect_loop["limit"].as_u64());
    let (low, port) = (connect_loop["range"][0].as_u64().unwrap(), summary["port"].as_u64().unwrap());
    assert_eq!(port % 2, low % 2, "connect() chooses the low bound's parity");
}

#[test]
fn the_error_names_a_listener_and_does_not_connect_to_it() {
    // A process that another test starts would be a holder of the listener, too, until it calls exec.
    machine::occupy();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    assert_one_line_error(
        &run(&["127.0.0.1", &port]),
        &[&format!("(pid {}) listens on it", std::process::id())],
    );
    // In retry mode the port can also be rejected because of its parity.
    assert_one_line_error(&run(&["127.0.0.1", &port, "--mode", "retry"]), &[]);
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        io::ErrorKind::WouldBlock,
        "repro connected to the listener"
    );
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
            assert_one_line_error(&run(&[address, "--mode", mode]), &[want]);
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
fn a_signal_ends_the_hold_and_the_remaining_steps_follow() {
    for signal in [Signal::INT, Signal::TERM] {
        let (mut repro, holding, rest) = HoldingRepro::start(&["--hold", "600"]);
        // While the connection is held, no other socket can bind the port.
        let port = holding["port"].as_u64().unwrap().try_into().unwrap();
        let error = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

        repro.signal(signal);
        let rest: Vec<_> = rest.collect();
        assert_eq!(step(&rest, "closed")["how"], "fin");
        assert_eq!(step(&rest, "summary")["port"], port);
        assert!(repro.0.wait().unwrap().success(), "{signal:?}");
    }
}

#[test]
fn the_hold_ends_when_its_time_is_up() {
    let begin = Instant::now();
    let steps = steps(&stdout(&run(&["--hold", "0.3", "--json"])));
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert!(step(&steps, "summary")["duration_ns"].as_u64() >= Some(300_000_000));
}

#[test]
fn a_thread_connects_under_its_own_name() {
    let steps = steps(&stdout(&run(&["--thread", "worker-7", "--json"])));
    let summary = step(&steps, "summary");
    assert_eq!((&summary["comm"], &summary["thread_comm"]), (&"selfconn".into(), &"worker-7".into()));
    assert_ne!(summary["pid"], summary["tid"]);
}

#[test]
fn a_thousand_connections_use_a_thousand_ports() {
    let steps = steps(&stdout(&run(&["--count", "1000", "--json"])));
    let ports: BTreeSet<_> =
        steps.iter().filter(|step| step["event"] == "summary").map(|step| step["port"].as_u64()).collect();
    assert_eq!(ports.len(), 1000);
}

#[test]
fn a_closed_stdout_is_not_an_error() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut child = repro(&[]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!((child.wait().unwrap().code(), text.as_str()), (Some(0), ""));
}

#[test]
fn a_small_port_range_succeeds_quickly() {
    let script = "ip link set lo up
                  echo 40000 40199 > /proc/sys/net/ipv4/ip_local_port_range
                  \"$SELFCONN\" repro --mode retry --json; \"$SELFCONN\" repro ::1 40100 --mode retry --json";
    let Some(output) = in_namespace(script) else { return };
    let steps = steps(&stdout(&output));
    assert_eq!(step(&steps, "dialling")["expected_dials"], 100);
    let ports: Vec<_> =
        steps.iter().filter(|step| step["event"] == "summary").map(|step| &step["port"]).collect();
    assert_eq!(ports.len(), 2);
    assert!((40000..40200).contains(&ports[0].as_u64().unwrap()));
    assert_eq!(ports[1], 40100);
}

#[test]
fn a_port_that_cannot_self_connect_is_rejected_at_once() {
    // A list longer than the first buffer of most readers, with 40150 at its end.
    let reserved = (1..40).map(|port| port.to_string()).collect::<Vec<_>>().join(",");
    for (sysctls, args, want) in [
        ("", "127.0.0.1 40001", "chooses even ports"),
        ("", "127.0.0.1 39998", "outside of net.ipv4.ip_local_port_range, 40000-40199"),
        ("RESERVED,40150", "127.0.0.1 40150", "listed in net.ipv4.ip_local_reserved_ports"),
        ("40000-40199", "", "covers every port"),
        ("", "127.0.0.2", "source address 127.0.0.1"),
    ] {
        let reserve = sysctls.replace("RESERVED", &reserved);
        let script = format!(
            "ip link set lo up
             echo 40000 40199 > /proc/sys/net/ipv4/ip_local_port_range
             echo {reserve} > /proc/sys/net/ipv4/ip_local_reserved_ports
             exec \"$SELFCONN\" repro {args} --mode retry"
        );
        let Some(output) = in_namespace(&script) else { return };
        assert_one_line_error(&output, &[want]);
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
    let steps = steps(&stdout(&output));
    let summaries: Vec<_> = steps
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
fn a_foreign_address_is_rejected_although_ip_nonlocal_bind_allows_to_bind_it() {
    let script = "ip link set lo up; ip address add 192.0.2.7/32 dev lo; ip route add 192.0.2.0/24 dev lo
                  echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind
                  \"$SELFCONN\" repro 192.0.2.7 > /dev/null
                  exec \"$SELFCONN\" repro 192.0.2.8";
    let Some(output) = in_namespace(script) else { return };
    assert_one_line_error(&output, &["is not a known address of this host"]);
}

#[test]
fn the_error_for_a_loopback_that_is_down_has_a_hint() {
    for address in ["127.0.0.1", "::1"] {
        let script = format!("exec \"$SELFCONN\" repro {address}");
        let Some(output) = in_namespace(&script) else { return };
        assert_one_line_error(&output, &["ip link set lo up"]);
    }
}

/// The fields of a segment as a test compares them: kind, sequence and acknowledgement number, length.
fn fields(segments: &Value) -> Vec<(String, u64, Option<u64>, u64)> {
    let segments = segments.as_array().unwrap();
    let first = segments[0]["seq"].as_u64().unwrap();
    let relative = |number: u64| number.wrapping_sub(first) & u64::from(u32::MAX);
    let kind = |segment: &Value| {
        let flags = ["syn", "fin", "rst"].into_iter().filter(|flag| segment[*flag] == true);
        flags.collect::<Vec<_>>().join("+")
    };
    segments
        .iter()
        .map(|segment| {
            let ack = segment["ack"].as_u64().map(relative);
            (kind(segment), relative(segment["seq"].as_u64().unwrap()), ack, segment["len"].as_u64().unwrap())
        })
        .collect()
}

/// True if this user may open a packet socket, as root may.
fn may_capture() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: only root may capture");
    }
    is_root
}

#[test]
fn the_segments_are_captured_with_their_numbers() {
    if !may_capture() {
        return;
    }
    for options in [&["127.0.0.1"][..], &["::1"], &["::ffff:127.0.0.1"], &["--mode", "retry"]] {
        let steps = steps(&stdout(&run(&[options, &["--json"]].concat())));
        let summary = step(&steps, "summary");
        assert_eq!(summary["not_captured"], Value::Null, "{summary}");
        let segments = fields(&summary["segments"]);
        // A simultaneous open and a simultaneous close of one socket, with 24 bytes in between. The kernel can
        // send an ACK more or less.
        let is_ack = |segment: &&(String, u64, Option<u64>, u64)| !segment.0.is_empty() || segment.3 > 0;
        let without_acks: Vec<_> = segments.iter().filter(is_ack).cloned().collect();
        let row = |kind: &str, seq, ack, len| (kind.to_owned(), seq, ack, len);
        let expected = [
            row("syn", 0, None, 0),
            row("syn", 0, Some(1), 0),
            row("", 1, Some(1), 24),
            row("fin", 25, Some(25), 0),
        ];
        assert_eq!(without_acks, expected, "{segments:?}");
        assert_eq!(segments.last().unwrap(), &row("", 26, Some(26), 0), "{segments:?}");
        let times: Vec<_> = summary["segments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|is| is["time_ns"].as_u64().unwrap())
            .collect();
        assert!(times[0] == 0 && times.is_sorted() && times.last() > Some(&0), "{times:?}");
    }
    let text = stdout(&run(&[]));
    assert!(text.contains("The segments, captured on lo.") && text.contains("seq 25 ack 25"), "{text}");
}

#[test]
fn a_pcap_file_has_the_captured_segments_and_no_others() {
    if !may_capture() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("self.pcap");
    let path = path.to_str().unwrap();
    let steps = steps(&stdout(&run(&["--mode", "retry", "--json", "--pcap", path])));
    let summary = step(&steps, "summary");
    let file = std::fs::read(path).unwrap();
    let word = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
    // Magic number, version, longest packet, link type: raw IP.
    assert_eq!([word(0), word(4), word(16), word(20)], [0xa1b2_3c4d, 0x0002_0004, 262_144, 101]);
    let port = summary["port"].as_u64().unwrap() as u16;
    let (mut at, mut seqs) = (24, vec![]);
    while at < file.len() {
        let packet = &file[at + 16..at + 16 + word(at + 8) as usize];
        assert_eq!(word(at + 8), word(at + 12), "no packet is cut");
        assert_eq!((packet[0], packet[9], &packet[12..16]), (0x45, 6, &packet[16..20]));
        let half = |at: usize| u16::from_be_bytes(packet[at..at + 2].try_into().unwrap());
        assert_eq!([half(20), half(22)], [port, port]);
        assert_eq!(usize::from(half(2)), packet.len());
        seqs.push(u64::from(u32::from_be_bytes(packet[24..28].try_into().unwrap())));
        at += 16 + packet.len();
    }
    let segments = summary["segments"].as_array().unwrap();
    assert_eq!(seqs, segments.iter().map(|is| is["seq"].as_u64().unwrap()).collect::<Vec<_>>());
    // What reads such files, where it is installed.
    match Command::new("tcpdump").args(["-nn", "-r", path]).output() {
        Ok(output) => {
            let text = String::from_utf8(output.stdout).unwrap();
            assert_eq!(text.lines().count(), segments.len(), "{text}");
            let ends = format!("127.0.0.1.{port} > 127.0.0.1.{port}: Flags [S]");
            assert!(text.lines().next().unwrap().contains(&ends), "{text}");
        }
        Err(error) => eprintln!("not read by tcpdump: {error}"),
    }
}

#[test]
fn without_the_permission_to_capture_the_drawing_says_so_and_a_file_is_an_error() {
    let (directory, mut command) = unprivileged_selfconn();
    let text = stdout(&command.arg("repro").output().unwrap());
    let expected = "The segments, drawn from the rules of TCP. They were not captured:\n\
                    a packet socket needs CAP_NET_RAW";
    assert!(text.contains(expected) && text.contains("SYN_RECV "), "{text}");
    let path = directory.path().join("self.pcap");
    let (_directory, mut command) = unprivileged_selfconn();
    let output = command.args(["repro", "--pcap"]).arg(&path).output().unwrap();
    assert_one_line_error(&output, &["cannot capture the segments", "CAP_NET_RAW"]);
    assert!(output.stdout.is_empty() && !path.exists(), "{output:?}");
}

#[test]
fn an_attempt_that_fails_leaves_an_older_capture_and_makes_no_empty_one() {
    machine::occupy();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("older"), "a capture").unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    for name in ["older", "new"] {
        assert_one_line_error(&run(&["127.0.0.1", &port, "--pcap", &path(name)]), &[]);
    }
    assert_eq!(std::fs::read_to_string(path("older")).unwrap(), "a capture");
    assert!(!std::fs::exists(path("new")).unwrap());
    if may_capture() {
        for bad in [&*path("no/such/file"), directory.path().to_str().unwrap()] {
            let output = run(&["--pcap", bad]);
            assert_one_line_error(&output, &["cannot write", bad]);
            assert!(output.stdout.is_empty(), "nothing has happened: {output:?}");
        }
        // A longer file is replaced, not overwritten in part.
        std::fs::write(path("older"), [0; 100_000]).unwrap();
        for name in ["older", "new"] {
            assert!(run(&["--pcap", &path(name)]).status.success());
            let file = std::fs::read(path(name)).unwrap();
            assert!(
                file.starts_with(&[0xa1, 0xb2, 0x3c, 0x4d]) && (100..5_000).contains(&file.len()),
                "{name}"
            );
        }
    }
}
