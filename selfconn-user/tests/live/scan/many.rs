//! As many as a busy host has: self-connections in many namespaces, and few among many ordinary sockets.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{
    METHODS, Scan,
    crowd::{Crowd, Holds},
};
use crate::{
    daemon::{scaled, selfconn},
    net::Net,
};

#[test]
fn ten_thousand_in_fifty_namespaces_all_have_their_namespace_and_holder() {
    let each = 200;
    let holds = Holds::Selves(each, Ipv4Addr::LOCALHOST.into());
    let crowds: Vec<_> = (0..scaled(50)).map(|_| (Net::private(), Crowd::start(holds))).collect();
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
            assert_eq!(of_net, [(&(net.inode, crowd.pid().into()), &each)]);
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
    let _crowds: Vec<_> = (0..processes).map(|_| Crowd::start(Holds::Ordinary(each))).collect();
    let localhost = Ipv4Addr::LOCALHOST;
    let addresses = [localhost.into(), localhost.to_ipv6_mapped().into(), Ipv6Addr::LOCALHOST.into()];
    let selves = addresses.map(|address| Crowd::start(Holds::Selves(1, address)));
    for options in [&[][..], &["--procfs"], &["--holders"]] {
        let scan = Scan::run(options);
        let rows = scan.of_net(net);
        assert_eq!(rows.len(), 3, "{options:?}");
        for crowd in &selves {
            let row = rows.iter().find(|row| row["pid"] == crowd.pid()).unwrap();
            assert_eq!(row["port"], crowd.said["port"]);
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
