//! How long a thread has been busy, as another thread sees it, and what follows from that. A thread that hangs ends
//! nothing and answers nothing, so nobody else would notice it.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// A thread that is busy for longer hangs. The longest work is a look at the sockets or the processes of a host with
/// very many, which takes seconds; what takes longer is given up.
pub const MAX_BUSY: Duration = Duration::from_secs(60);

/// Why a thread does its work no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadProblem {
    /// A panic has ended it.
    Ended,
    /// It has been busy with one thing for this long, so it hangs.
    Busy(Duration),
}

impl fmt::Display for ThreadProblem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => out.write_str("it has ended"),
            Self::Busy(time) => write!(out, "it has been busy for {} s", time.as_secs()),
        }
    }
}

/// The threads of this process that a panic has ended.
static PANICKED: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

/// Names of the threads that a panic has ended, of all that [`super::capabilities::spawn_restricted`] has started.
#[must_use]
pub fn panicked_threads() -> BTreeSet<&'static str> {
    PANICKED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Notes the end of its thread if that is a panic.
pub(super) struct PanicNote(pub(super) &'static str);

impl Drop for PanicNote {
    fn drop(&mut self) {
        if thread::panicking() {
            PANICKED.lock().unwrap_or_else(PoisonError::into_inner).insert(self.0);
        }
    }
}

/// What a thread notes, and others read. The clock stands still while the host is suspended.
#[derive(Clone, Debug)]
pub struct BusyClock {
    origin: Instant,
    /// Milliseconds from `origin` to the beginning of what the thread does. `IDLE`: it waits for work.
    since_ms: Arc<AtomicU64>,
}

const IDLE: u64 = u64::MAX;

impl Default for BusyClock {
    fn default() -> Self {
        Self { origin: Instant::now(), since_ms: Arc::new(AtomicU64::new(IDLE)) }
    }
}

impl BusyClock {
    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(IDLE)
    }

    /// The thread begins with something.
    pub fn begin(&self) {
        self.since_ms.store(self.elapsed_ms(), Ordering::Relaxed);
    }

    /// The thread waits for work.
    pub fn rest(&self) {
        self.since_ms.store(IDLE, Ordering::Relaxed);
    }

    /// What is wrong with the thread.
    #[must_use]
    pub fn problem(&self, has_ended: bool) -> Option<ThreadProblem> {
        if has_ended {
            return Some(ThreadProblem::Ended);
        }
        self.busy_beyond(MAX_BUSY).map(ThreadProblem::Busy)
    }

    fn busy_beyond(&self, limit: Duration) -> Option<Duration> {
        let since_ms = self.since_ms.load(Ordering::Relaxed);
        let busy = Duration::from_millis(self.elapsed_ms().checked_sub(since_ms)?);
        (since_ms != IDLE && busy >= limit).then_some(busy)
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::CapabilitySet;

    use super::*;
    use crate::system::capabilities;

    #[test]
    fn a_panic_of_any_thread_is_noted_and_an_orderly_end_is_not() {
        let start = |name, run: fn()| {
            capabilities::spawn_restricted(name, CapabilitySet::empty(), run).unwrap();
        };
        let until = Instant::now() + Duration::from_secs(10);
        start("ends", || ());
        // A panic without a message.
        start("panics", || std::panic::resume_unwind(Box::new(())));
        while !panicked_threads().contains("panics") {
            assert!(Instant::now() < until, "{:?}", panicked_threads());
            thread::sleep(Duration::from_millis(1));
        }
        assert!(!panicked_threads().contains("ends"));
    }

    #[test]
    fn a_thread_is_overdue_after_a_minute_of_work_and_not_while_it_waits() {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let clock = |seconds| BusyClock { origin: ago(seconds), ..BusyClock::default() };
        for (seconds, is_overdue) in [(59, false), (61, true)] {
            let clock = clock(seconds);
            assert_eq!(clock.problem(false), None, "it waits");
            clock.since_ms.store(0, Ordering::Relaxed);
            assert_eq!(clock.problem(false).is_some(), is_overdue, "{seconds} s");
            assert_eq!(clock.problem(true), Some(ThreadProblem::Ended));
            clock.rest();
            assert_eq!(clock.problem(false), None);
            clock.begin();
            assert_eq!(clock.problem(false), None, "its next work");
            assert!(clock.busy_beyond(Duration::ZERO).is_some());
        }
        let problem = ThreadProblem::Busy(Duration::from_millis(61_500));
        assert_eq!(problem.to_string(), "it has been busy for 61 s");
    }
}
