//! How many slots of descriptor tables a pass of the iterator may look at. A slot that has no descriptor costs time,
//! too, and the kernel looks at any number of them in one read(2), which nothing interrupts. A table never shrinks, and
//! of each thread whose table is not the first thread's the kernel looks at the whole table. Pure.

use crate::system::process::status_field;

/// A pass over all processes is made only if their tables have no more slots than this. A slot without a descriptor
/// costs one or two nanoseconds, so these cost some 0.2 s.
const MAX_PASS_SLOTS: u64 = 100_000_000;

/// The same for a visit of one process.
const MAX_VISIT_SLOTS: u64 = 64 * DEFAULT_NR_OPEN;

/// The kernel's default of `fs.nr_open`, the maximum number of descriptors of a process (fs/file.c at v6.12).
const DEFAULT_NR_OPEN: u64 = 1 << 20;

// A larger number of slots than this says no more.
const _: () = {
    assert!(MAX_PASS_SLOTS < u32::MAX as u64);
    assert!(MAX_VISIT_SLOTS < u32::MAX as u64);
};

/// Of this many threads the size of one more table is read.
const THREADS_PER_SAMPLE: usize = 64;

/// Maximum number of threads of a process of which the size of the table is read.
const MAX_SAMPLES: usize = 64;

/// What of a process is visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visit {
    AllThreads,
    /// The others may have too many tables of their own.
    FirstThread,
    /// Its first thread has ended, and of the others any could be visited only with all.
    Nothing,
}

/// The descriptor tables of one process. Few bytes, because lists of all processes have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WalkCost {
    /// How many slots the kernel may look at, or the largest number.
    slots: u32,
    /// False: it has ended, or has no table.
    has_first_thread: bool,
}

impl WalkCost {
    /// By the text of `/proc/PID/status`. Calls `sample` with the number of other threads whose tables are to be looked
    /// at; it returns their sizes, or `None` if they can't be read.
    pub(super) fn new(status: &[u8], sample: impl FnOnce(usize) -> Option<Vec<u64>>) -> Self {
        let number = |name| status_field(status, name).and_then(|field| field.parse::<u64>().ok());
        // Without a table, because the first thread has ended, there is no size, or it is 0 (`task_state`,
        // fs/proc/array.c at v6.12).
        let first_slots = number("FDSize").unwrap_or(0);
        let others = number("Threads").unwrap_or(0).saturating_sub(1);
        let other_slots = match samples_of(others) {
            0 => Some(0),
            count => sample(count).map(|sizes| average(&sizes)),
        };
        // That the tables of other threads are the first thread's is not known, so each counts.
        let other_slots = match other_slots {
            // Without the first thread the other threads' table is looked at for each, and may grow at any time.
            Some(slots) if first_slots == 0 => slots.max(DEFAULT_NR_OPEN),
            Some(slots) => slots,
            None => DEFAULT_NR_OPEN.max(first_slots),
        };
        let slots = first_slots.saturating_add(others.saturating_mul(other_slots));
        Self { slots: u32::try_from(slots).unwrap_or(u32::MAX), has_first_thread: first_slots != 0 }
    }

    /// How many slots the kernel may look at: `u32::MAX` if there are more.
    pub(super) fn slots(&self) -> u64 {
        self.slots.into()
    }

    pub(super) fn visit(&self) -> Visit {
        match self.slots() {
            0..=MAX_VISIT_SLOTS => Visit::AllThreads,
            _ if !self.has_first_thread => Visit::Nothing,
            _ => Visit::FirstThread,
        }
    }
}

/// How many threads of this many are looked at. A user who hides tables has to give them to some hundred threads, and
/// does not know which threads are looked at.
fn samples_of(threads: u64) -> usize {
    let threads = usize::try_from(threads).unwrap_or(usize::MAX);
    threads.min(1 + threads / THREADS_PER_SAMPLE).min(MAX_SAMPLES)
}

