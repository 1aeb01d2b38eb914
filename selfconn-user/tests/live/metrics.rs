//! The port of `--metrics`: what it tells, to whom, and that nobody who reaches it can harm the tracer.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, Signal};

use crate::{
    client::{connect_to_self, dial_until_self, talk_to_self},
    daemon::{DEADLINE, Daemon, Variant, for_each_variant, of, selfconn},
    net::Net,
};

/// A port that was free a moment ago, in a namespace where nobody else takes one.
fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn watched(variant: &Variant, options: &[&str]) -> (Daemon, SocketAddr) {
    let at = free_port();
    let daemon = Daemon::start(variant, &[&["--metrics", &at.to_string()], options].concat());
    (daemon, at)
}

/// Sends this, and reads until the end. Everything that comes back.
fn say(at: SocketAddr, words: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(words.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

pub(crate) fn get(at: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let answer = say(at, &format!("GET {path} HTTP/1.1\r\nHost: {at}\r\n\r\n"))?;
    let status =
        answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    status.zip(body).ok_or_else(|| io::Error::other(format!("{answer:?}")))
}

/// A sample's value.
pub(crate) fn sample(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Scrapes until a sample has at least this value. An answer may be some moments old.
#[track_caller]
fn until(at: SocketAddr, name: &str, value: u64) -> String {
    let until = Instant::now() + DEADLINE;
    loop {
        let (status, text) = get(at, "/metrics").unwrap();
        assert_eq!(status, 200, "{text}");
        if sample(&text, name).is_some_and(|told| told >= value) {
            return text;
        }
        assert!(Instant::now() < until, "{name} stays below {value}:\n{text}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn value(at: SocketAddr, name: &str) -> u64 {
    sample(&get(at, "/metrics").unwrap().1, name).unwrap()
}

#[test]
fn self_connections_are_counted_by_cause_while_they_last() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", "40000 40199");
    for_each_variant(|variant| {
        let (mut daemon, at) = watched(variant, &[]);
        let text = until(at, "selfconn_healthy", 1);
        for name in ["hook_info{hook=", "build_info{version=", "events_lost_total{where=\"ring\"} 0"] {
            assert!(text.contains(&format!("selfconn_{name}")), "{name}: {text}");
        }
        // Other tests make some meanwhile; the daemon sees every namespace.
        let of_cause = |cause| format!("selfconn_connections_total{{cause=\"{cause}\"}}");
        let [bound, ephemeral] = ["bound", "ephemeral"].map(|cause| value(at, &of_cause(cause)));
        let (held, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        let accident = dial_until_self((Ipv4Addr::LOCALHOST, 40_100).into(), 100_000).unwrap();
        daemon.expect(2, of("established", net.inode));
        until(at, &of_cause("bound"), bound + 1);
        until(at, &of_cause("ephemeral"), ephemeral + 1);
        until(at, "selfconn_connections_open", 2);
        accident.set_linger(Some(Duration::ZERO)).unwrap();
        drop((held, accident));
        daemon.expect(2, of("closed", net.inode));
        daemon.stop();
    });
}

#[test]
fn what_the_ring_lost_is_counted_there_too() {
    let net = Net::private();
    let (mut daemon, at) = watched(&Variant(vec![]), &["--ring-size", "4K"]);
    daemon.signal(Signal::STOP);
    for _ in 0..50 {
        talk_to_self(Ipv4Addr::LOCALHOST.into());
    }
    daemon.signal(Signal::CONT);
    daemon.expect(1, of("established", net.inode));
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "ring").remove(0);
    until(at, "selfconn_events_lost_total{where=\"ring\"}", lost["count"].as_u64().unwrap());
    daemon.stop();
}

/// Asks until this is the answer.
#[track_caller]
fn until_health(at: SocketAddr, status: u16, body: &str) {
    let until = Instant::now() + DEADLINE;
    loop {
        let answer = get(at, "/healthz").unwrap();
        if (answer.0, answer.1.as_str()) == (status, body) {
            return;
        }
        assert!(Instant::now() < until, "{answer:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn health_is_told_by_the_status_and_comes_back() {
    let net = Net::private();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("events.jsonl");
    let (mut daemon, at) = watched(&Variant(vec![]), &["--log", log.to_str().unwrap()]);
    until_health(at, 200, "ok\n");
    assert_eq!(value(at, "selfconn_log_write_errors_total"), 0);
    // No file may become any larger.
    let limit = |current| {
        let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed());
        rustix::process::prlimit(pid, Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
    };
    limit(Some(0));
    talk_to_self(Ipv4Addr::LOCALHOST.into());
    until_health(at, 503, "log: it can't be written\n");
    let text = until(at, "selfconn_log_write_errors_total", 1);
    assert_eq!(sample(&text, "selfconn_healthy"), Some(0), "{text}");
    limit(None);
    until_health(at, 200, "ok\n");
    until(at, "selfconn_healthy", 1);
    daemon.expect(1, of("closed", net.inode));
    daemon.stop();
}

#[test]
fn only_what_is_there_can_be_had_and_only_read() {
    let _net = Net::private();
    let (daemon, at) = watched(&Variant(vec![]), &[]);
    for (words, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200"),
        ("GET /metrics HTTP/1.0\r\n\r\n", "HTTP/1.0 200"),
        ("GET /metrics?debug=1 HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200"),
        ("GET /etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404"),
        ("GET /metrics/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 405"),
        ("DELETE /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 405"),
        ("junk\r\n\r\n", "HTTP/1.1 400"),
        ("GET /metrics HTTP/9.9\r\n\r\n", "HTTP/1.1 400"),
    ] {
        let answer = say(at, words).unwrap();
        assert!(answer.starts_with(status), "{words:?} is answered by {answer:?}");
        assert_eq!(answer.contains("allow: GET, HEAD"), status.ends_with("405"), "{answer:?}");
        assert!(!answer.contains("root:"), "{answer:?}");
    }
    let head = say(at, "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head:?}");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head:?}");
    // A request that is too long is refused before it is read.
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    assert!(say(at, &long).is_ok_and(|answer| answer.starts_with("HTTP/1.1 431")) || say(at, &long).is_err());
    daemon.stop();
}

#[test]
fn hostile_clients_keep_nothing_from_being_told_or_scraped() {
    let net = Net::private();
    let (mut daemon, at) = watched(&Variant(vec![]), &["--ring-size", "32M"]);
    let is_over = AtomicBool::new(false);
    let made = 2_000;
    thread::scope(|scope| {
        // A thread starts in its parent's namespace.
        let idle: Vec<_> = (0..1_000).filter_map(|_| TcpStream::connect(at).ok()).collect();
        assert_eq!(idle.len(), 1_000, "all of them get in");
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = say(at, "\0\u{1}\u{2} junk\r\n\r\n");
            }
        });
        scope.spawn(|| {
            // Slowloris: a byte now and then, and always one more header.
            let mut slow: Vec<TcpStream> = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                slow.retain_mut(|stream| stream.write_all(b"X: y\r\n").is_ok());
                if slow.len() < 50
                    && let Ok(mut stream) = TcpStream::connect(at)
                    && stream.write_all(b"GET /metrics HTTP/1.1\r\n").is_ok()
                {
                    slow.push(stream);
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        for number in 0..made {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            drop(socket);
            if number % 200 == 0 {
                let (status, text) = get(at, "/metrics").unwrap();
                assert_eq!(status, 200, "{text}");
            }
        }
        daemon.expect(made, of("closed", net.inode));
        until(at, "selfconn_healthy", 1);
        is_over.store(true, Ordering::Relaxed);
        drop(idle);
    });
    let (events, _) = daemon.stop();
    let lost = &events.last().unwrap()["lost"];
    assert_eq!((&lost["ring"], &lost["missed"]), (&0.into(), &0.into()), "{lost}");
}

#[test]
fn a_port_that_is_taken_is_said_before_anything_is_attached() {
    let _net = Net::private();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let at = taken.local_addr().unwrap();
    let output =
        Command::new(selfconn()).args(["run", "--json", "--metrics", &at.to_string()]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty(), "nothing has started");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains(&format!("cannot serve metrics on {at}: ")) && said.contains("another port"),
        "{said}"
    );
}
