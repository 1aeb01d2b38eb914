//! The worker that takes snapshots of the socket table.

use std::io;

use crate::{
    sockets::{self, HolderSearch, SnapshotOptions, SocketSnapshot},
    system::{capabilities, worker::Worker},
};

/// A request has the threads whose namespaces are to be read as well. At most one may be in progress.
pub(super) type SnapshotWorker = Worker<Vec<u32>, SocketSnapshot>;

pub(super) fn start() -> io::Result<SnapshotWorker> {
    Worker::start("reader", capabilities::SNAPSHOT_WORKER, |netns_hints: Vec<u32>| {
        take_snapshot(&netns_hints)
    })
}

/// Reads the socket tables and searches for the holders of the self-connections. This may take long.
/// `netns_hints` are threads that may be the only ones in their namespace.
fn take_snapshot(netns_hints: &[u32]) -> SocketSnapshot {
    let holders = Some(HolderSearch::Complete);
    let options = SnapshotOptions { attempts: true, holders, ..SnapshotOptions::default() };
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
