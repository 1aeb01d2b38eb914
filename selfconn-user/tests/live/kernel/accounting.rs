//! With room for all events nothing is lost, and the sums of records and events hold.

use std::fs;

use crate::support::{
    accounting::{assert_sums_hold, make_self_connections, missing_events, number},
    daemon::{TestDaemon, is_event, lossless_variants, scaled},
    netns::TestNetns,
};

#[test]
fn with_room_for_all_events_nothing_is_lost_and_the_sums_hold() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    for (index, variant) in lossless_variants().enumerate() {
        let log = log.with_extension(index.to_string());
        let mut daemon = TestDaemon::start(&variant, &["--log", log.to_str().unwrap(), "--states"]);
        make_self_connections(scaled(500));
        daemon.expect(scaled(500), is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        let stopped = events.last().unwrap();
        assert_sums_hold(stopped);
        assert!(number(stopped, "/matched") >= 2 * scaled(500) as u64, "{variant:?}: {stopped}");
        assert_eq!((number(stopped, "/lost/ring"), number(stopped, "/lost/log")), (0, 0), "{stopped}");
        assert_eq!((missing_events(&events), number(stopped, "/seq")), (0, number(stopped, "/made")));
        let lines = fs::read_to_string(&log).unwrap().lines().count() as u64;
        assert_eq!((lines, events.len() as u64), (number(stopped, "/written"), number(stopped, "/made")));
    }
}
