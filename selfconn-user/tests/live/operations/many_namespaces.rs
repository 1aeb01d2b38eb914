//! Hundreds of network namespaces of one user, for which a snapshot of the socket table has no time.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use selfconn::sockets::{self, Coverage, SnapshotOptions, SocketSnapshot, VisitHistory, VisitTurns};
use selfconn_ebpf::Endpoint;

use crate::{
    kernel::namespaces::{Keeper, kept_namespaces, open_namespace_iter},
    support::{
        attacker::{Attacker, AttackerKind},
        daemon::scaled,
        helper_process::HelperProcess,
        netns::TestNetns,
    },
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// True if the snapshot has a self-connection in this namespace.
fn lists(snapshot: &SocketSnapshot, netns: u64) -> bool {
    snapshot.entries.iter().any(|entry| u64::from(entry.endpoint.netns) == netns)
}

#[test]
fn a_user_with_more_namespaces_than_there_is_time_for_keeps_no_others_out_of_a_snapshot() {
    let own = TestNetns::enter_new();
    let Some(namespaces) = open_namespace_iter() else { return };
    let count = scaled(300);
    let mut attacker =
        Attacker::start(AttackerKind::MappedUids, &format!("namespaces with threads {count}")).unwrap();
    attacker.wait();
    // Root's; it is found after those of the attacker.
    let (other, _connected) = TestNetns::with_new_in_helper(|net| {
        let mut process = HelperProcess::start("connect");
        process.read_output();
        (net, process)
    });
    let kept = kept_namespaces();
    let take = |history: &VisitHistory, limit| {
        // Without the iterator over descriptors only a visit shows what there is.
        let options = SnapshotOptions {
            attempts: true,
            max_sockets: Some(100_000),
            namespaces: Some(&namespaces),
            turns: Some(VisitTurns { history, limit }),
            ..SnapshotOptions::default()
        };
        sockets::snapshot(options, &[]).unwrap()
    };
    let begin = Instant::now();
    let all = take(&VisitHistory::default(), Duration::from_mins(10));
    let mut limit = begin.elapsed() / 4;
    assert!(all.unvisited.is_empty() && all.namespaces.len() >= count, "{all:?}");
    assert!(lists(&all, other.inode));
    for (inode, keeper) in &kept {
        let inode = u32::try_from(*inode).unwrap();
        let is_found = matches!(keeper, Keeper::Descriptor(_));
        assert_eq!(all.namespaces.contains_key(&inode), is_found, "{keeper:?}");
        assert_eq!(all.unfound.contains(&inode), !is_found, "{keeper:?}");
    }
    let (mut history, mut first);
    loop {
        history = VisitHistory::default();
        first = take(&history, limit);
        if first.unvisited.len() >= count / 2 {
            break;
        }
        limit /= 2;
    }
    println!("FACT all={} limit_us={}", all.namespaces.len(), limit.as_micros());
    let mut snapshot = first;
    let mut visited: HashSet<u32> = HashSet::new();
    let mut number = 0;
    while !all.namespaces.keys().all(|inode| visited.contains(inode)) {
        number += 1;
        println!("FACT snapshot={number} visited={}", snapshot.namespaces.len());
        assert!(lists(&snapshot, other.inode), "snapshot {number}: {snapshot:?}");
        assert!(snapshot.namespaces.keys().any(|inode| u64::from(*inode) == own.inode));
        for inode in &snapshot.unvisited {
            let endpoint = Endpoint::new(*inode, LOCALHOST, 1, false);
            assert_eq!(snapshot.coverage(&endpoint), Coverage::Unknown);
            assert!(!lists(&snapshot, (*inode).into()) && !snapshot.unfound.contains(inode));
        }
        let is_named = snapshot.unseen.iter().any(|why| why.contains("there was no time for"));
        assert_eq!(is_named, !snapshot.unvisited.is_empty(), "{:?}", snapshot.unseen);
        let visited_before = visited.len();
        visited.extend(snapshot.namespaces.keys());
        assert!(visited.len() > visited_before, "snapshot {number} visited none that was not visited before");
        history.add(snapshot.namespaces.keys().copied(), &snapshot.unvisited, &snapshot.unfound);
        snapshot = take(&history, limit);
    }
    assert!(number > 1);
    drop(attacker);
}
