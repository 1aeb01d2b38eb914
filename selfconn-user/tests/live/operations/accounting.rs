//! A scarce ring buffer and a scarce connect table: each loss is counted, and the sums hold.

use std::net::Ipv4Addr;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    accounting::{assert_sums_hold, make_self_connections, number},
    client::{NOBODY, become_user, connect_to_self, unanswered_connects},
    daemon::{HookVariant, TestDaemon, hook_variants, is_event},
    netns::TestNetns,
};

#[test]
fn a_one_page_ring_buffer_counts_each_lost_record() {
    TestNetns::enter_new();
    for variant in hook_variants() {
        let mut daemon = TestDaemon::start(&variant, &["--ring-size", "4K", "--states"]);
        for _ in 0..5 {
            // A stopped daemon drains no ring buffer, so one page is full at once.
            daemon.signal(Signal::STOP);
            make_self_connections(50);
            daemon.signal(Signal::CONT);
            let lost = |event: &Value| event["event"] == "lost" && event["where"] == "ring";
            assert_eq!(daemon.expect(1, lost)[0]["kind"], "record");
        }
        let (events, _) = daemon.stop();
        let stopped = events.last().unwrap();
        assert_sums_hold(stopped);
        let reported: u64 = events
            .iter()
            .filter(|event| event["event"] == "lost" && event["where"] == "ring")
            .map(|event| number(event, "/count"))
            .sum();
        assert_eq!(reported, number(stopped, "/lost/ring"), "{variant:?}: {stopped}");
        assert!(reported > 100, "{variant:?}: {stopped}");
    }
}

#[test]
fn a_table_of_eight_entries_counts_each_lost_opener_by_its_user() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--connect-table", "8"]);
    // Another user's connects in flight occupy every slot of the table.
    let flood = || {
        become_user(NOBODY);
        unanswered_connects(64)
    };
    let in_flight = std::thread::scope(|scope| scope.spawn(flood).join().unwrap());
    let sockets: Vec<_> = (0..200).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into()).0).collect();
    let established = daemon.expect(200, is_event("established", net.inode));
    drop((sockets, in_flight));
    daemon.expect(200, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_sums_hold(stopped);
    assert!(established.iter().all(|event| event["pid"] == std::process::id()), "{established:#?}");
    let not_remembered = number(stopped, "/not_remembered");
    // A backlog of zero accepts one or two.
    assert!((64 - 8 - 2..=64).contains(&not_remembered), "{stopped}");
    let is_opener_loss = |event: &&Value| event["event"] == "lost" && event["where"] == "opener_table";
    let reported = events.iter().filter(is_opener_loss);
    let reported: u64 = reported
        .inspect(|event| assert_eq!((&event["kind"], &event["uid"]), (&"fact".into(), &NOBODY.into())))
        .map(|event| number(event, "/count"))
        .sum();
    assert_eq!(reported, not_remembered, "{stopped}");
    // A fact is not part of the totals.
    assert!(stopped["lost"]["opener_table"].is_null(), "{stopped}");
}
