//! The worker that takes snapshots of the socket table, looks up sockets, and destroys them.

use std::io;

use super::worker::Worker;
use crate::{
    bpf::descriptors::DescriptorIter,
    detect::remediation::RemedyRequest,
    sockets::{self, Cookie, HolderSearch, SnapshotOptions, SocketSnapshot},
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

/// `descriptors`: the iterator over descriptors, if it is attached.
pub(super) fn start(descriptors: Option<DescriptorIter>) -> io::Result<SnapshotWorker> {
    let capability_set = capabilities::snapshot_worker(descriptors.is_some());
    Worker::start("reader", capability_set, move |request| match request {
        SnapshotRequest::Table(netns_hints) => {
            SnapshotResponse::Table(take_snapshot(&netns_hints, descriptors.as_ref()))
        }
        SnapshotRequest::LookUp(RemedyRequest { number, target }) => {
            SnapshotResponse::LookedUp(number, sockets::look_up(&target))
        }
        SnapshotRequest::Destroy(RemedyRequest { number, target }, cookie) => {
            let began_ns = clock::boot_ns();
            let outcome = sockets::destroy(&target, cookie);
            SnapshotResponse::Destroyed(number, began_ns, outcome)
        }
    })
}

/// Lists the self-connections and their holders: in one pass over descriptors, or else by a search, which may
/// take long. Reads the socket tables, too.
/// `netns_hints` are threads that may be the only ones in their namespace.
fn take_snapshot(netns_hints: &[u32], descriptors: Option<&DescriptorIter>) -> SocketSnapshot {
    let holders = Some(HolderSearch::Complete);
    let options = SnapshotOptions { attempts: true, holders, descriptors, ..SnapshotOptions::default() };
    let snapshot = sockets::snapshot(options, netns_hints).unwrap_or_else(|error| {
        // An empty snapshot covers no namespace, so no connection is considered closed.
        log::error!("the socket table can't be read: {error}");
        SocketSnapshot::default()
    });
    for why in &snapshot.unseen {
        log::info!("the socket table of a network namespace can't be read: {why}");
    }
    snapshot
}
