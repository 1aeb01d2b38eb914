//! The iterator that lists the network namespaces that exist, from the kernel's own list: also one that no process,
//! no descriptor and no mount leads to. A namespace that is not in the list has ended.

use std::{
    io,
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use aya::Ebpf;
use selfconn_ebpf::{NamespaceRecord, names, namespace::element};

use super::{
    features::KernelFeatures,
    iterator::BpfIter,
    object,
    programs::KernelBtf,
    refusal::{Refusal, refusal_by_errno},
};

/// The name of the iterator, as events and `doctor` show it.
pub const NAME: &str = "task";

/// A walk is lost if a namespace ends while the walk stands there, between two calls of the program.
const MAX_WALKS: usize = 5;

/// A pass visits at most 64 namespaces for each task of the pid namespace. A walk goes on in the next one.
const MAX_PASSES: usize = 1_024;

/// How long one pass may take.
const MAX_PASS: Duration = Duration::from_secs(5);

/// The attached iterator. Dropping it detaches the program.
#[derive(Debug)]
pub struct NamespaceIter {
    iter: BpfIter<NamespaceRecord>,
    /// False if a walk was given up, so that the next pass goes on with it.
    is_at_beginning: AtomicBool,
}

impl NamespaceIter {
    /// Lists all network namespaces that existed when it was called and still exist. One that ends or begins
    /// meanwhile may be missing or listed. One that waits to be cleaned up has ended.
    ///
    /// # Errors
    /// If the kernel refuses to start a pass or to go on, or if no walk was complete.
    pub fn list(&self) -> io::Result<Vec<NamespaceRecord>> {
        if !self.is_at_beginning.load(Ordering::Relaxed) {
            self.walk()?;
        }
        for _ in 0..MAX_WALKS {
            if let Some(namespaces) = self.walk()?.finish()? {
                return Ok(namespaces);
            }
        }
        Err(io::Error::other("the walk over the namespaces was interrupted too often"))
    }

    /// Makes passes until a walk is over.
    fn walk(&self) -> io::Result<Walk> {
        self.is_at_beginning.store(false, Ordering::Relaxed);
        let walk = walk(|each| self.iter.pass(MAX_PASS, each))?;
        self.is_at_beginning.store(true, Ordering::Relaxed);
        Ok(walk)
    }
}

fn walk(
    mut pass: impl FnMut(&mut dyn FnMut(&NamespaceRecord) -> ControlFlow<()>) -> io::Result<()>,
) -> io::Result<Walk> {
    let mut walk = Walk::default();
    for _ in 0..MAX_PASSES {
        let before = walk.elements;
        pass(&mut |record| walk.add(record))?;
        if walk.is_over() {
            return Ok(walk);
        }
        if walk.elements == before {
            return Err(io::Error::other("the walk over the namespaces does not go on"));
        }
    }
    Err(io::Error::other(format!("there are more than {} namespaces", walk.namespaces.len())))
}

/// What a pass has written so far.
#[derive(Default)]
struct Walk {
    namespaces: Vec<NamespaceRecord>,
    heads: usize,
    elements: usize,
    /// One of [`element`].
    last: u32,
}

impl Walk {
    fn add(&mut self, record: &NamespaceRecord) -> ControlFlow<()> {
        self.last = record.element;
        self.elements += 1;
        match record.element {
            element::NAMESPACE => self.namespaces.push(*record),
            element::ENDED => {}
            element::HEAD => self.heads += 1,
            element::LAST => {
                self.namespaces.push(*record);
                return ControlFlow::Break(());
            }
            _ => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn is_over(&self) -> bool {
        matches!(self.last, element::LAST | element::LOST)
    }

    /// `None`: the walk was lost.
    fn finish(self) -> io::Result<Option<Vec<NamespaceRecord>>> {
        match (self.last, self.heads) {
            (element::LOST, _) => Ok(None),
            // Anything else than one head is no list of namespaces.
            (_, 1) => Ok(Some(self.namespaces)),
            (_, heads) => Err(io::Error::other(format!("the list of namespaces has {heads} heads"))),
        }
    }
}

/// Loads and attaches the iterator.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    features: &KernelFeatures,
    kernel_btf: &KernelBtf<'_>,
) -> Result<NamespaceIter, Refusal> {
    features.check_namespaces()?;
    let iter =
        BpfIter::attach(ebpf, names::NAMESPACES, NAME, kernel_btf).map_err(|why| features.explain(why))?;
    Ok(NamespaceIter { iter, is_at_beginning: AtomicBool::new(true) })
}

/// Attaches the iterator, and nothing else.
///
/// # Errors
/// The reason why this kernel does not have it.
pub fn open(features: &KernelFeatures) -> Result<NamespaceIter, Refusal> {
    features.check_namespaces()?;
    attach(&mut object::load_for_iterator(features)?, features, &KernelBtf::new(features))
}

/// Attaches the iterator for a command.
///
/// # Errors
/// As [`open`], as text for people.
pub fn open_for_command() -> Result<NamespaceIter, String> {
    open(KernelFeatures::for_command()?).map_err(|refusal| refusal.to_string())
}

/// Attaches the iterator for a moment, and makes a pass, to find out whether this kernel supports it.
///
/// # Errors
/// As [`open`].
pub fn probe(features: &KernelFeatures) -> Result<(), Refusal> {
    open(features)?.list().map(drop).map_err(|error| refusal_by_errno("the walk", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a walk of which each pass writes `in_pass` elements.
    fn finish_in_passes(elements: &[u32], in_pass: usize) -> Result<Option<usize>, String> {
        let mut passes = elements.chunks(in_pass);
        let pass = |each: &mut dyn FnMut(&NamespaceRecord) -> ControlFlow<()>| {
            for element in passes.next().into_iter().flatten() {
                let record = NamespaceRecord { cookie: 0, inode: 0, element: *element };
                if each(&record).is_break() {
                    break;
                }
            }
            Ok(())
        };
        let finished = walk(pass).and_then(Walk::finish).map_err(|error| error.to_string())?;
        Ok(finished.map(|namespaces| namespaces.len()))
    }

    #[test]
    fn a_walk_is_a_list_only_if_it_came_back_to_its_beginning_past_one_head() {
        use element::{ENDED, HEAD, LAST, LOST, NAMESPACE};
        for in_pass in 1..4 {
            let finish = |elements: &[u32]| finish_in_passes(elements, in_pass);
            assert_eq!(finish(&[NAMESPACE, HEAD, ENDED, NAMESPACE, LAST, NAMESPACE]), Ok(Some(3)));
            assert_eq!(finish(&[HEAD, LAST]), Ok(Some(1)));
            assert_eq!(finish(&[NAMESPACE, HEAD, LOST]), Ok(None), "it is walked again");
            for broken in [&[][..], &[NAMESPACE, HEAD], &[NAMESPACE, LAST], &[HEAD, NAMESPACE, HEAD, LAST]] {
                assert!(finish(broken).is_err(), "{broken:?}");
            }
        }
    }
}