fn average(sizes: &[u64]) -> u64 {
    let sum = sizes.iter().fold(0_u64, |sum, size| sum.saturating_add(*size));
    sum.div_ceil(sizes.len().max(1) as u64)
}

/// True if a pass over all processes with these costs may be made.
pub(super) fn permits_pass(costs: impl Iterator<Item = WalkCost>) -> bool {
    costs.fold(0_u64, |sum, cost| sum.saturating_add(cost.slots())) <= MAX_PASS_SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process with this many threads, of which the tables of all but the first have this size.
    fn cost(first_slots: u64, threads: u64, others: Option<u64>) -> WalkCost {
        let status = format!("Name:\ta\nFDSize:\t{first_slots}\nThreads:\t{threads}\n");
        WalkCost::new(status.as_bytes(), |count| Some(vec![others?; count]))
    }

    #[test]
    fn a_process_costs_its_tables_and_one_whose_first_thread_has_ended_a_large_one_for_each_thread() {
        const MI: u64 = 1 << 20;
        const MAX: u64 = u32::MAX as u64;
        for (of, slots, visit) in [
            (cost(64, 1, None), 64, Visit::AllThreads),
            // A zombie.
            (cost(0, 1, None), 0, Visit::AllThreads),
            (cost(0, 0, None), 0, Visit::AllThreads),
            (cost(256, 500, Some(256)), 256 * 500, Visit::AllThreads),
            (cost(MI, 64, Some(MI)), 64 * MI, Visit::AllThreads),
            (cost(MI, 65, Some(MI)), 65 * MI, Visit::FirstThread),
            // The first thread has a small table for itself.
            (cost(64, 4_000, Some(MI)), 64 + 3_999 * MI, Visit::FirstThread),
            (cost(64, 4_000, None), 64 + 3_999 * MI, Visit::FirstThread),
            (cost(64, 10_000, Some(MI)), MAX, Visit::FirstThread),
            (cost(64, 10_000, None), MAX, Visit::FirstThread),
            // The first thread has ended.
            (cost(0, 65, Some(64)), 64 * MI, Visit::AllThreads),
            (cost(0, 66, Some(64)), 65 * MI, Visit::Nothing),
            (cost(0, 4_000, Some(MI / 2)), 3_999 * MI, Visit::Nothing),
            (cost(0, 10_000, Some(MI / 2)), MAX, Visit::Nothing),
            (cost(0, 3, Some(1_000 * MI)), 2_000 * MI, Visit::Nothing),
            (cost(u64::MAX, u64::MAX, Some(u64::MAX)), MAX, Visit::FirstThread),
        ] {
            assert_eq!((of.slots(), of.visit()), (slots, visit), "{of:?}");
        }
        let without_a_size = WalkCost::new(b"Name:\ta\nThreads:\t3\n", |count| Some(vec![64; count]));
        assert!(!without_a_size.has_first_thread);
    }

    #[test]
    fn more_threads_are_looked_at_the_more_there_are_but_not_too_many() {
        for (threads, samples) in [(0, 0), (1, 1), (63, 1), (64, 2), (500, 8), (u64::MAX, 64)] {
            assert_eq!(samples_of(threads), samples, "{threads}");
        }
        assert_eq!((average(&[]), average(&[1, 2]), average(&[64, 64])), (0, 2, 64));
    }

    #[test]
    fn a_pass_is_made_on_a_busy_host_and_not_if_a_user_has_large_tables_for_each_of_many_threads() {
        let servers = (0..200).map(|_| cost(1_024, 100, Some(1_024)));
        assert!(permits_pass(servers.clone()));
        assert!(!permits_pass(servers.clone().chain([cost(0, 100, Some(64))])));
        assert!(!permits_pass(servers.clone().chain([cost(64, 5_000, Some(1 << 19))])));
        assert!(!permits_pass(servers.chain((0..200).map(|_| cost(1 << 19, 1, None)))));
    }
}
