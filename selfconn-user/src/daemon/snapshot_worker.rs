//! The worker that takes snapshots of the socket table.

use std::{cell::RefCell, io, time::Duration};

use crate::{
    bpf::loader::Iterators,
    budget::memory::MAX_SNAPSHOT_SOCKETS,
    sockets::{self, HolderSearch, SnapshotOptions, SocketSnapshot, VisitHistory, VisitTurns},
    system::{capabilities, worker::Worker},
};

/// How long a snapshot may read the socket tables of network namespaces. With 255,000 TIME_WAIT sockets elsewhere on
/// the host one of the two dumps of a namespace takes 17 ms on 6.18, so with a million both take some 0.14 s. Then this
/// is for seventy owners, each with one namespace at least. It is a sixth of the usual interval, so the next snapshot
/// is hardly late.
const MAX_VISITS: Duration = Duration::from_secs(10);

/// A request has the threads whose namespaces are to be read as well. At most one may be in progress.
pub(super) type SnapshotWorker = Worker<Vec<u32>, SocketSnapshot>;

pub(super) fn start(iterators: Iterators) -> io::Result<SnapshotWorker> {
    let capability_set = capabilities::snapshot_worker(iterators.descriptors.is_some());
    let history = RefCell::new(VisitHistory::default());
    Worker::start("reader", capability_set, move |netns_hints: Vec<u32>| {
        let snapshot = take_snapshot(&netns_hints, &iterators, &history.borrow());
        let visited = snapshot.namespaces.keys().copied();
        history.borrow_mut().add(visited, &snapshot.unvisited, &snapshot.unfound);
        snapshot
    })
}

/// Lists the self-connections and their holders: in one pass over descriptors, or else by a search, which may
/// take long. Reads the socket tables, too.
/// `netns_hints` are threads that may be the only ones in their namespace.
fn take_snapshot(netns_hints: &[u32], iterators: &Iterators, history: &VisitHistory) -> SocketSnapshot {
    let holders = Some(HolderSearch::Complete);
    let options = SnapshotOptions {
        attempts: true,
        holders,
        max_sockets: Some(MAX_SNAPSHOT_SOCKETS),
        descriptors: iterators.descriptors.as_deref(),
        namespaces: iterators.namespaces.as_ref(),
        turns: Some(VisitTurns { history, limit: MAX_VISITS }),
        ..SnapshotOptions::default()
    };
    let snapshot = sockets::snapshot(options, netns_hints).unwrap_or_else(|error| {
        // An empty snapshot covers no namespace, so no connection is considered closed.
        log::error!("the socket table can't be read: {error}");
        SocketSnapshot::default()
    });
    for why in &snapshot.unseen {
        log::info!("the snapshot is incomplete: {why}");
    }
    snapshot
}
