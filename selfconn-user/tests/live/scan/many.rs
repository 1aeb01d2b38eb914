//! As many as a busy host has: self-connections in many namespaces, and few among many ordinary sockets.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{SockRef, Socket};

use super::{METHODS, Scan};
use crate::{
    client::connect_to_self,
    daemon::{scaled, selfconn},
    net::Net,
};

const CROWD: &str = "SELFCONN_TEST_CROWD";

/// A process in the namespace of the thread that starts it, which holds many sockets until its stdin ends.
struct Crowd {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Kept open, for the test harness writes on.
    _stdout: BufReader<ChildStdout>,
}

impl Crowd {
    fn start(kind: &str, sockets: usize) -> Self {
        let mut child = Command::new("/proc/self/exe")
            .args(["--exact", "scan::many::in_a_crowd", "--ignored", "--nocapture"])
            .env(CROWD, format!("{kind} {sockets}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let are_open =
            stdout.by_ref().lines().map_while(Result::ok).any(|line| line.contains("all are open"));
        assert!(are_open, "{kind} {sockets}: {}", child.wait().unwrap());
        Self { stdin: child.stdin.take(), _stdout: stdout, child }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
    }
}

/// Not a test: what a crowd does.
#[test]
#[ignore = "runs in processes that other tests start"]
fn in_a_crowd() {
    let Ok(crowd) = std::env::var(CROWD) else { return };
    let (kind, sockets) = crowd.split_once(' ').unwrap();
    let sockets: usize = sockets.parse().unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let sockets: Vec<Socket> = match kind {
        "selves" => (0..sockets).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into()).0).collect(),
        "ordinary" => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let server = listener.local_addr().unwrap();
            let connect = |_| [TcpStream::connect(server).unwrap(), listener.accept().unwrap().0];
            (0..sockets / 2).flat_map(connect).map(Socket::from).collect()
        }
        other => panic!("no crowd of {other}"),
    };
    for socket in &sockets {
        // No TIME_WAIT, which would use up the ports.
        SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "all are open").unwrap();
    stdout.flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

#[test]
fn ten_thousand_in_fifty_namespaces_all_have_their_namespace_and_holder() {
    let each = 200;
    let crowds: Vec<_> = (0..scaled(50)).map(|_| (Net::private(), Crowd::start("selves", each))).collect();
    for options in METHODS {
        let began = Instant::now();
        let scan = Scan::run(options);
        eprintln!("{} self-connections {options:?}: {:?}", scan.rows.len(), began.elapsed());
        let mut counts: HashMap<(u64, u64), usize> = HashMap::new();
        for row in &scan.rows {
            let key = (row["netns"].as_u64().unwrap(), row["pid"].as_u64().unwrap_or(0));
            *counts.entry(key).or_default() += 1;
        }
        for (net, crowd) in &crowds {
            let of_net: Vec<_> = counts.iter().filter(|((netns, _), _)| *netns == net.inode).collect();
            assert_eq!(of_net, [(&(net.inode, crowd.child.id().into()), &each)]);
        }
    }
}

fn took(command: &mut Command) -> Option<Duration> {
    let began = Instant::now();
    let status = command.stdout(Stdio::null()).status().ok()?;
    assert!(status.code().is_some_and(|code| code < 2), "{command:?}: {status}");
    Some(began.elapsed())
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort_unstable();
    of[of.len() / 2]
}

#[test]
fn three_among_a_hundred_thousand_are_found_sooner_than_ss_lists_them() {
    let net = Net::private();
    let (processes, each) = (10, scaled(10_000));
    let _crowds: Vec<_> = (0..processes).map(|_| Crowd::start("ordinary", each)).collect();
    let localhost = Ipv4Addr::LOCALHOST;
    let _selves = [localhost.into(), localhost.to_ipv6_mapped().into(), Ipv6Addr::LOCALHOST.into()]
        .map(connect_to_self);
    let pid = std::process::id();
    for options in [&[][..], &["--procfs"], &["--holders"]] {
        let scan = Scan::run(options);
        let rows = scan.of_net(net);
        assert_eq!(rows.len(), 3, "{options:?}");
        for row in rows {
            assert_eq!(row["pid"], pid);
            // Without --holders not every process is asked where so many files are open.
            let is_unknown = row["holders"].is_null() && options != ["--holders"];
            assert!(is_unknown || row["holders"].as_array().unwrap().len() == 1, "{options:?}: {row}");
        }
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        ours.extend(took(Command::new(selfconn()).arg("scan")));
        theirs.extend(took(Command::new("ss").arg("-tanH")));
    }
    if theirs.is_empty() {
        eprintln!("skipped: there is no ss here to compare with");
        return;
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    eprintln!("{} ordinary sockets: scan {ours:?}, ss -tanH {theirs:?}, ratio {ratio:.2}", processes * each);
    assert!(ratio < 1.0, "scan {ours:?}, ss -tanH {theirs:?}");
}
