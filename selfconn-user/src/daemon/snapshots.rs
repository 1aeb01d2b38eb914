//! The daemon's snapshots of the socket table: when the next one is due, and what one of them changes.

use std::{collections::BTreeSet, io, time::Duration};

use selfconn_ebpf::{Endpoint, held_port_slot};
use tokio::time::Instant;

use super::{
    pipeline::Pipeline,
    self_test::SelfTest,
    snapshot_worker::{self, SnapshotWorker},
};
use crate::{
    bpf::loader::{Iterators, Tracer},
    budget::memory::MAX_OPENER_THREADS,
    detect::port_set::PortSet,
    sockets::{ConnectMatch, SocketEntry, SocketSnapshot},
    system::busy::ThreadProblem,
};

/// The worker that takes them, and their times.
pub(super) struct Snapshots {
    worker: SnapshotWorker,
    interval: Duration,
    /// True if the probes can read a socket's network namespace.
    knows_netns: bool,
    /// The namespaces from before the run that no snapshot has read yet. `None`: there was no snapshot.
    unread: Option<BTreeSet<u32>>,
    /// When the next one is due. `None`: one is in progress.
    next_at: Option<Instant>,
    /// True if the last one visited every namespace.
    had_all: bool,
    /// The ports of self-connections that the last one did not list and the daemon did not track.
    other_ports: PortSet,
}

impl Snapshots {
    pub(super) fn start(iterators: Iterators, interval: Duration, knows_netns: bool) -> io::Result<Self> {
        let worker = snapshot_worker::start(iterators)?;
        Ok(Self {
            worker,
            interval,
            knows_netns,
            unread: None,
            next_at: None,
            had_all: true,
            other_ports: PortSet::default(),
        })
    }

    /// Waits until one is taken. Cancel safe.
    pub(super) async fn ready(&mut self) {
        self.worker.ready().await;
    }

    pub(super) fn try_take(&mut self) -> Option<SocketSnapshot> {
        self.worker.try_response()
    }

    /// The name of the worker, and what is wrong with it.
    pub(super) fn worker_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.worker.problem()
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.next_at
    }

    /// Requests one from the worker.
    pub(super) fn request(&mut self, tracer: &Tracer, pipeline: &mut Pipeline) {
        self.next_at = None;
        pipeline.connections.begin_snapshot();
        let can_look_up = pipeline.reporting.lookups.can_look_up();
        self.worker.send(if can_look_up { opener_threads(tracer) } else { Vec::new() });
    }

    /// Reconciles the tracked connections with one. All records from before it must have been drained. Returns the
    /// number of self-connections in it that were not tracked.
    pub(super) fn apply(
        &mut self,
        snapshot: &mut SocketSnapshot,
        tracer: &mut Tracer,
        pipeline: &mut Pipeline,
        self_test: &SelfTest,
    ) -> u64 {
        let mut matching = ConnectMatch::new(snapshot, self.knows_netns);
        if let Err(error) = tracer.retain_connects(|sock, connect| matching.add(sock, connect)) {
            log::error!("the connect table can't be read: {error:#}");
        }
        // A self-test in progress is listed, too.
        let is_self_test =
            |entry: &SocketEntry| entry.cookie.is_some_and(|cookie| self_test.is_self_test_socket(cookie));
        snapshot.entries.retain(|entry| !is_self_test(entry));
        // What is listed for the first time may be from before the run. Then it does not count as missed.
        let may_be_older =
            |endpoint: &Endpoint| self.unread.as_ref().is_none_or(|unread| unread.contains(&endpoint.netns));
        let untracked_before = pipeline.connections.untracked_ports();
        let found = pipeline.reconcile(snapshot, self.knows_netns, may_be_older);
        self.unread = Some(still_unread(self.unread.take(), &snapshot.unvisited));
        pipeline.record_time_waits(snapshot);
        let binds = &mut pipeline.conflicts.binds;
        binds.time_waits.remove_expired(snapshot.began_ns);
        let connections = pipeline.connections.iter().map(|connection| &connection.endpoint);
        let listed = snapshot.entries.iter().map(|entry| &entry.endpoint);
        let held = connections.chain(listed).chain(binds.time_waits.endpoints()).map(held_port_slot);
        // The ports of the others: of what is not tracked, of what the snapshot left out, TIME_WAIT included, and of
        // TIME_WAITs for which there was no room.
        let mut others = pipeline.connections.untracked_ports();
        others.extend(snapshot.left_out.ports());
        others.extend(&binds.time_waits.unkept_ports(snapshot.began_ns));
        // A dump can skip a socket, so a slot of one that is not tracked is needed until two snapshots do not list it.
        let earlier = untracked_before.slots().chain(self.other_ports.slots());
        let needed = held.chain(others.slots()).chain(earlier);
        // What is in a namespace that was not visited may hold any other port.
        let has_all = snapshot.unvisited.is_empty();
        let had_all = std::mem::replace(&mut self.had_all, has_all);
        tracer.update_held_ports(needed, snapshot.began_ns, has_all && had_all);
        self.other_ports = others;
        self.next_at = Some(Instant::now() + self.interval);
        found
    }
}

/// The namespaces from before the run that no snapshot has read yet, after a snapshot that had no time for some.
fn still_unread(unread: Option<BTreeSet<u32>>, unvisited: &BTreeSet<u32>) -> BTreeSet<u32> {
    match unread {
        None => unvisited.clone(),
        Some(unread) => unread.intersection(unvisited).copied().collect(),
    }
}

/// Thread ids of the openers in the connect table. Such a thread may be in a namespace that no process is in. Where the
/// table is larger than usual, the threads of some openers are left out: their places there are random.
fn opener_threads(tracer: &Tracer) -> Vec<u32> {
    let mut threads = OpenerThreads::default();
    if let Err(error) = tracer.for_each_connect(|_, connect| threads.add(connect.opener.task.tid)) {
        log::error!("the connect table can't be read: {error:#}");
    }
    threads.finish()
}

/// Thread ids, each once.
#[derive(Default)]
struct OpenerThreads(Vec<u32>);

impl OpenerThreads {
    fn add(&mut self, thread: u32) {
        if self.0.len() == MAX_OPENER_THREADS {
            self.sort();
        }
        if self.0.len() < MAX_OPENER_THREADS {
            self.0.push(thread);
        }
    }

    fn finish(mut self) -> Vec<u32> {
        self.sort();
        self.0
    }

    fn sort(&mut self) {
        self.0.sort_unstable();
        self.0.dedup();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_opener_is_kept_once_and_no_more_than_there_is_room_for() {
        let mut threads = OpenerThreads::default();
        for thread in (1..=9).cycle().take(3 * MAX_OPENER_THREADS) {
            threads.add(thread);
        }
        assert_eq!(threads.finish(), (1..=9).collect::<Vec<_>>());
        let mut threads = OpenerThreads::default();
        (0..3 * MAX_OPENER_THREADS as u32).for_each(|thread| threads.add(thread));
        assert_eq!(threads.finish().len(), MAX_OPENER_THREADS);
    }

    #[test]
    fn only_what_the_first_snapshot_had_no_time_for_stays_unread() {
        let first = still_unread(None, &[1, 2, 3].into());
        assert_eq!(first, [1, 2, 3].into());
        let second = still_unread(Some(first), &[2, 4].into());
        assert_eq!(second, [2].into(), "4 is new, or was read before");
        assert_eq!(still_unread(Some(second), &BTreeSet::new()), [].into());
    }
}
