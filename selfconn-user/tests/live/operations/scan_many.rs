//! `scan` on a busy host: self-connections in many namespaces, and a few among many ordinary sockets.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::{
    daemon::{scaled, selfconn},
    netns::TestNetns,
    scan_output::{METHODS, ScanOutput},
    socket_crowd::{CrowdSockets, SocketCrowd},
};

#[test]
fn ten_thousand_in_fifty_namespaces_are_listed_with_namespace_and_holder() {
    let each = 200;
    let sockets = CrowdSockets::SelfConnections(each, Ipv4Addr::LOCALHOST.into());
    let crowds: Vec<_> =
        (0..scaled(50)).map(|_| (TestNetns::enter_new(), SocketCrowd::start(sockets))).collect();
    for options in METHODS {
        let began = Instant::now();
        let scan = ScanOutput::run(options);
        eprintln!("{} self-connections {options:?}: {:?}", scan.rows.len(), began.elapsed());
        let mut counts: HashMap<(u64, u64), usize> = HashMap::new();
        for row in &scan.rows {
            let key = (row["netns"].as_u64().unwrap(), row["pid"].as_u64().unwrap_or(0));
            *counts.entry(key).or_default() += 1;
        }
        for (net, crowd) in &crowds {
            let in_namespace: Vec<_> = counts.iter().filter(|((netns, _), _)| *netns == net.inode).collect();
            assert_eq!(in_namespace, [(&(net.inode, crowd.pid().into()), &each)]);
        }
    }
}

fn duration_of(command: &mut Command) -> Option<Duration> {
    let began = Instant::now();
    let status = command.stdout(Stdio::null()).status().ok()?;
    assert!(status.code().is_some_and(|code| code < 2), "{command:?}: {status}");
    Some(began.elapsed())
}

fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations[durations.len() / 2]
}

#[test]
fn three_among_a_hundred_thousand_sockets_are_found_faster_than_ss_lists_them() {
    // Each daemon has a namespace of its own, whose table is read, too.
    let net = TestNetns::enter_new();
    let (processes, each) = (10, scaled(10_000));
    let _crowds: Vec<_> = (0..processes).map(|_| SocketCrowd::start(CrowdSockets::Ordinary(each))).collect();
    let localhost = Ipv4Addr::LOCALHOST;
    let addresses = [localhost.into(), localhost.to_ipv6_mapped().into(), Ipv6Addr::LOCALHOST.into()];
    let self_crowds = addresses.map(|address| SocketCrowd::start(CrowdSockets::SelfConnections(1, address)));
    for options in [&[][..], &["--procfs"], &["--holders"]] {
        let scan = ScanOutput::run(options);
        let rows = scan.rows_in(net);
        assert_eq!(rows.len(), 3, "{options:?}");
        for crowd in &self_crowds {
            let row = rows.iter().find(|row| row["pid"] == crowd.pid()).unwrap();
            assert_eq!(row["port"], crowd.report["port"]);
            // Without --holders, not every process is searched when very many files are open.
            let is_unknown = row["holders"].is_null() && options != ["--holders"];
            assert!(is_unknown || row["holders"].as_array().unwrap().len() == 1, "{options:?}: {row}");
        }
    }
    let (mut scan_times, mut ss_times) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        scan_times.extend(duration_of(Command::new(selfconn()).arg("scan")));
        ss_times.extend(duration_of(Command::new("ss").arg("-tanH")));
    }
    if ss_times.is_empty() {
        eprintln!("skipped: no ss on this host to compare with");
        return;
    }
    let (scan_times, ss_times) = (median(scan_times), median(ss_times));
    let ratio = scan_times.as_secs_f64() / ss_times.as_secs_f64();
    eprintln!(
        "{} ordinary sockets: scan {scan_times:?}, ss -tanH {ss_times:?}, ratio {ratio:.2}",
        processes * each
    );
    assert!(ratio < 1.0, "scan {scan_times:?}, ss -tanH {ss_times:?}");
}
