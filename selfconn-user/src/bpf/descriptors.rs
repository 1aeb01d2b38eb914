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
    object,
    programs::KernelBtf,
    refusal::{Refusal, refusal_by_errno},
};

/// The name of the iterator, as events and `doctor` show it.
pub const NAME: &str = "task_file";

/// After a pass that took too long, none over all tasks is made for this time.
const PAUSE: Duration = Duration::from_mins(10);

/// The attached iterator. Dropping it detaches the program.
#[derive(Debug)]
pub struct DescriptorIter {
    iter: BpfIter<SocketDescriptor>,
    /// When a pass last took too long.
    given_up_at: Mutex<Option<Instant>>,
}

impl DescriptorIter {
    /// Walks the descriptors of all tasks once, and calls `each` for every record. A descriptor that a task
    /// gets while the walk is past it is not seen; a process whose first thread has ended is seen once for
    /// each of its other threads.
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

    /// True if a pass took too long less than ten minutes ago.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.given_up_at().is_some_and(|at| at.elapsed() < PAUSE)
    }

    pub(crate) fn set_paused(&self, is_paused: bool) {
        *self.given_up_at() = is_paused.then(Instant::now);
    }

    fn given_up_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.given_up_at.lock().unwrap_or_else(PoisonError::into_inner)
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
        mut each: impl FnMut(&SocketDescriptor),
    ) -> io::Result<()> {
        self.iter.pass_of_process(pid, until, |record| {
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
    Ok(DescriptorIter { iter, given_up_at: Mutex::new(None) })
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

/// Attaches the iterator for a moment, and makes a pass, to find out whether this kernel supports it.
///
/// # Errors
/// As [`open`].
pub fn probe(features: &KernelFeatures) -> Result<(), Refusal> {
    match open(features)?.pass(MAX_PROBE, |_| {}) {
        Err(error) if error.kind() != io::ErrorKind::TimedOut => {
            Err(refusal_by_errno("BPF_ITER_CREATE", &error))
        }
        _ => Ok(()),
    }
}
