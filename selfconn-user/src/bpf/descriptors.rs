//! The iterator over the descriptors of all tasks. A pass yields each held self-connection of every network
//! namespace with its process. It enters no namespace and touches no process.

use std::{
    io,
    ops::ControlFlow,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aya::Ebpf;
use selfconn_ebpf::{SocketDescriptor, names};

use super::{
    features::KernelFeatures,
    iterator::BpfIter,
    link::IterTasks,
    object,
    programs::KernelBtf,
    refusal::{Refusal, refusal_by_errno},
};

/// The name of the iterator, as events and `doctor` show it.
pub const NAME: &str = "task_file";

/// After a pass that took too long, none over all tasks is made for this time. The time doubles with each further such
/// pass, because a user may make a pass last long whenever there is one.
const MIN_PAUSE: Duration = Duration::from_mins(10);
const MAX_PAUSE: Duration = Duration::from_hours(24);

/// The attached iterator. Dropping it detaches the program.
#[derive(Debug)]
pub struct DescriptorIter {
    iter: BpfIter<SocketDescriptor>,
    pause: Mutex<Pause>,
}

/// The time in which no pass over all tasks is made.
#[derive(Debug, Default)]
struct Pause {
    until: Option<Instant>,
    length: Duration,
}

impl Pause {
    fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// A pass took too long. If two passes did so at the same time, that counts once. A day without a pause makes
    /// the next one short again.
    fn begin(&mut self, now: Instant) {
        let Some(until) = self.until.filter(|until| now < *until + MAX_PAUSE) else {
            *self = Self { until: Some(now + MIN_PAUSE), length: MIN_PAUSE };
            return;
        };
        if now >= until {
            self.length = (2 * self.length).min(MAX_PAUSE);
            self.until = Some(now + self.length);
        }
    }
}

impl DescriptorIter {
    /// Walks the descriptors of all tasks once, and calls `each` for every record. A descriptor that a task
    /// gets while the walk is past it is not seen; a process whose first thread has ended is seen once for
    /// each of its other threads.
    ///
    /// The walk may take longer than `limit`: the time is looked at between two calls of read(2). Each returns after a
    /// million descriptors, but empty slots of tables don't count (`bpf_seq_read`, kernel/bpf/bpf_iter.c, and
    /// `task_file_seq_get_next`, kernel/bpf/task_iter.c, both at v6.12).
    ///
    /// # Errors
    /// If the kernel refuses to start the walk or to go on. `TimedOut`: the walk took longer than `limit`, and `each`
    /// was called for a part of the records.
    pub fn pass(&self, limit: Duration, mut each: impl FnMut(&SocketDescriptor)) -> io::Result<()> {
        self.iter.pass(limit, |record| {
            each(record);
            ControlFlow::Continue(())
        })
    }

    /// True if no pass over all tasks is made for some time, because one took too long.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        !self.pause().is_over(Instant::now())
    }

    /// A pass over all tasks took too long.
    pub(crate) fn begin_pause(&self) {
        self.pause().begin(Instant::now());
    }

    fn pause(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::pass`], but walks the descriptors of this process only. `pid` is an id in the pid namespace of the
    /// calling process. Linux 6.1 may walk them twice if the process has several threads (seen on 6.1.192).
    ///
    /// # Errors
    /// If the kernel refuses, as every one before Linux 6.1 does (`E2BIG`). `TimedOut`: `until` was reached.
    pub fn pass_of_process(
        &self,
        pid: u32,
        until: Instant,
        each: impl FnMut(&SocketDescriptor),
    ) -> io::Result<()> {
        self.pass_of(IterTasks::OfProcess(pid), until, each)
    }

    /// As [`Self::pass_of_process`], but walks the descriptor table of the first thread only. If that thread has ended,
    /// it has none.
    ///
    /// # Errors
    /// As [`Self::pass_of_process`].
    pub fn pass_of_first_thread(
        &self,
        pid: u32,
        until: Instant,
        each: impl FnMut(&SocketDescriptor),
    ) -> io::Result<()> {
        self.pass_of(IterTasks::FirstThread(pid), until, each)
    }

    fn pass_of(
        &self,
        tasks: IterTasks,
        until: Instant,
        mut each: impl FnMut(&SocketDescriptor),
    ) -> io::Result<()> {
        self.iter.pass_of(tasks, until, |record| {
            each(record);
            ControlFlow::Continue(())
        })
    }
}

/// Loads and attaches the iterator.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    features: &KernelFeatures,
    kernel_btf: &KernelBtf<'_>,
) -> Result<DescriptorIter, Refusal> {
    features.check_descriptors()?;
    let iter =
        BpfIter::attach(ebpf, names::DESCRIPTORS, NAME, kernel_btf).map_err(|why| features.explain(why))?;
    Ok(DescriptorIter { iter, pause: Mutex::default() })
}

/// Attaches the iterator, and nothing else.
///
/// # Errors
/// The reason why this kernel does not have it.
pub fn open(features: &KernelFeatures) -> Result<DescriptorIter, Refusal> {
    features.check_descriptors()?;
    attach(&mut object::load_for_iterator(features)?, features, &KernelBtf::new(features))
}

/// Attaches the iterator for a command.
///
/// # Errors
/// As [`open`], as text for people.
pub fn open_for_command() -> Result<DescriptorIter, String> {
    open(KernelFeatures::for_command()?).map_err(|refusal| refusal.to_string())
}

/// How long a pass may take that shows whether one is possible. It need not come to its end.
const MAX_PROBE: Duration = Duration::from_secs(1);

/// Attaches the iterator for a moment, and makes a pass, to find out whether this kernel supports it. The pass is over
/// this process, or over all where only that is possible.
///
/// # Errors
/// As [`open`].
pub fn probe(features: &KernelFeatures) -> Result<(), Refusal> {
    let iter = open(features)?;
    let of_process = iter.pass_of_process(std::process::id(), Instant::now() + MAX_PROBE, |_| {});
    match of_process.or_else(|_| iter.pass(MAX_PROBE, |_| {})) {
        Err(error) if error.kind() != io::ErrorKind::TimedOut => {
            Err(refusal_by_errno("BPF_ITER_CREATE", &error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_a_day_and_is_short_again_after_a_day_without_one() {
        let mut now = Instant::now();
        let mut pause = Pause::default();
        assert!(pause.is_over(now));
        for minutes in [10, 20, 40, 80, 160, 320, 640, 1_280, 1_440, 1_440] {
            pause.begin(now);
            // The same pass took too long for another thread, too.
            pause.begin(now + Duration::from_secs(1));
            let end = now + Duration::from_mins(minutes);
            assert!(!pause.is_over(end - Duration::from_millis(1)), "{minutes}");
            assert!(pause.is_over(end), "{minutes}");
            now = end;
        }
        now += MAX_PAUSE;
        pause.begin(now);
        assert!(pause.is_over(now + MIN_PAUSE));
    }
}
