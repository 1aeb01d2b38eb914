//! A long run under mixed load: self-connections, long and short; storms of refused dials; ordinary connections;
//! namespaces that come and go; a log that is rotated under the daemon's hands; scrapes. At the end both sums hold,
//! everything that was made is in the log, and memory and descriptors are what they were.

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
    client::{connect_to_self, talk_to_self},
    daemon::{DEADLINE, selfconn},
    metrics,
    net::Net,
};

const HOME: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// What was made, counted by those who made it.
#[derive(Default)]
struct Made {
    is_over: AtomicBool,
    selves: AtomicU64,
    refused: AtomicU64,
    ordinary: AtomicU64,
    namespaces: AtomicU64,
    rotations: AtomicU64,
    scrapes: AtomicU64,
}

impl Made {
    /// Does this again and again until it is over, each time after a pause.
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

/// Self-connections that last a moment, by an orderly end and by a reset.
fn short_lives(made: &Made) {
    made.repeat(Duration::from_millis(100), || {
        for _ in 0..10 {
            talk_to_self(HOME.into());
            let (socket, _) = connect_to_self(HOME.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            made.selves.fetch_add(2, Relaxed);
        }
    });
}

/// Self-connections that the socket table is compared with some times.
fn long_lives(made: &Made) {
    made.repeat(Duration::from_millis(10), || {
        let held: Vec<_> = (0..50).map(|_| connect_to_self(HOME.into())).collect();
        made.selves.fetch_add(held.len() as u64, Relaxed);
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until && !made.is_over.load(Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    });
}

/// Dials of a closed port that no client is ever given, so that none of them hits itself.
fn storms(made: &Made) {
    made.repeat(Duration::from_secs(10), || {
        for _ in 0..5_000 {
            TcpStream::connect((HOME, 9)).unwrap_err();
            made.refused.fetch_add(1, Relaxed);
        }
    });
}

/// Connections between two sockets, of one address and of two.
fn ordinary(made: &Made) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    made.repeat(Duration::from_millis(100), || {
        for _ in 0..50 {
            for to in [HOME, Ipv4Addr::new(127, 0, 0, 2)] {
                let client = TcpStream::connect((to, port)).unwrap();
                // Ours goes first, or its port would stay taken.
                drop(listener.accept().unwrap());
                drop(client);
                made.ordinary.fetch_add(1, Relaxed);
            }
        }
    });
}

/// Namespaces that live as long as one self-connection in each.
fn namespaces(made: &Made) {
    made.repeat(Duration::from_secs(5), || {
        let batch: Vec<_> = (0..20)
            .map(|_| {
                thread::spawn(|| {
                    Net::private();
                    talk_to_self(HOME.into());
                })
            })
            .collect();
        for one in batch {
            one.join().unwrap();
            made.namespaces.fetch_add(1, Relaxed);
            made.selves.fetch_add(1, Relaxed);
        }
    });
}

/// What a file of the log has: events by their kind.
fn count(path: &Path, kinds: &mut BTreeMap<String, u64>) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{} is torn", path.display());
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        *kinds.entry(event["event"].as_str().unwrap().to_owned()).or_default() += 1;
    }
}

