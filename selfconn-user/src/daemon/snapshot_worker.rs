//! The worker that takes snapshots of the socket table, looks up sockets, and destroys them.

use std::io;

use super::{pipeline::take_snapshot, worker::Worker};
use crate::{
    detect::remediation::RemedyRequest,
    sockets::{self, Cookie, SocketSnapshot},
    system::{capabilities, clock},
};

pub(super) enum SnapshotRequest {
    /// Take a snapshot of the socket table, also in the namespaces of these threads. At most one may be in
    /// progress.
    Table(Vec<u32>),
    /// Look up the cookie of a socket.
    LookUp(RemedyRequest),
    /// Destroy a socket.
    Destroy(RemedyRequest, Cookie),
}

pub(super) enum SnapshotResponse {
    Table(SocketSnapshot),
    /// Number of the connection, and the cookie. `None`: no such socket.
    LookedUp(u64, Result<Option<Cookie>, String>),
    /// Number of the connection, start time (`CLOCK_BOOTTIME`, nanoseconds), and whether the socket existed.
    Destroyed(u64, u64, Result<bool, String>),
}

pub(super) type SnapshotWorker = Worker<SnapshotRequest, SnapshotResponse>;

pub(super) fn start() -> io::Result<SnapshotWorker> {
    Worker::start("reader", capabilities::SNAPSHOT_WORKER, |request| match request {
        SnapshotRequest::Table(netns_hints) => SnapshotResponse::Table(take_snapshot(&netns_hints)),
        SnapshotRequest::LookUp(RemedyRequest { number, endpoint, ifindex, netns_hints }) => {
            SnapshotResponse::LookedUp(number, sockets::look_up(&endpoint, ifindex, &netns_hints))
        }
        SnapshotRequest::Destroy(RemedyRequest { number, endpoint, ifindex, netns_hints }, cookie) => {
            let began_ns = clock::boot_ns();
            let outcome = sockets::destroy(&endpoint, ifindex, cookie, &netns_hints);
            SnapshotResponse::Destroyed(number, began_ns, outcome)
        }
    })
}
