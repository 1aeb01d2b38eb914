//! The iterator over the descriptors of all tasks. A pass yields each held self-connection of every network
//! namespace with its process. It enters no namespace and touches no process.

use std::{
    io,
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
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

/// After a pass that took too long, none is tried for this time.
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
    /// If the kernel refuses to start the walk or to go on. `TimedOut`: it took too long, and `each` was called for a
    /// part of the records; or one took too long a while ago, and it was called for none.
    pub fn pass(&self, mut each: impl FnMut(&SocketDescriptor)) -> io::Result<()> {
        let given_up_at = || self.given_up_at.lock().unwrap_or_else(PoisonError::into_inner);
        if given_up_at().is_some_and(|at| at.elapsed() < PAUSE) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let outcome = self.iter.pass(|record| {
            each(record);
            ControlFlow::Continue(())
        });
        let is_too_long = outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        *given_up_at() = is_too_long.then(Instant::now);
        outcome
    }

    /// As [`Self::pass`], but walks the descriptors of this process only. `pid` is an id as in this process's `/proc`.
    ///
    /// # Errors
    /// If the kernel refuses, as every one before Linux 6.1 does. `TimedOut`: it took until then.
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

/// Attaches the iterator for a moment, and makes a pass, to find out whether this kernel supports it.
///
/// # Errors
/// As [`open`].
pub fn probe(features: &KernelFeatures) -> Result<(), Refusal> {
    open(features)?.pass(|_| {}).map_err(|error| refusal_by_errno("BPF_ITER_CREATE", &error))
}
