//! Network namespaces: which ones exist, by the kernel's own list, and that the connections of one that has ended
//! end with it, although nobody saw their close.

use std::{
    collections::HashMap,
    fs::{self, File},
    net::Ipv4Addr,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use selfconn::bpf::{
    features::KernelFeatures,
    namespaces::{self, NamespaceIter},
};
use serde_json::Value;
use socket2::Socket;

use crate::support::{
    client::connect_to_self,
    daemon::{DEADLINE, HookVariant, TestDaemon, doctor, is_event, scaled, selfconn},
    helper_process::send_fd,
    netns::TestNetns,
    pid_namespace::spawn_in_new_pid_namespace,
};

/// True if this kernel's namespaces can be listed: not under lockdown=confidentiality.
pub(crate) fn lists_namespaces() -> bool {
    doctor()["namespaces"][0]["verdict"] == "ok"
}

/// The iterator, if this kernel has it.
pub(crate) fn open_namespace_iter() -> Option<NamespaceIter> {
    let features = KernelFeatures::probe(false).unwrap();
    let iter = namespaces::open(&features);
    assert_eq!(iter.is_ok(), lists_namespaces(), "{iter:?}");
    assert_eq!(iter.is_ok(), features.probe_read && features.btf.is_ok(), "{iter:?}");
    println!("FACT lists_namespaces={}", iter.is_ok());
    iter.ok()
}

/// The cookies by inode.
fn list(iter: &NamespaceIter) -> HashMap<u64, u64> {
    iter.list().unwrap().iter().map(|record| (record.inode.into(), record.cookie)).collect()
}

/// What keeps a namespace.
#[derive(Debug)]
#[expect(dead_code, reason = "it is only held")]
pub(crate) enum Keeper {
    Socket(Socket),
    Descriptor(File),
    /// A socket that is on its way through a unix socket: no process has it.
    InFlight(Socket, Socket),
}

/// Namespaces with a self-connection each that no thread is in, with what keeps them.
pub(crate) fn kept_namespaces() -> Vec<(u64, Keeper)> {
    let connect = || connect_to_self(Ipv4Addr::LOCALHOST.into()).0;
    let by_socket = TestNetns::with_new_in_helper(|net| (net.inode, Keeper::Socket(connect())));
    let by_descriptor = TestNetns::with_new_in_helper(|net| {
        connect().set_linger(Some(Duration::ZERO)).unwrap();
        (net.inode, Keeper::Descriptor(File::open("/proc/thread-self/ns/net").unwrap()))
    });
    // The unix sockets are in another namespace.
    let (to, from) = Socket::pair(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    let inode = TestNetns::with_new_in_helper(|net| {
        send_fd(&connect(), &to);
        net.inode
    });
    vec![by_socket, by_descriptor, (inode, Keeper::InFlight(to, from))]
}

#[test]
fn the_list_has_every_namespace_that_exists_and_none_that_has_ended() {
    let net = TestNetns::enter_new();
    let Some(iter) = open_namespace_iter() else { return };
    let kept = kept_namespaces();
    let listed = list(&iter);
    let known = |inode: u64| listed.contains_key(&inode);
    assert!(known(net.inode) && kept.iter().all(|(inode, _)| known(*inode)), "{kept:?} {listed:?}");
    // Of the first thread: no test changes it.
    let outer = std::os::unix::fs::MetadataExt::ino(&fs::metadata("/proc/self/ns/net").unwrap());
    assert!(known(outer), "{outer} {listed:?}");
    let cookies: Vec<_> = kept.iter().map(|(inode, _)| listed[inode]).collect();
    assert!(cookies.iter().all(|cookie| *cookie != 0), "{listed:?}");
    drop(kept);
    // The kernel cleans a namespace up some time after the last reference to it is gone.
    let until = Instant::now() + DEADLINE;
    while list(&iter).values().any(|cookie| cookies.contains(cookie)) {
        assert!(Instant::now() < until, "{cookies:?}");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(list(&iter)[&net.inode], listed[&net.inode]);
}

#[test]
fn thousands_of_namespaces_are_listed_while_others_begin_and_end() {
    let net = TestNetns::enter_new();
    let Some(iter) = open_namespace_iter() else { return };
    let count = scaled(1_200);
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let held: Vec<_> = (0..count)
        .map(|_| {
            TestNetns::with_new_in_helper(|net| (net.inode, File::open("/proc/thread-self/ns/net").unwrap()))
        })
        .collect();
    let churn = thread::spawn(move || {
        while wait.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            TestNetns::with_new_in_helper(|_| ());
        }
    });
    let (mut times, mut walks) = (Vec::new(), 0);
    let until = Instant::now() + Duration::from_secs(2);
    while walks < 5 || Instant::now() < until {
        let began = Instant::now();
        let listed = list(&iter);
        times.push(began.elapsed());
        assert!(listed.contains_key(&net.inode));
        for (inode, _) in &held {
            assert!(listed.contains_key(inode), "{inode} of {count} in walk {walks}");
        }
        walks += 1;
    }
    done.send(()).unwrap();
    churn.join().unwrap();
    times.sort_unstable();
    println!("FACT namespaces={count} walks={walks} walk={:?}", times[times.len() / 2]);
    drop(held);
}

/// A pass visits 64 namespaces for each task that its reader can see.
#[test]
fn more_namespaces_than_a_pass_can_visit_are_listed() {
    let _net = TestNetns::enter_new();
    let held: Vec<_> = (0..200)
        .map(|_| TestNetns::with_new_in_helper(|_| File::open("/proc/thread-self/ns/net").unwrap()))
        .collect();
    let mut scan = Command::new(selfconn());
    let scan = spawn_in_new_pid_namespace(scan.args(["scan", "--json"]).stdout(Stdio::piped()));
    let stdout = String::from_utf8(scan.wait_with_output().unwrap().stdout).unwrap();
    let summary: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let unseen = summary["unseen"].to_string();
    // What precedes the reason for which there is no list.
    assert_eq!(!unseen.contains("descriptor or mount leads to: "), lists_namespaces(), "{summary}");
    drop(held);
}

/// A daemon has a namespace for its self-test, which no process is in.
#[test]
fn the_namespace_of_a_daemons_self_test_is_seen() {
    let _net = TestNetns::enter_new();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let own: Vec<String> = descriptors
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()?.to_str().map(str::to_owned))
        .filter_map(|target| Some(target.strip_prefix("net:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let scan = Command::new(selfconn()).args(["scan", "--json"]).output().unwrap();
    let stdout = String::from_utf8(scan.stdout).unwrap();
    let summary: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let unseen = summary["unseen"].to_string();
    // The daemon may just be visiting another one.
    assert!(!own.is_empty() && own.iter().all(|inode| !unseen.contains(inode)), "{own:?}: {summary}");
}

/// Stops the daemon, fills its ring buffer, calls `end`, and lets it go on. No record of `end` arrives.
fn without_records(daemon: &TestDaemon, end: impl FnOnce()) {
    daemon.signal(Signal::STOP);
    for _ in 0..100 {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
    end();
    daemon.signal(Signal::CONT);
}

fn start_daemon() -> TestDaemon {
    let daemon = TestDaemon::start(&HookVariant(vec![]), &["--ring-size", "4K", "--reconcile", "1", "-vv"]);
    daemon.run_until_snapshots(1, || thread::sleep(Duration::from_millis(20)));
    daemon
}

#[test]
fn a_connection_whose_close_nobody_saw_ends_with_its_namespace() {
    let _net = TestNetns::enter_new();
    let mut daemon = start_daemon();
    let kept = kept_namespaces();
    let inodes: Vec<_> = kept.iter().map(|(inode, _)| *inode).collect();
    let is_closed = |inode: u64| move |event: &Value| is_event("closed", inode)(event);
    for inode in &inodes {
        daemon.expect(1, is_event("established", *inode));
    }
    // The one that only a descriptor keeps has no connection any more; it is still there.
    daemon.expect(1, is_closed(inodes[1]));
    daemon.run_until_snapshots(3, || thread::sleep(Duration::from_millis(20)));
    for inode in [inodes[0], inodes[2]] {
        let closed = daemon.received().iter().filter(|event| is_closed(inode)(event)).count();
        assert_eq!(closed, 0, "its namespace exists, though no process leads to it");
    }
    without_records(&daemon, || drop(kept));
    if lists_namespaces() {
        for inode in [inodes[0], inodes[2]] {
            let closed = daemon.expect(1, is_closed(inode)).remove(0);
            assert_eq!((&closed["how"], &closed["closer"]), (&Value::Null, &Value::Null), "{closed}");
        }
    } else {
        daemon.run_until_snapshots(3, || thread::sleep(Duration::from_millis(20)));
    }
    let (events, _) = daemon.stop();
    for inode in inodes {
        let count = |kind| events.iter().filter(|event| is_event(kind, inode)(event)).count();
        assert_eq!(count("established"), 1, "{events:#?}");
        assert!(count("closed") <= 1, "{events:#?}");
    }
    let lost = &events.last().unwrap()["lost"];
    assert!(lost["ring"].as_u64().unwrap() > 0, "the records of the close arrived: {lost}");
}