/// Moves the log away, by turns with and without a signal, and reads what was moved once it can't grow any more.
fn rotate(made: &Made, log: &Path, daemon: Pid, kinds: &mut BTreeMap<String, u64>) {
    let moved = |number: u64| log.with_extension(number.to_string());
    made.repeat(Duration::from_secs(15), || {
        let number = made.rotations.fetch_add(1, Relaxed);
        fs::rename(log, moved(number)).unwrap();
        if number.is_multiple_of(2) {
            kill_process(daemon, Signal::HUP).unwrap();
        }
        let until = Instant::now() + DEADLINE;
        while !log.exists() {
            assert!(Instant::now() < until, "the log is not opened anew");
            thread::sleep(Duration::from_millis(20));
        }
        if let Some(before) = number.checked_sub(1) {
            count(&moved(before), kinds);
            fs::remove_file(moved(before)).unwrap();
        }
    });
    if let Some(last) = made.rotations.load(Relaxed).checked_sub(1) {
        count(&moved(last), kinds);
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

/// What a process holds: its own memory, in KiB, and descriptors.
#[derive(Clone, Copy, Debug)]
struct Holds {
    anon_kib: u64,
    descriptors: u64,
}

impl Holds {
    fn now(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let anon = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let anon_kib = anon.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
        Self { anon_kib, descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64 }
    }
}

fn start(log: &Path, metrics: SocketAddr) -> Child {
    let mut command = Command::new(selfconn());
    command.args(["run", "--json", "--reconcile", "5", "--metrics", &metrics.to_string(), "--log"]).arg(log);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + DEADLINE;
    while !fs::read_to_string(log).is_ok_and(|text| text.contains("\"started\"")) {
        assert!(Instant::now() < until, "it did not start");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
#[ignore = "as long as SELFCONN_SOAK_SECONDS says: cargo xtask soak"]
fn soak() {
    let seconds: u64 = std::env::var("SELFCONN_SOAK_SECONDS").map_or(60, |text| text.parse().unwrap());
    Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log: PathBuf = folder.path().join("events.jsonl");
    let at = TcpListener::bind((HOME, 0)).unwrap().local_addr().unwrap();
    let mut child = start(&log, at);
    let (pid, made) = (child.id(), Made::default());
    let handle = Pid::from_child(&child);
    let (mut kinds, mut held, mut last_scrape) = (BTreeMap::new(), Vec::new(), String::new());
    let began = Instant::now();
    thread::scope(|scope| {
        let made = &made;
        for work in [short_lives, long_lives, storms, ordinary, namespaces] {
            scope.spawn(move || work(made));
        }
        scope.spawn(|| rotate(made, &log, handle, &mut kinds));
        while began.elapsed() < Duration::from_secs(seconds) {
            thread::sleep(Duration::from_secs(1).min(Duration::from_secs(seconds)));
            last_scrape = scrape(at);
            made.scrapes.fetch_add(1, Relaxed);
            held.push(Holds::now(pid));
        }
        made.is_over.store(true, Relaxed);
    });
    let (selves, refused) = (made.selves.load(Relaxed), made.refused.load(Relaxed));
    let until = Instant::now() + DEADLINE;
    while sample(&last_scrape, "selfconn_refused_self_dials_total") < refused
        || sample(&last_scrape, "selfconn_connections_open") > 0
    {
        assert!(Instant::now() < until, "{refused} refused dials are not told:\n{last_scrape}");
        thread::sleep(Duration::from_millis(100));
        last_scrape = scrape(at);
    }
    let last = Holds::now(pid);
    kill_process(handle, Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    count(&log, &mut kinds);

    let text = fs::read_to_string(&log).unwrap();
    let stopped: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let number = |key: &str| stopped.pointer(key).and_then(Value::as_u64).unwrap();
    let kind = |name: &str| kinds.get(name).copied().unwrap_or(0);
    // In the first quarter everything happens once. A burst may need more for a moment; what stays is looked for.
    let quarter = held.len() / 4;
    let usual = |part: &[Holds]| {
        let mut sizes: Vec<u64> = part.iter().map(|held| held.anon_kib).collect();
        sizes.sort_unstable();
        sizes[sizes.len() / 2]
    };
    let (early, late) = (usual(&held[quarter..2 * quarter]), usual(&held[3 * quarter..]));
    let most = held.iter().map(|held| held.anon_kib).max().unwrap();
    for (what, value) in [
        ("seconds", seconds),
        ("self-connections made", selves),
        ("`established`", kind("established")),
        ("`closed`", kind("closed")),
        ("refused dials made", refused),
        ("refused dials counted", sample(&last_scrape, "selfconn_refused_self_dials_total")),
        ("`at_risk`", kind("at_risk")),
        ("ordinary connections made", made.ordinary.load(Relaxed)),
        ("namespaces made and removed", made.namespaces.load(Relaxed)),
        ("rotations", made.rotations.load(Relaxed)),
        ("scrapes", made.scrapes.load(Relaxed)),
        ("records matched in the kernel", number("/matched")),
        ("records delivered", number("/delivered")),
        ("lost by the ring buffer", number("/lost/ring")),
        ("events made", number("/made")),
        ("events written", number("/written")),
        ("lines in the log", kinds.values().sum()),
        ("lost by the log", number("/lost/log")),
        ("missed, found by a reading", number("/lost/missed")),
        ("transitions not examined", stopped["not_examined"].as_u64().unwrap_or(0)),
        ("openers not remembered", number("/not_remembered")),
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
    assert_eq!(number("/made"), number("/written") + number("/lost/log"), "{stopped}");
    assert_eq!(number("/written"), kinds.values().sum::<u64>(), "{stopped}");
    assert_eq!(number("/lost/ring"), 0, "{stopped}");
    assert_eq!((kind("established"), kind("closed")), (selves, selves), "{stopped}");
    assert_eq!(sample(&last_scrape, "selfconn_refused_self_dials_total"), refused);
    assert!(made.rotations.load(Relaxed) > 1 && made.namespaces.load(Relaxed) > 0);
    assert!(late <= early + early / 10 + 256, "memory grows from {early} KiB to {late} KiB");
    assert!(last.descriptors <= held[0].descriptors + 2, "descriptors stay open: {last:?}, {:?}", held[0]);
}
