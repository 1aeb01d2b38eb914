//! When a CPU of this machine stood still: it did not even run a thread that preempts every other one. A virtual machine's
//! host gives its CPUs to others; what waits for such a CPU does not wait for selfconn.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use super::scheduling::{allowed_cpus, stay_on, take_real_time_priority};

/// How often each CPU is asked for.
const PERIOD: Duration = Duration::from_millis(2);

/// What is longer than this is no wake-up that was a bit late.
const MIN_LENGTH: Duration = Duration::from_millis(10);

/// The times in which at least one CPU stood still.
#[derive(Debug, Default)]
pub(crate) struct Standstills(Vec<(Instant, Instant)>);

impl Standstills {
    /// How long a CPU stood still between these.
    pub(crate) fn between(&self, from: Instant, to: Instant) -> Duration {
        let (mut sum, mut counted_to) = (Duration::ZERO, from);
        for &(began, ended) in &self.0 {
            let (began, ended) = (began.max(counted_to), ended.min(to));
            sum += ended.saturating_duration_since(began);
            counted_to = counted_to.max(ended);
        }
        sum
    }

    /// The longest one.
    pub(crate) fn longest(&self) -> Duration {
        self.0.iter().map(|(began, ended)| *ended - *began).max().unwrap_or_default()
    }
}

/// Runs this, and watches the CPUs meanwhile. Where the host allows no real-time priority, none is known to stand still.
pub(crate) fn watching_cpus<T>(run: impl FnOnce() -> T) -> (T, Standstills) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let is_over = &is_over;
        let watch = |cpu| scope.spawn(move || watch(cpu, is_over));
        let watching: Vec<_> = allowed_cpus().into_iter().map(watch).collect();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        is_over.store(true, Relaxed);
        let mut all: Vec<_> = watching.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        all.sort_unstable();
        let outcome = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (outcome, Standstills(all))
    })
}

fn watch(cpu: usize, is_over: &AtomicBool) -> Vec<(Instant, Instant)> {
    stay_on(cpu);
    let mut found = Vec::new();
    if !take_real_time_priority() {
        return found;
    }
    while !is_over.load(Relaxed) {
        let due = Instant::now() + PERIOD;
        thread::sleep(PERIOD);
        let now = Instant::now();
        if now - due > MIN_LENGTH {
            found.push((due, now));
        }
    }
    found
}

#[test]
fn what_two_cpus_stand_still_together_counts_once() {
    let began = Instant::now();
    let at = |ms| began + Duration::from_millis(ms);
    let found = Standstills(vec![(at(10), at(40)), (at(20), at(30)), (at(35), at(60)), (at(100), at(200))]);
    for (from, to, sum) in [(0, 300, 150), (0, 5, 0), (15, 50, 35), (70, 90, 0), (150, 160, 10)] {
        assert_eq!(found.between(at(from), at(to)), Duration::from_millis(sum), "{from} {to}");
    }
    assert_eq!(found.longest(), Duration::from_millis(100));
}
