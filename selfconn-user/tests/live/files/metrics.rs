//! The port of `--metrics`: what it serves, and that no client of it can harm the daemon.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, Signal};

use crate::support::{
    client::{connect_to_self, connect_until_self, run_self_connection},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, selfconn},
    netns::TestNetns,
    nobody::Nobody,
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

/// A port that was free a moment ago, in a namespace where nothing else takes ports.
pub(super) fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn start_with_metrics(variant: &HookVariant, options: &[&str]) -> (TestDaemon, SocketAddr) {
    let at = free_port();
    let daemon = TestDaemon::start(variant, &[&["--metrics", &at.to_string()], options].concat());
    (daemon, at)
}

/// Sends a request and returns the whole response.
fn send_request(at: SocketAddr, words: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(words.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

pub(crate) fn get(at: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let answer = send_request(at, &format!("GET {path} HTTP/1.1\r\nHost: {at}\r\n\r\n"))?;
    let status =
        answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    status.zip(body).ok_or_else(|| io::Error::other(format!("{answer:?}")))
}

/// The value of a sample.
pub(crate) fn sample(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Scrapes until a sample has at least this value, because a response may be slightly out of date. Returns
/// the last response.
#[track_caller]
fn scrape_until(at: SocketAddr, name: &str, value: u64) -> String {
    let until = Instant::now() + DEADLINE;
    loop {
        let (status, text) = get(at, "/metrics").unwrap();
        assert_eq!(status, 200, "{text}");
        if sample(&text, name).is_some_and(|reported| reported >= value) {
            return text;
        }
        assert!(Instant::now() < until, "{name} stays below {value}:\n{text}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn sample_value(at: SocketAddr, name: &str) -> u64 {
    sample(&get(at, "/metrics").unwrap().1, name).unwrap()
}

#[test]
fn self_connections_are_counted_by_cause_and_as_open() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    for_each_variant_retrying(PREEMPTED, |variant| {
        let (mut daemon, at) = start_with_metrics(variant, &[]);
        let text = scrape_until(at, "selfconn_healthy", 1);
        for name in ["hook_info{hook=", "build_info{version=", "events_lost_total{where=\"ring\"} 0"] {
            assert!(text.contains(&format!("selfconn_{name}")), "{name}: {text}");
        }
        // The daemon sees every namespace, and other tests make self-connections meanwhile.
        let of_cause = |cause| format!("selfconn_connections_total{{cause=\"{cause}\"}}");
        let [bound, ephemeral] = ["bound", "ephemeral"].map(|cause| sample_value(at, &of_cause(cause)));
        let (held, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        let accident = connect_until_self((Ipv4Addr::LOCALHOST, 40_100).into(), 100_000).unwrap();
        accident.set_linger(Some(Duration::ZERO)).unwrap();
        for event in daemon.try_expect(2, is_event("established", net.inode))? {
            Missed::if_opener_unseen(&event)?;
        }
        scrape_until(at, &of_cause("bound"), bound + 1);
        scrape_until(at, &of_cause("ephemeral"), ephemeral + 1);
        scrape_until(at, "selfconn_connections_open", 2);
        drop((held, accident));
        daemon.try_expect(2, is_event("closed", net.inode))?;
        daemon.stop();
        Ok(())
    });
}

#[test]
fn ring_buffer_losses_are_counted_in_the_metrics() {
    let net = TestNetns::enter_new();
    let (mut daemon, at) = start_with_metrics(&HookVariant(vec![]), &["--ring-size", "4K"]);
    daemon.signal(Signal::STOP);
    for _ in 0..50 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    daemon.signal(Signal::CONT);
    daemon.expect(1, is_event("established", net.inode));
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "ring").remove(0);
    scrape_until(at, "selfconn_events_lost_total{where=\"ring\"}", lost["count"].as_u64().unwrap());
    daemon.stop();
}

/// Polls /healthz until the response matches.
#[track_caller]
fn wait_for_health(at: SocketAddr, status: u16, body: &str) {
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
fn health_is_reported_by_the_status_code_and_recovers() {
    let net = TestNetns::enter_new();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("events.jsonl");
    let (mut daemon, at) = start_with_metrics(&HookVariant(vec![]), &["--log", log.to_str().unwrap()]);
    wait_for_health(at, 200, "ok\n");
    assert_eq!(sample_value(at, "selfconn_log_write_errors_total"), 0);
    // From now on no file can grow.
    let limit = |current| {
        let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed());
        rustix::process::prlimit(pid, Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
    };
    limit(Some(0));
    run_self_connection(Ipv4Addr::LOCALHOST.into());
    wait_for_health(at, 503, "log: it can't be written\n");
    let text = scrape_until(at, "selfconn_log_write_errors_total", 1);
    assert_eq!(sample(&text, "selfconn_healthy"), Some(0), "{text}");
    limit(None);
    wait_for_health(at, 200, "ok\n");
    scrape_until(at, "selfconn_healthy", 1);
    daemon.expect(1, is_event("closed", net.inode));
    daemon.stop();
}

#[test]
fn only_known_paths_are_served_and_only_for_reading() {
    let _net = TestNetns::enter_new();
    let (daemon, at) = start_with_metrics(&HookVariant(vec![]), &[]);
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
        let answer = send_request(at, words).unwrap();
        assert!(answer.starts_with(status), "the response to {words:?} is {answer:?}");
        assert_eq!(answer.contains("allow: GET, HEAD"), status.ends_with("405"), "{answer:?}");
        assert!(!answer.contains("root:"), "{answer:?}");
    }
    let head = send_request(at, "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head:?}");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head:?}");
    // A request that is too long is rejected before it is read completely.
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    assert!(
        send_request(at, &long).is_ok_and(|answer| answer.starts_with("HTTP/1.1 431"))
            || send_request(at, &long).is_err()
    );
    daemon.stop();
}

#[test]
fn hostile_clients_block_neither_events_nor_scrapes() {
    let net = TestNetns::enter_new();
    let (mut daemon, at) = start_with_metrics(&HookVariant(vec![]), &["--ring-size", "32M"]);
    let is_over = AtomicBool::new(false);
    let made = 2_000;
    thread::scope(|scope| {
        // A thread starts in the network namespace of its parent.
        let idle: Vec<_> = (0..1_000).filter_map(|_| TcpStream::connect(at).ok()).collect();
        assert_eq!(idle.len(), 1_000, "all of them are accepted");
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = send_request(at, "\0\u{1}\u{2} junk\r\n\r\n");
            }
        });
        scope.spawn(|| {
            // Slowloris: a few bytes now and then, and always one more header.
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
        daemon.expect(made, is_event("closed", net.inode));
        scrape_until(at, "selfconn_healthy", 1);
        is_over.store(true, Ordering::Relaxed);
        drop(idle);
    });
    let (events, _) = daemon.stop();
    let lost = &events.last().unwrap()["lost"];
    assert_eq!((&lost["ring"], &lost["missed"]), (&0.into(), &0.into()), "{lost}");
}

#[test]
fn a_user_who_connects_thousands_of_times_a_second_keeps_no_scrape_out() {
    const SCRAPES: u32 = 20;
    const MOST: Duration = Duration::from_secs(2);
    let _net = TestNetns::enter_new();
    let (daemon, at) = start_with_metrics(&HookVariant(vec![]), &[]);
    let mut flood = Nobody::flooding(at);
    flood.wait();
    let mut longest = Duration::ZERO;
    for number in 0..SCRAPES {
        let began = Instant::now();
        let status = get(at, ["/metrics", "/healthz"][number as usize % 2]).map(|(status, _)| status);
        let took = began.elapsed();
        assert!(
            status.as_ref().is_ok_and(|status| *status == 200) && took < MOST,
            "{status:?} after {took:?}"
        );
        longest = longest.max(took);
    }
    println!("FACT metrics_flood longest_ms={}", longest.as_millis());
    drop(flood);
    daemon.stop();
}

#[test]
fn an_occupied_metrics_port_is_an_error_before_anything_is_attached() {
    let _net = TestNetns::enter_new();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let at = taken.local_addr().unwrap();
    let output =
        Command::new(selfconn()).args(["run", "--json", "--metrics", &at.to_string()]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty(), "nothing has started");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains(&format!("cannot serve metrics on {at}: ")) && stderr.contains("another port"),
        "{stderr}"
    );
}
