//! The guard's reports: counts refused connects by process and port, and says when an event is due. The program counts
//! every one of them, so that the events have as many in all, also if a record is lost.

use std::{collections::HashMap, time::Duration};

use selfconn_ebpf::{Opener, guard::Prevention};
use tokio::time::Instant;

use crate::{
    detect::connection::{Connection, Source},
    guard::{
        GuardMode,
        thread::{GuardCounts, GuardReport, GuardThread},
    },
};

/// Minimum time between two events of the same process and port.
const EVENT_INTERVAL: Duration = Duration::from_millis(100);

/// After this time without an attempt, a process and port are forgotten.
const IDLE: Duration = Duration::from_secs(1);

/// Maximum number of processes and ports that are counted apart. The attempts of others are counted together.
const MAX_COUNTED: usize = 1_024;

/// Maximum number of events in a second. The attempts beyond it are counted together.
const MAX_EVENTS: u32 = 100;

/// Time between two looks at what is counted together.
const REST_INTERVAL: Duration = Duration::from_secs(1);

/// Attempts of which an event is due.
#[derive(Debug)]
pub(super) struct DuePrevention {
    /// The newest attempt. `None`: the attempts are not known one by one.
    pub(super) newest: Option<Prevention>,
    pub(super) count: u64,
}

/// The attempts of a process at a port.
#[derive(Debug)]
struct Counted {
    newest: Prevention,
    /// Attempts since the last event.
    pending: u64,
    emitted_at: Instant,
}

/// The thread of the guard, and what it has refused.
pub(super) struct GuardMonitor {
    mode: GuardMode,
    thread: Option<GuardThread>,
    counts: GuardCounts,
    by_process: HashMap<(u32, u64, u16), Counted>,
    /// Events in the current second.
    events: u32,
    second_began: Option<Instant>,
    /// Attempts that are not counted by process and port.
    uncounted: u64,
    /// Attempts of which no record was counted by process and port, and that events have.
    rest: u64,
    /// When to look for attempts that are counted together. `None`: nothing has happened since the last look.
    rest_at: Option<Instant>,
}

impl GuardMonitor {
    pub(super) fn new(mode: GuardMode, thread: Option<GuardThread>) -> Self {
        Self {
            mode,
            thread,
            counts: GuardCounts::default(),
            by_process: HashMap::new(),
            events: 0,
            second_began: None,
            uncounted: 0,
            rest: 0,
            rest_at: None,
        }
    }

    pub(super) fn mode(&self) -> GuardMode {
        self.mode
    }

    /// `None`: there is no guard.
    pub(super) fn counts(&self) -> Option<GuardCounts> {
        self.thread.as_ref().map(|_| self.counts)
    }

    pub(super) fn thread(&self) -> Option<&GuardThread> {
        self.thread.as_ref()
    }

    /// Waits for a report of the thread.
    pub(super) async fn ready(&mut self) {
        match &mut self.thread {
            Some(thread) => thread.ready().await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn try_report(&mut self) -> Option<GuardReport> {
        let report = self.thread.as_mut()?.try_report()?;
        self.counts = report.counts;
        Some(report)
    }

    pub(super) fn ended_thread(&self) -> Option<&'static str> {
        self.thread.as_ref().filter(|thread| thread.has_ended()).map(|_| "guard")
    }

    /// Detaches the program everywhere.
    pub(super) async fn stop(&mut self) {
        if let Some(thread) = &mut self.thread
            && tokio::time::timeout(Duration::from_secs(5), thread.stop()).await.is_err()
        {
            log::warn!("the guard could not be detached in time");
        }
    }

    /// A connect to itself was refused. `Some`: an event is due.
    pub(super) fn on_prevention(&mut self, prevention: &Prevention, now: Instant) -> Option<DuePrevention> {
        self.rest_at.get_or_insert(now + REST_INTERVAL);
        let Opener { task, start_ns, at_ns, .. } = prevention.opener;
        let process = if at_ns == 0 { (0, 0) } else { (task.pid, start_ns) };
        let key = (process.0, process.1, prevention.endpoint.port);
        let is_known = self.by_process.contains_key(&key);
        if !is_known && (self.by_process.len() >= MAX_COUNTED || !self.may_emit(now)) {
            self.uncounted += 1;
            return None;
        }
        if !is_known {
            let counted = Counted { newest: *prevention, pending: 0, emitted_at: now };
            self.by_process.insert(key, counted);
            return Some(DuePrevention { newest: Some(*prevention), count: 1 });
        }
        if let Some(counted) = self.by_process.get_mut(&key) {
            counted.newest = *prevention;
            counted.pending += 1;
        }
        None
    }

    /// True if there may be one more event in this second.
    fn may_emit(&mut self, now: Instant) -> bool {
        if self.second_began.is_none_or(|began| now.duration_since(began) >= Duration::from_secs(1)) {
            (self.second_began, self.events) = (Some(now), 0);
        }
        self.events += 1;
        self.events <= MAX_EVENTS
    }

    /// When an event is due, or something is to be forgotten.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let due =
            |counted: &Counted| counted.emitted_at + if counted.pending > 0 { EVENT_INTERVAL } else { IDLE };
        self.by_process.values().map(due).chain(self.rest_at).min()
    }

