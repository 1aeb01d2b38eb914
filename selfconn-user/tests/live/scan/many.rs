//! As many as a busy host has: self-connections in many namespaces, and few among many ordinary sockets.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, ChildStdin, Command, Stdio},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{UnshareFlags, unshare_unsafe},
};
use socket2::SockRef;

use super::{METHODS, Scan};
use crate::{
    client::connect_to_self,
    daemon::{scaled, selfconn},
    net::Net,
};

const COUNT: &str = "SELFCONN_TEST_COUNT";

/// A process in a namespace of its own that holds many self-connections, until its stdin ends.
struct Crowd {
    child: Child,
    stdin: Option<ChildStdin>,
    net: Net,
}

impl Crowd {
    /// Leaves the calling thread in the same namespace, for a process starts in that of the thread that starts it.
    fn start(count: usize) -> Self {
        let net = Net::private();
        let mut child = Command::new("/proc/self/exe")
            .args(["--exact", "scan::many::holds_many", "--ignored", "--nocapture"])
            .env(COUNT, count.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(said.any(|line| line.contains("all are open")));
        Self { stdin: child.stdin.take(), net, child }
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
fn holds_many() {
    let Some(count) = std::env::var(COUNT).ok().and_then(|count| count.parse().ok()) else { return };
    let _sockets: Vec<_> = (0..count)
        .map(|_| {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            socket
        })
        .collect();
    let mut stdout = std::io::stdout();
    writeln!(stdout, "all are open").unwrap();
    stdout.flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

#[test]
fn ten_thousand_in_fifty_namespaces_all_have_their_namespace_and_holder() {
    let namespaces = scaled(50);
    let each = 200;
    let crowds: Vec<_> = (0..namespaces).map(|_| Crowd::start(each)).collect();
    for options in METHODS {
        let began = Instant::now();
        let scan = Scan::run(options);
        eprintln!("{} self-connections {options:?}: {:?}", scan.rows.len(), began.elapsed());
        let mut counts: HashMap<(u64, u64), usize> = HashMap::new();
        for row in &scan.rows {
            let key = (row["netns"].as_u64().unwrap(), row["pid"].as_u64().unwrap_or(0));
            *counts.entry(key).or_default() += 1;
        }
        for crowd in &crowds {
            let of_netns: Vec<_> =
                counts.iter().filter(|((netns, _), _)| *netns == crowd.net.inode).collect();
            assert_eq!(of_netns, [(&(crowd.net.inode, crowd.child.id().into()), &each)]);
        }
    }
}

/// Holds `count` ordinary sockets, both ends of half as many connections, while `work` is done. A process may have
/// fewer descriptors, so each of several threads has a table of its own.
fn among_ordinary_sockets(count: usize, work: impl FnOnce()) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let each = usize::try_from(maximum.unwrap_or(20_000).min(20_000)).unwrap() - 200;
    let hold = Barrier::new(count.div_ceil(each) + 1);
    thread::scope(|scope| {
        for from in (0..count).step_by(each) {
            let (hold, connections) = (&hold, each.min(count - from) / 2);
            scope.spawn(move || {
                // SAFETY: a table of descriptors of this thread's own; it uses none but those that it opens from here
                // on, and closes them itself.
                unsafe { unshare_unsafe(UnshareFlags::FILES) }.unwrap();
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                let server = listener.local_addr().unwrap();
                let connect = |_| {
                    let client = TcpStream::connect(server).unwrap();
                    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
                    (client, listener.accept().unwrap().0)
                };
                let connections: Vec<_> = (0..connections).map(connect).collect();
                hold.wait();
                hold.wait();
                drop(connections);
            });
        }
        hold.wait();
        work();
        hold.wait();
    });
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
    let count = scaled(100_000);
    among_ordinary_sockets(count, || {
        let connections = [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()];
        let mut connections: Vec<_> = connections.into_iter().map(connect_to_self).collect();
        connections.push(connect_to_self(std::net::Ipv6Addr::LOCALHOST.into()));
        for options in METHODS {
            assert_eq!(Scan::run(options).of_net(net).len(), 3, "{options:?}");
        }
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..7 {
            ours.extend(took(Command::new(selfconn()).arg("scan")));
            theirs.extend(took(Command::new("ss").arg("-tanH")));
        }
        if theirs.is_empty() {
            eprintln!("skipped: there is no ss here to compare with");
            return;
        }
        let (ours, theirs) = (median(ours), median(theirs));
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        eprintln!("{count} ordinary sockets: scan {ours:?}, ss -tanH {theirs:?}: {ratio:.2} of its time");
        assert!(ratio < 1.0, "scan {ours:?}, ss -tanH {theirs:?}");
    });
}
