//! The two sums that show that no loss is silent. Records: matched by the programs = delivered to the daemon
//! + lost by the ring buffer. Events: made = written + lost.

use std::{net::Ipv4Addr, time::Duration};

use serde_json::Value;

use super::client::connect_to_self;

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

/// Makes self-connections that end at once.
pub(crate) fn make_self_connections(count: usize) {
    for _ in 0..count {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}