    /// The events that are due. `lost`: records that the program could not write so far. `all`: also what is pending,
    /// because the run ends.
    pub(super) fn take_due(&mut self, now: Instant, lost: u64, all: bool) -> Vec<DuePrevention> {
        let mut due = Vec::new();
        self.by_process.retain(|_, counted| {
            let since = now.duration_since(counted.emitted_at);
            if counted.pending > 0 && (all || since >= EVENT_INTERVAL) {
                let count = std::mem::take(&mut counted.pending);
                counted.emitted_at = now;
                due.push(DuePrevention { newest: Some(counted.newest), count });
                return true;
            }
            since < IDLE || counted.pending > 0
        });
        if all || self.rest_at.is_some_and(|at| at <= now) {
            let rest = lost + self.uncounted;
            if rest > self.rest {
                due.push(DuePrevention { newest: None, count: rest - self.rest });
                self.rest = rest;
            }
            self.rest_at = (!all && !self.by_process.is_empty()).then_some(now + REST_INTERVAL);
        }
        due
    }
}

/// The attempt as a connection.
pub(super) fn connection_of(prevention: &Prevention) -> Connection {
    let opener = (prevention.opener.at_ns != 0).then_some(prevention.opener);
    let cookie = (prevention.cookie != 0).then_some(prevention.cookie);
    Connection {
        cookie,
        uid: Some(prevention.uid),
        opener,
        ..Connection::new(0, Source::Live, prevention.endpoint)
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{Endpoint, Task};
    use zerocopy::FromZeros as _;

    use super::*;

    fn prevention(pid: u32, port: u16) -> Prevention {
        let opener = Opener { at_ns: 1, task: Task { pid, ..Task::UNKNOWN }, ..Opener::UNKNOWN };
        let endpoint = Endpoint { port, ..Endpoint::UNKNOWN };
        Prevention { endpoint, opener, ..Prevention::new_zeroed() }
    }

    fn total(due: &[DuePrevention]) -> u64 {
        due.iter().map(|due| due.count).sum()
    }

    #[test]
    fn events_are_bounded_and_their_counts_are_exact() {
        let mut monitor = GuardMonitor::new(GuardMode::Refuse, None);
        let (mut events, mut counted, mut now) = (0, 0, Instant::now());
        for round in 1..=40 {
            for _ in 0..1_000 {
                let due = monitor.on_prevention(&prevention(7, 80), now);
                events += due.iter().count();
                counted += due.map_or(0, |due| due.count);
            }
            // Three records are lost in the fifth round.
            let due = monitor.take_due(now, if round < 5 { 0 } else { 3 }, false);
            assert!(due.iter().all(|due| due.newest.is_none() == (due.count == 3)), "{due:?}");
            events += due.len();
            counted += total(&due);
            now += Duration::from_millis(50);
        }
        counted += total(&monitor.take_due(now, 3, true));
        assert_eq!(counted, 40_003);
        assert!((18..=24).contains(&events), "{events}");
        assert!(monitor.take_due(now + 2 * IDLE, 3, false).is_empty());
        assert_eq!(monitor.next_at(), None, "nothing is left to do");
    }

    #[test]
    fn processes_and_ports_are_counted_apart_up_to_a_number() {
        let mut monitor = GuardMonitor::new(GuardMode::Refuse, None);
        let now = Instant::now();
        for (pid, port) in [(7, 80), (7, 81), (8, 80)] {
            assert_eq!(monitor.on_prevention(&prevention(pid, port), now).map(|due| due.count), Some(1));
        }
        let flood = (100..5_100).filter_map(|pid| monitor.on_prevention(&prevention(pid, 80), now)).count();
        assert_eq!(flood, MAX_EVENTS as usize - 3);
        let mut rest = 0;
        for seconds in 2..5 {
            rest += total(&monitor.take_due(now + Duration::from_secs(seconds), 0, false));
        }
        assert_eq!(rest, 5_000 - flood as u64);
    }
}
