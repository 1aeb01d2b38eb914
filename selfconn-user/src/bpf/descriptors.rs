//! The iterator over the descriptors of all tasks. A pass yields each held self-connection of every network
//! namespace with its process. It enters no namespace and touches no process.

use std::{io, ops::ControlFlow};

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

/// The attached iterator. Dropping it detaches the program.
#[derive(Debug)]
pub struct DescriptorIter(BpfIter<SocketDescriptor>);

impl DescriptorIter {
    /// Walks the descriptors of all tasks once, and calls `each` for every record. A descriptor that a task
    /// gets while the walk is past it is not seen; a process whose first thread has ended is seen once for
    /// each of its other threads.
    ///
    /// # Errors
    /// If the kernel refuses to start the walk or to go on.
    pub fn pass(&self, mut each: impl FnMut(&SocketDescriptor)) -> io::Result<()> {
        self.0.pass(|record| {
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
    Ok(DescriptorIter(iter))
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
