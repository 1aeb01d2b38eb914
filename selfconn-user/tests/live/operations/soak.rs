//! A long run under mixed load: self-connections, long and short; floods of refused connects; ordinary
//! connections; namespaces that are created and removed; a log that is rotated during the run; scrapes. At
//! the end both sums must hold, every event must be in the log, and memory and descriptors must be back at
//! their earlier values.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    files::metrics,
    support::{
        client::{connect_to_self, run_self_connection},
        daemon::{DEADLINE, selfconn},
        netns::TestNetns,
    },
};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// The load that was generated, counted by the threads that generated it.
#[derive(Default)]
struct Workload {
    is_over: AtomicBool,
    self_connections: AtomicU64,
    refused: AtomicU64,
    ordinary: AtomicU64,
    namespaces: AtomicU64,
    rotations: AtomicU64,
    scrapes: AtomicU64,
}

impl Workload {
    /// Repeats `work` until the run is over, with a pause after each time.
    fn repeat(&self, pause: Duration, mut work: impl FnMut()) {
        while !self.is_over.load(Relaxed) {
            work();
            let until = Instant::now() + pause;
            while Instant::now() < until && !self.is_over.load(Relaxed) {
                thread::sleep(pause.min(Duration::from_millis(50)));
            }
        }
    }
}

/// Short self-connections, closed in order and by a reset.
fn short_connections(workload: &Workload) {
    workload.repeat(Duration::from_millis(100), || {
        for _ in 0..10 {
            run_self_connection(LOCALHOST.into());
            let (socket, _) = connect_to_self(LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            workload.self_connections.fetch_add(2, Relaxed);
        }
    });
}

/// Self-connections that live through several snapshots of the socket table.
fn long_connections(workload: &Workload) {
    workload.repeat(Duration::from_millis(10), || {
        let held: Vec<_> = (0..50).map(|_| connect_to_self(LOCALHOST.into())).collect();
        workload.self_connections.fetch_add(held.len() as u64, Relaxed);
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until && !workload.is_over.load(Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    });
}

/// Connects to a closed port outside the ephemeral range, so that none of them hits itself.
fn refused_connects(workload: &Workload) {
    workload.repeat(Duration::from_secs(10), || {
        for _ in 0..5_000 {
            TcpStream::connect((LOCALHOST, 9)).unwrap_err();
            workload.refused.fetch_add(1, Relaxed);
        }
    });
}

/// Connections between two sockets, with equal and with different addresses.
fn ordinary(workload: &Workload) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    workload.repeat(Duration::from_millis(100), || {
        for _ in 0..50 {
            for to in [LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)] {
                let client = TcpStream::connect((to, port)).unwrap();
                // The accepting side closes first, because TIME_WAIT would otherwise occupy the client port.
                drop(listener.accept().unwrap());
                drop(client);
                workload.ordinary.fetch_add(1, Relaxed);
            }
        }
    });
}

/// Namespaces that live as long as the one self-connection in each.
fn namespaces(workload: &Workload) {
    workload.repeat(Duration::from_secs(5), || {
        let batch: Vec<_> = (0..20)
            .map(|_| {
                thread::spawn(|| {
                    TestNetns::enter_new();
                    run_self_connection(LOCALHOST.into());
                })
            })
            .collect();
        for one in batch {
            one.join().unwrap();
            workload.namespaces.fetch_add(1, Relaxed);
            workload.self_connections.fetch_add(1, Relaxed);
        }
    });
}

/// Counts the events in a log file by kind.
fn count_events(path: &Path, event_counts: &mut BTreeMap<String, u64>) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends with a partial line", path.display());
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        *event_counts.entry(event["event"].as_str().unwrap().to_owned()).or_default() += 1;
    }
}

/// Moves the log away, alternately with and without SIGHUP, and counts a moved file when it can no longer
/// grow.
fn rotate(workload: &Workload, log: &Path, daemon: Pid, event_counts: &mut BTreeMap<String, u64>) {
    let moved = |number: u64| log.with_extension(number.to_string());
    workload.repeat(Duration::from_secs(15), || {
        let number = workload.rotations.fetch_add(1, Relaxed);
        fs::rename(log, moved(number)).unwrap();
        if number.is_multiple_of(2) {
            kill_process(daemon, Signal::HUP).unwrap();
        }
        let until = Instant::now() + DEADLINE;
        while !log.exists() {
            assert!(Instant::now() < until, "the log is not reopened");
            thread::sleep(Duration::from_millis(20));
        }
        if let Some(before) = number.checked_sub(1) {
            count_events(&moved(before), event_counts);
            fs::remove_file(moved(before)).unwrap();
        }
    });
    if let Some(last) = workload.rotations.load(Relaxed).checked_sub(1) {
        count_events(&moved(last), event_counts);
    }
}

fn scrape(at: SocketAddr) -> String {
    let (status, text) = metrics::get(at, "/metrics").unwrap();
    assert_eq!(status, 200, "{text}");
    text
}

fn sample(text: &str, name: &str) -> u64 {
    metrics::sample(text, name).unwrap_or_else(|| panic!("{name} in {text}"))
}

/// The memory (RssAnon, in KiB) and descriptors of a process.
#[derive(Clone, Copy, Debug)]
struct ResourceUsage {
    anon_kib: u64,
    descriptors: u64,
}

impl ResourceUsage {
    fn now(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let anon = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let anon_kib = anon.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
        Self { anon_kib, descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64 }
    }
}

