//! Lists the listeners of the requested network namespaces. In each namespace the caller can read further
//! data while the thread is in it.

use std::{io, panic, thread};

use super::{
    entry::SocketEntry,
    existing::{self, ExistingNamespaces},
    netns::{self, Namespace, VisitOptions},
    netns_search::SearchLimits,
    netns_selection::NamespaceSelection,
    table::Tables,
};
use crate::bpf::namespaces::NamespaceIter;

/// What [`inspect`] is to do.
#[derive(Clone, Copy, Debug)]
pub struct InspectOptions<'a> {
    /// The namespaces to inspect.
    pub selection: &'a NamespaceSelection,
    /// Read `/proc/net/tcp` even if sock_diag is available.
    pub procfs_only: bool,
    /// The iterator over network namespaces. With it, it is known which exist.
    pub namespaces: Option<&'a NamespaceIter>,
}

/// The result of [`inspect`].
#[derive(Debug)]
pub struct ListenerInspection<T> {
    /// The result of each namespace, in the order of the visit: the namespace of the caller comes first.
    pub found: Vec<T>,
    /// What could not be inspected, and the reason: one line of text for people each.
    pub unseen: Vec<String>,
    /// The reason why `/proc/net/tcp` was read instead of sock_diag; interfaces are unknown in this case.
    pub without_sock_diag: Option<String>,
}

/// Calls `each` with the listeners of every requested namespace. It runs on a separate thread and returns
/// when the thread has ended, so the namespace of the caller does not change.
///
/// # Errors
/// If no thread can be started, or if the only requested namespace cannot be entered or read.
pub fn inspect<T: Send>(
    options: InspectOptions<'_>,
    each: impl FnMut(&Namespace, Vec<SocketEntry>) -> io::Result<T> + Send,
) -> io::Result<ListenerInspection<T>> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespaces".to_owned());
        let thread = thread.spawn_scoped(scope, move || visit(options, each))?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// Must be called on a thread that ends afterwards, because the thread stays in the last namespace.
fn visit<T>(
    options: InspectOptions<'_>,
    mut each: impl FnMut(&Namespace, Vec<SocketEntry>) -> io::Result<T>,
) -> io::Result<ListenerInspection<T>> {
    let mut tables = Tables::new(options.procfs_only);
    let mut found = Vec::new();
    let inspect_one = |namespace: &Namespace| {
        tables.read_listeners()?;
        let listeners = tables.rows.drain(..).map(|row| row.into_entry(namespace.id));
        found.push(each(namespace, listeners.collect())?);
        Ok(())
    };
    let existing = options.namespaces.map(existing::list);
    let refusal = existing.as_ref().and_then(|existing| existing.as_ref().err()).map(existing::refusal);
    let existing =
        existing.as_ref().and_then(|existing| existing.as_ref().ok()).map(ExistingNamespaces::inodes);
    let visit = VisitOptions { existing, search: Some(SearchLimits::COMMAND), ..VisitOptions::default() };
    let mut visited = netns::visit_selected(Some(options.selection), visit, inspect_one)?;
    visited.unseen.extend(refusal);
    if found.is_empty() {
        return Err(io::Error::other(visited.unseen.join("; ")));
    }
    Ok(ListenerInspection { found, unseen: visited.unseen, without_sock_diag: tables.without_diag })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
        os::unix::fs::MetadataExt as _,
        path::Path,
    };

    use super::*;

    #[test]
    fn a_listener_is_found_through_sock_diag_and_through_procfs() {
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        // Not every host has IPv6.
        let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
        let bound: Vec<SocketAddr> = [Some(&v4), Some(&any), v6.as_ref()]
            .into_iter()
            .flatten()
            .map(|l| l.local_addr().unwrap())
            .collect();
        for procfs_only in [false, true] {
            let selection = &NamespaceSelection::Current;
            let options = InspectOptions { selection, procfs_only, namespaces: None };
            let inspected = inspect(options, |namespace, listeners| Ok((namespace.clone(), listeners)));
            let inspected = inspected.unwrap();
            assert_eq!(inspected.found.len(), 1);
            let (namespace, listeners) = &inspected.found[0];
            assert!(namespace.is_current);
            let current = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
            assert_eq!(u64::from(namespace.id.inode), current);
            for bound in &bound {
                let is_bound = |listener: &&SocketEntry| {
                    (listener.endpoint.ip(), listener.endpoint.port) == (bound.ip(), bound.port())
                };
                assert_eq!(listeners.iter().filter(is_bound).count(), 1, "{bound}: {listeners:?}");
            }
            assert!(listeners.iter().all(|listener| listener.endpoint.port != 0));
        }
    }

    #[test]
    fn a_file_that_is_not_a_network_namespace_is_an_error() {
        let at = |path: &str| {
            let selection = &NamespaceSelection::At(Path::new(path).to_owned());
            inspect(InspectOptions { selection, procfs_only: false, namespaces: None }, |_, _| Ok(()))
        };
        for (path, why) in [
            ("/proc/no/such", "No such file"),
            ("/proc/self/stat", "not a network namespace"),
            ("/", "not a network"),
        ] {
            let error = at(path).unwrap_err().to_string();
            assert!(error.contains(why), "{path}: {error}");
        }
    }
}
