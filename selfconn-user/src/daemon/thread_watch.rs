//! Logs that a thread hangs, once, and that it goes on. Without `--metrics` nobody would learn of it. The end of a
//! thread needs no line here, because the panic that causes it prints one.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use crate::system::busy::ThreadProblem;

/// Time between two looks. A thread hangs if it is busy for as long.
const INTERVAL: Duration = Duration::from_mins(1);

/// The threads that hang, as far as it is logged.
pub(super) struct ThreadWatch {
    next_at: Instant,
    hanging: BTreeSet<&'static str>,
}

impl Default for ThreadWatch {
    fn default() -> Self {
        Self { next_at: Instant::now() + INTERVAL, hanging: BTreeSet::new() }
    }
}

impl ThreadWatch {
    /// When the threads are looked at next.
    pub(super) fn next_at(&self) -> Instant {
        self.next_at
    }

    /// Logs what has changed since the last look.
    pub(super) fn look(&mut self, problems: impl Iterator<Item = (&'static str, ThreadProblem)>) {
        self.next_at = Instant::now() + INTERVAL;
        for line in self.changes(problems) {
            log::warn!("{line}");
        }
    }

    fn changes(&mut self, problems: impl Iterator<Item = (&'static str, ThreadProblem)>) -> Vec<String> {
        let (mut lines, mut now) = (Vec::new(), BTreeSet::new());
        for (name, problem) in problems {
            if let ThreadProblem::Busy(_) = problem {
                now.insert(name);
                if !self.hanging.contains(name) {
                    lines.push(format!("the thread {name} hangs: {problem}; its work is not done meanwhile"));
                }
            }
        }
        let over = self.hanging.difference(&now);
        lines.extend(over.map(|name| format!("the thread {name} no longer hangs")));
        self.hanging = now;
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_hangs_is_logged_once_and_once_more_when_it_is_over() {
        let mut watch = ThreadWatch::default();
        let busy = |seconds| ThreadProblem::Busy(Duration::from_secs(seconds));
        for (problems, lines) in [
            (vec![], vec![]),
            (
                vec![("reader", busy(61)), ("facts", ThreadProblem::Ended)],
                vec!["the thread reader hangs: it has been busy for 61 s; its work is not done meanwhile"],
            ),
            (vec![("reader", busy(121))], vec![]),
            (
                vec![("holders", busy(90)), ("reader", busy(181))],
                vec!["the thread holders hangs: it has been busy for 90 s; its work is not done meanwhile"],
            ),
            (vec![("holders", busy(150))], vec!["the thread reader no longer hangs"]),
            (vec![], vec!["the thread holders no longer hangs"]),
            (vec![], vec![]),
        ] {
            assert_eq!(watch.changes(problems.into_iter()), lines);
        }
    }
}