fn start(log: &Path, metrics: SocketAddr) -> Child {
    let mut command = Command::new(selfconn());
    command.args(["run", "--json", "--reconcile", "5", "--log-rate", "4294967295"]);
    command.args(["--metrics", &metrics.to_string(), "--log"]).arg(log);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + DEADLINE;
    while !fs::read_to_string(log).is_ok_and(|text| text.contains("\"started\"")) {
        assert!(Instant::now() < until, "the daemon did not start");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
#[ignore = "runs for SELFCONN_SOAK_SECONDS: docs/soak.md"]
fn soak() {
    let seconds: u64 = std::env::var("SELFCONN_SOAK_SECONDS").map_or(60, |text| text.parse().unwrap());
    TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log: PathBuf = folder.path().join("events.jsonl");
    let at = TcpListener::bind((LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let mut child = start(&log, at);
    let (pid, workload) = (child.id(), Workload::default());
    let handle = Pid::from_child(&child);
    let (mut event_counts, mut held, mut last_scrape) = (BTreeMap::new(), Vec::new(), String::new());
    let began = Instant::now();
    thread::scope(|scope| {
        let workload = &workload;
        for work in [short_connections, long_connections, refused_connects, ordinary, namespaces] {
            scope.spawn(move || work(workload));
        }
        scope.spawn(|| rotate(workload, &log, handle, &mut event_counts));
        while began.elapsed() < Duration::from_secs(seconds) {
            thread::sleep(Duration::from_secs(1).min(Duration::from_secs(seconds)));
            last_scrape = scrape(at);
            workload.scrapes.fetch_add(1, Relaxed);
            held.push(ResourceUsage::now(pid));
        }
        workload.is_over.store(true, Relaxed);
    });
    let (self_connections, refused) =
        (workload.self_connections.load(Relaxed), workload.refused.load(Relaxed));
    let until = Instant::now() + DEADLINE;
    while sample(&last_scrape, "selfconn_refused_self_dials_total") < refused
        || sample(&last_scrape, "selfconn_connections_open") > 0
    {
        assert!(Instant::now() < until, "{refused} refused connects are not counted:\n{last_scrape}");
        thread::sleep(Duration::from_millis(100));
        last_scrape = scrape(at);
    }
    let last = ResourceUsage::now(pid);
    kill_process(handle, Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    count_events(&log, &mut event_counts);

    let text = fs::read_to_string(&log).unwrap();
    let stopped: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let number = |key: &str| stopped.pointer(key).and_then(Value::as_u64).unwrap();
    let kind = |name: &str| event_counts.get(name).copied().unwrap_or(0);
    // In the first quarter of the run everything happens once. A burst may need more memory for a moment; the
    // test looks for growth that stays.
    let quarter = held.len() / 4;
    let median_kib = |part: &[ResourceUsage]| {
        let mut sizes: Vec<u64> = part.iter().map(|held| held.anon_kib).collect();
        sizes.sort_unstable();
        sizes[sizes.len() / 2]
    };
    let (early, late) = (median_kib(&held[quarter..2 * quarter]), median_kib(&held[3 * quarter..]));
    let most = held.iter().map(|held| held.anon_kib).max().unwrap();
    for (what, value) in [
        ("seconds", seconds),
        ("self-connections made", self_connections),
        ("`established`", kind("established")),
        ("`closed`", kind("closed")),
        ("refused connects made", refused),
        ("refused connects counted", sample(&last_scrape, "selfconn_refused_self_dials_total")),
        ("`at_risk`", kind("at_risk")),
        ("ordinary connections made", workload.ordinary.load(Relaxed)),
        ("namespaces made and removed", workload.namespaces.load(Relaxed)),
        ("rotations", workload.rotations.load(Relaxed)),
        ("scrapes", workload.scrapes.load(Relaxed)),
        ("records matched in the kernel", number("/matched")),
        ("records delivered", number("/delivered")),
        ("lost by the ring buffer", number("/lost/ring")),
        ("events made", number("/made")),
        ("events written", number("/written")),
        ("lines in the log", event_counts.values().sum()),
        ("lost by the log", number("/lost/log")),
        ("missed, found by a snapshot", number("/lost/missed")),
        ("transitions not examined", stopped["not_examined"].as_u64().unwrap_or(0)),
        ("openers not recorded", number("/not_remembered")),
        ("own memory, median of the second quarter (KiB)", early),
        ("own memory, median of the last quarter (KiB)", late),
        ("own memory, at most (KiB)", most),
        ("own memory at the end (KiB)", last.anon_kib),
        ("descriptors at first", held[0].descriptors),
        ("descriptors at the end", last.descriptors),
    ] {
        println!("REPORT {what}={value}");
    }
    assert_eq!(number("/matched"), number("/delivered") + number("/lost/ring"), "{stopped}");
    assert_eq!(
        number("/made"),
        number("/written") + number("/lost/log") + number("/lost/suppressed"),
        "{stopped}"
    );
    assert_eq!(number("/written"), event_counts.values().sum::<u64>(), "{stopped}");
    assert_eq!(number("/lost/ring"), 0, "{stopped}");
    assert_eq!((kind("established"), kind("closed")), (self_connections, self_connections), "{stopped}");
    assert_eq!(sample(&last_scrape, "selfconn_refused_self_dials_total"), refused);
    assert!(workload.rotations.load(Relaxed) > 1 && workload.namespaces.load(Relaxed) > 0);
    assert!(late <= early + early / 10 + 256, "memory grows from {early} KiB to {late} KiB");
    assert!(last.descriptors <= held[0].descriptors + 2, "descriptors stay open: {last:?}, {:?}", held[0]);
}
