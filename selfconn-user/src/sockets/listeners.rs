//! Who listens where: the listeners of the network namespaces that are asked for, and whatever else the caller reads
//! while the thread is in each.

use std::{io, net::IpAddr, panic, path::PathBuf, thread};

use super::{Row, Tables, namespaces, namespaces::Namespace};

/// Which network namespaces to look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// The calling thread's own.
    Own,
    /// The one that this file is of.
    At(PathBuf),
    /// All that can be found and entered.
    #[default]
    All,
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its address; IPv4 also where the socket is IPv6 and the address v4-mapped; unspecified for any.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
    /// The interface of a link-local address; procfs doesn't tell.
    pub ifindex: Option<u32>,
    /// The socket's inode, by which its holders are known.
    pub inode: u64,
}

/// What was read.
#[derive(Debug)]
pub struct Inspected<T> {
    /// In each namespace, in the order of the visit: the own one comes first.
    pub found: Vec<T>,
    /// What could not be seen, and why; a line for people each.
    pub unseen: Vec<String>,
    /// Why `/proc/net/tcp` was read instead of asking sock_diag, so that interfaces are unknown.
    pub without_sock_diag: Option<String>,
}

/// Calls `each` in every namespace that is asked for, with its listeners. It works on a thread of its own and returns
/// when that is done; the caller's namespace stays what it is.
///
/// # Errors
/// When there can be no thread, or the one namespace that is asked for can't be entered or read.
pub fn inspect<T: Send>(
    which: &Which,
    procfs_only: bool,
    each: impl FnMut(&Namespace, Vec<Listener>) -> io::Result<T> + Send,
) -> io::Result<Inspected<T>> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespaces".to_owned());
        let thread = thread.spawn_scoped(scope, move || visit(which, procfs_only, each))?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// To be called on a thread that ends afterwards, for it stays in the last namespace.
fn visit<T>(
    which: &Which,
    procfs_only: bool,
    mut each: impl FnMut(&Namespace, Vec<Listener>) -> io::Result<T>,
) -> io::Result<Inspected<T>> {
    let mut tables = Tables::new(procfs_only);
    let mut found = Vec::new();
    let one = |namespace: &Namespace| {
        tables.read_listeners()?;
        found.push(each(namespace, tables.rows.iter().map(Row::listener).collect())?);
        Ok(())
    };
    let visited = match which {
        Which::Own => namespaces::visit_own(one),
        Which::At(path) => namespaces::visit_at(path, one)?,
        Which::All => namespaces::visit(&[], one),
    };
    if found.is_empty() {
        return Err(io::Error::other(visited.unseen.join("; ")));
    }
    Ok(Inspected { found, unseen: visited.unseen, without_sock_diag: tables.without_diag })
}

impl Row {
    fn listener(&self) -> Listener {
        let (addr, port) = self.source;
        Listener { addr: addr.to_canonical(), port, ifindex: self.link_local_ifindex(), inode: self.inode }
    }
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
    fn a_listener_is_found_by_either_table_under_its_address() {
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
            let inspected =
                inspect(&Which::Own, procfs_only, |namespace, listeners| Ok((namespace.clone(), listeners)));
            let inspected = inspected.unwrap();
            assert_eq!(inspected.found.len(), 1);
            let (namespace, listeners) = &inspected.found[0];
            assert!(namespace.is_own);
            let own = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
            assert_eq!(u64::from(namespace.inode), own);
            for bound in &bound {
                let of_it =
                    |listener: &&Listener| (listener.addr, listener.port) == (bound.ip(), bound.port());
                assert_eq!(listeners.iter().filter(of_it).count(), 1, "{bound}: {listeners:?}");
            }
            assert!(listeners.iter().all(|listener| listener.port != 0));
        }
    }

    #[test]
    fn a_file_that_is_no_namespace_is_an_error() {
        let at = |path: &str| inspect(&Which::At(Path::new(path).to_owned()), false, |_, _| Ok(()));
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
