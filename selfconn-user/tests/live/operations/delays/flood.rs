//! A flood of records: processes of uid 65534 make self-connections as fast as they can, and another one fails binds of
//! a port that a self-connection holds.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{EVENT_LIMIT, stop_in_time};
use crate::support::{
    accounting::{assert_sums_hold, number},
    client::connect_to_self,
    daemon::{TestDaemon, is_event, scaled},
    dedicated::{decisive, is_emulated, time_limit},
    netns::TestNetns,
    nobody::{NOBODY, Nobody},
    watchdog::Watchdog,
};

/// Number of processes that make self-connections. In an emulator one makes it slow enough.
fn connecting_processes() -> usize {
    if is_emulated() { 1 } else { 2 }
}

/// How long the flood is watched.
const WATCHED: Duration = Duration::from_secs(4);

/// Minimum number of records in this time. On a quiet machine with two CPUs, two such processes make 190,000 a second.
const MIN_RECORDS: usize = 50_000;

/// Time between two self-connections of this process.
const PAUSE: Duration = Duration::from_millis(50);

/// Makes self-connections of this process until `until`, each at an address of its own. Returns the address of each,
/// and when it began.
fn connect_until(until: Instant) -> Vec<(String, Instant)> {
    let mut connects = Vec::new();
    while Instant::now() < until {
        let [high, low] = u16::try_from(connects.len()).unwrap().to_be_bytes();
        let address = Ipv4Addr::new(127, 1, high, low);
        connects.push((address.to_string(), Instant::now()));
        let (socket, _) = connect_to_self(address.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        drop(socket);
        thread::sleep(PAUSE);
    }
    connects
}

/// Receives events until `until`. Returns for each address of a matching event when the first one came.
fn receive_until(
    daemon: &mut TestDaemon,
    until: Instant,
    matches: impl Fn(&Value) -> bool,
) -> HashMap<String, Instant> {
    let (mut count, mut came) = (0, HashMap::new());
    while let Ok(events) = daemon.wait_until(until, count + 1, &matches) {
        let now = Instant::now();
        count = events.len();
        for event in events {
            came.entry(event["addr"].as_str().unwrap().to_owned()).or_insert(now);
        }
    }
    came
}

#[test]
fn a_flood_of_records_keeps_nobody_from_the_daemon() {
    let net = TestNetns::enter_new();
    // The flood is of records. An owner's events are few, because this process checks each.
    let options = ["--reconcile", "1", "--self-test", "1", "--log-rate", "20/400"];
    let (mut daemon, watchdog) = Watchdog::start_daemon(&options);
    let observes_binds = !daemon.received()[0]["binds"]["method"].is_null();
    let connecting = (0..connecting_processes()).map(|_| Nobody::connecting());
    let mut flood: Vec<_> = connecting.chain([Nobody::failing_binds()]).collect();
    flood.iter_mut().for_each(Nobody::wait);
    // From here on nearly all of the flood's events are suppressed.
    let is_suppressed = |event: &Value| event["event"] == "lost" && event["where"] == "suppressed";
    daemon.expect(1, is_suppressed);
    let is_own = |event: &Value| {
        is_event("established", net.inode)(event)
            && event["pid"] == std::process::id()
            && event["source"] == "live"
    };
    let until = Instant::now() + WATCHED;
    let (connects, came) = thread::scope(|scope| {
        let connects = scope.spawn(|| connect_until(until));
        let came = receive_until(&mut daemon, until + EVENT_LIMIT, is_own);
        (connects.join().unwrap(), came)
    });
    watchdog.assert_fed();
    let events = stop_in_time(daemon);
    let stopped = events.last().unwrap();
    println!("FACT flood_matched={} lost_ring={}", stopped["matched"], stopped["lost"]["ring"]);
    assert_sums_hold(stopped);
    assert!(number(stopped, "/matched") >= scaled(MIN_RECORDS) as u64, "it was no flood: {stopped}");
    assert_eq!(number(stopped, "/lost/binds") > 0, observes_binds, "failed binds beyond the rate: {stopped}");
    // An event of this process is missing only if its record was lost: it has the rate of its own owner.
    for report in events.iter().filter(|event| is_suppressed(event)) {
        assert_eq!(report["uid"], NOBODY, "{report}");
    }
    assert_eq!(number(stopped, "/lost/stdout"), 0, "{stopped}");
    let is_in_the_end =
        |address: &String| events.iter().any(|event| is_own(event) && event["addr"] == **address);
    let durations: Vec<_> = connects
        .iter()
        .filter_map(|(address, began)| match came.get(address) {
            Some(at) => Some(at.duration_since(*began)),
            None => is_in_the_end(address).then_some(Duration::MAX),
        })
        .collect();
    let lost = connects.len() - durations.len();
    println!("FACT own_events={} lost={lost} longest={:?}", durations.len(), durations.iter().max());
    assert!(lost < durations.len(), "{lost} of {} own self-connections are not reported", connects.len());
    assert!(
        lost as u64 <= number(stopped, "/lost/ring"),
        "{lost} are not reported and not counted: {stopped}"
    );
    // In an emulator the flood leaves no CPU free, and a CPU takes turns of up to 100 ms with the other one, so that each
    // wakeup of the client, of the daemon and of this test waits for turns, however few records there are.
    let limit = time_limit(EVENT_LIMIT, Duration::from_secs(1));
    assert!(decisive(durations.clone()) < limit, "{durations:?}");
}
