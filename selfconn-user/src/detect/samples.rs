//! Sample values for tests: one constructor for each type, so that a new field changes one place.

use std::net::IpAddr;

use selfconn_ebpf::{BindOptions, Endpoint, Opener, Task, Transition, bind_failure::BindFailure};
use zerocopy::FromZeros as _;

use super::connection::{Connection, Source};
use crate::sockets::SocketEntry;

/// An endpoint in the network namespace 1. The socket is IPv6 if the address is.
pub(crate) fn endpoint(ip: &str, port: u16) -> Endpoint {
    let ip: IpAddr = ip.parse().unwrap();
    Endpoint::new(1, ip, port, ip.is_ipv6())
}

/// An open connection that a hook reported, of which nothing else is known.
pub(crate) fn connection(number: u64, endpoint: Endpoint) -> Connection {
    Connection::new(number, Source::Live, endpoint)
}

/// A socket with a cookie that no process holds.
pub(crate) fn entry(endpoint: Endpoint, state: u8) -> SocketEntry {
    SocketEntry {
        endpoint,
        state,
        cookie: Some(9),
        inode: 0,
        uid: None,
        time_wait_left: None,
        options: BindOptions::UNKNOWN,
        sock: None,
        connect_entry: None,
        is_held: false,
        device: None,
    }
}

/// A transition of a self-connection of 127.0.0.1:40000 in the network namespace 1, with counters. The opener
/// is the same within each microsecond.
pub(crate) fn transition(sock: u64, at_ns: u64, old: u8, new: u8) -> Transition {
    let task = Task { pid: 7, tid: 8, ..Task::UNKNOWN };
    Transition {
        at_ns,
        sock,
        endpoint: endpoint("127.0.0.1", 40_000),
        snd_una: 101,
        rcv_nxt: 101,
        old,
        new,
        has_counters: 1,
        current: task,
        opener: Opener { at_ns: at_ns / 1_000 * 1_000 + 1, task, ..Opener::UNKNOWN },
        ..Transition::new_zeroed()
    }
}

/// A bind of nginx that failed once.
pub(crate) fn bind_failure(requested: Endpoint, at_ns: u64) -> BindFailure {
    let mut task = Task::UNKNOWN;
    task.leader[..5].copy_from_slice(b"nginx");
    let options = BindOptions::new(false, false, false);
    BindFailure { at_ns, endpoint: requested, options, task, failures: 1, ..BindFailure::new_zeroed() }
}
