//! Namespaces that no process leader and no mount of ours leads to: `scan` and `audit` look into them, or list them as
//! unseen.

use std::{
    net::{Ipv4Addr, TcpListener},
    process::Command,
    time::Instant,
};

use serde_json::Value;

use super::namespaces::{kept_namespaces, lists_namespaces};
use crate::support::{
    client::connect_to_self,
    daemon::{DEADLINE, reads_descriptors, selfconn},
    helper_process::HelperProcess,
    netns::TestNetns,
    scan_output::ScanOutput,
};

/// How a namespace is kept, and whether it can be entered.
const NAMESPACE_KEEPERS: [(&str, bool); 5] = [
    ("hold in a namespace that only the sockets keep", false),
    ("hold in a namespace that a descriptor keeps", true),
    ("hold in a namespace that a thread is in", true),
    ("hold without a first thread", true),
    ("keep a namespace by a mount in a mount namespace", true),
];

/// The lines that name a namespace.
fn naming<'a>(lines: impl IntoIterator<Item = &'a String>, netns: u64) -> Vec<&'a String> {
    let is_named =
        |line: &&String| line.split(|c: char| !c.is_ascii_digit()).any(|word| word == netns.to_string());
    lines.into_iter().filter(is_named).collect()
}

/// Waits until so few namespaces are unseen that each is named: the kernel takes its time to end those of an earlier
/// test.
fn wait_until_each_is_named() {
    let until = Instant::now() + DEADLINE;
    while ScanOutput::run(&[]).unseen.iter().any(|line| line.ends_with(" more")) {
        assert!(Instant::now() < until, "too many namespaces are unseen");
    }
}

#[test]
fn scan_looks_into_a_namespace_whatever_keeps_it_or_lists_it_as_unseen() {
    let _net = TestNetns::enter_new();
    wait_until_each_is_named();
    let helpers = NAMESPACE_KEEPERS.map(|(task, can_be_entered)| {
        let mut helper = HelperProcess::start(task);
        let netns: u64 = helper.read_output().parse().unwrap();
        (helper, netns, task, can_be_entered)
    });
    let scan = ScanOutput::run(&[]);
    assert_eq!(scan.code, Some(1), "{scan:#?}");
    for (helper, netns, task, can_be_entered) in helpers {
        let found: Vec<_> = scan.rows.iter().filter(|row| row["netns"] == netns).collect();
        // A process holds the self-connection; that of the mount is in TIME_WAIT.
        let is_found = can_be_entered || reads_descriptors();
        assert_eq!(found.len(), usize::from(is_found), "{task}: {scan:#?}");
        let is_unseen = !can_be_entered && lists_namespaces();
        assert_eq!(naming(&scan.unseen, netns).len(), usize::from(is_unseen), "{task}: {scan:#?}");
        assert_eq!(scan.stderr.contains(&format!(" {netns}")), is_unseen, "{task}: {scan:#?}");
        if !lists_namespaces() {
            let is_said = scan.unseen.iter().any(|line| line.contains("bpf_probe_read_kernel"));
            assert!(is_said, "that there may be others: {scan:#?}");
        }
        let netns_option = ["--netns", &netns.to_string()];
        if is_found {
            let only = ScanOutput::run(&netns_option);
            assert_eq!(only.rows.len(), found.len(), "{task}: {only:#?}");
            assert!(only.rows.iter().all(|row| row["netns"] == netns), "{task}: {only:#?}");
        } else {
            let only = Command::new(selfconn()).arg("scan").args(netns_option).output().unwrap();
            let stderr = String::from_utf8_lossy(&only.stderr);
            assert_eq!(only.status.code(), Some(2), "{task}: {stderr}");
            let says = format!("no network namespace with the inode {netns} was found");
            assert!(stderr.contains(&says), "{task}: {stderr}");
        }
        helper.finish();
    }
}

#[test]
fn what_nothing_leads_to_is_unseen_until_it_ends() {
    let net = TestNetns::enter_new();
    let (_held, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    wait_until_each_is_named();
    let kept = kept_namespaces();
    // On its way through a unix socket.
    let in_flight = kept[2].0;
    let scan = ScanOutput::run(&[]);
    assert_eq!(naming(&scan.unseen, in_flight).len(), usize::from(lists_namespaces()), "{scan:#?}");
    assert_eq!(naming(&scan.unseen, net.inode), Vec::<&String>::new(), "{scan:#?}");
    assert_eq!(naming(&scan.unseen, kept[1].0), Vec::<&String>::new(), "a descriptor leads to it: {scan:#?}");
    assert!(!scan.rows.iter().any(|row| row["netns"] == in_flight), "{scan:#?}");
    // A selection of another namespace says nothing about it.
    for selection in ["self", &format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid())] {
        let only = ScanOutput::run(&["--netns", selection]);
        assert_eq!(only.only_row_in(net)["port"], port, "{only:#?}");
        assert_eq!((only.rows.len(), naming(&only.unseen, in_flight).len()), (1, 0), "{only:#?}");
    }
    drop(kept);
    let until = Instant::now() + DEADLINE;
    while !naming(&ScanOutput::run(&[]).unseen, in_flight).is_empty() {
        assert!(Instant::now() < until, "{in_flight} stays");
    }
    let absent = Command::new(selfconn()).args(["scan", "--netns", "7"]).output().unwrap();
    assert_eq!(absent.status.code(), Some(2), "{absent:?}");
    let stderr = String::from_utf8(absent.stderr).unwrap();
    assert!(stderr.contains("no network namespace with the inode 7 was found"), "{stderr}");
}

fn gettid() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}

#[test]
fn audit_looks_into_a_namespace_that_a_descriptor_or_a_thread_keeps_and_lists_others_as_unseen() {
    let _net = TestNetns::enter_new();
    wait_until_each_is_named();
    let (descriptor, _keeper) = TestNetns::with_new_in_helper(|net| {
        (net.inode, std::fs::File::open("/proc/thread-self/ns/net").unwrap())
    });
    let (listener_netns, _listener) = TestNetns::with_new_in_helper(|net| {
        (net.inode, TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
    });
    let mut thread = HelperProcess::start("hold in a namespace that a thread is in");
    let thread_netns: u64 = thread.read_output().parse().unwrap();
    let audit = |options: &[&str]| {
        let output =
            Command::new(selfconn()).args(["audit", "--json", "--port", "40000"]).args(options).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let lines = audit(&[]);
    let summary = lines.last().unwrap();
    let unseen: Vec<String> =
        summary["unseen"].as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect();
    for (netns, is_seen) in [(descriptor, true), (thread_netns, true), (listener_netns, false)] {
        let rows = lines.iter().filter(|line| line["netns"] == netns).count();
        assert_eq!(rows, usize::from(is_seen), "{netns}: {lines:#?}");
        let is_unseen = !is_seen && lists_namespaces();
        assert_eq!(naming(&unseen, netns).len(), usize::from(is_unseen), "{netns}: {lines:#?}");
    }
    // The fix enters it by that path.
    let namespaces = summary["namespaces"].as_array().unwrap();
    let entered = namespaces.iter().find(|namespace| namespace["netns"] == descriptor).unwrap();
    let path = entered["path"].as_str().unwrap();
    assert!(
        path.starts_with(&format!("/proc/{}/", std::process::id())) && path.contains("/fd/"),
        "{entered}"
    );
    let only = audit(&["--netns", &thread_netns.to_string()]);
    let netns: Vec<_> = only.iter().filter_map(|line| line["netns"].as_u64()).collect();
    assert_eq!(netns, [thread_netns], "{only:#?}");
    thread.finish();
}
