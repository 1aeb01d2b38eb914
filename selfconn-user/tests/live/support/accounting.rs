//! The two sums that show that no loss is silent. Records: those matched by the programs are those delivered to the
//! daemon and those lost by the ring buffer. Events: those made are those written and those lost. A reader of the
//! events sees the same: each lost one is a gap in their numbers.

use std::{collections::HashSet, net::Ipv4Addr, time::Duration};

use serde_json::Value;

use super::{client::connect_to_self, schema::parse_line};

/// A number in the `stopped` event.
pub(crate) fn number(stopped: &Value, key: &str) -> u64 {
    stopped.pointer(key).and_then(Value::as_u64).unwrap_or_else(|| panic!("{key} in {stopped}"))
}

/// Checks both sums of the `stopped` event.
#[track_caller]
pub(crate) fn assert_sums_hold(stopped: &Value) {
    let field = |key| number(stopped, key);
    assert_eq!(field("/matched"), field("/delivered") + field("/lost/ring"), "{stopped}");
    if stopped["written"].is_u64() {
        assert_eq!(
            field("/made"),
            field("/written") + field("/lost/log") + field("/lost/suppressed"),
            "{stopped}"
        );
    }
}

/// Checks that an output has events of one run only, in order and none twice. Returns how many are missing, as a
/// store would find out, which has nothing but the events.
#[track_caller]
pub(crate) fn missing_events(events: &[Value]) -> u64 {
    let runs: HashSet<_> =
        events.iter().map(|event| (event["boot_id"].to_string(), event["run"].to_string())).collect();
    assert_eq!(runs.len(), 1, "{runs:?}");
    let numbers: Vec<u64> = events.iter().map(|event| number(event, "/seq")).collect();
    assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
    numbers.last().unwrap() - numbers.len() as u64
}

/// The events in a log.
pub(crate) fn parse_log(text: &str) -> Vec<Value> {
    text.lines().map(|line| parse_line("events", line)).collect()
}

/// Makes self-connections that end at once.
pub(crate) fn make_self_connections(count: usize) {
    for _ in 0..count {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}
