//! Destroys a self-connection with SOCK_DESTROY, and never any other socket.
//!
//! The socket is known by its cookie. If only the programs' record describes it, its cookie is taken from the socket
//! table of its network namespace, if exactly one socket there agrees with the record. The request has the device that
//! the socket is bound to now: its user may bind it to one at any time. That the kernel does not find a socket proves
//! nothing, because another one with the same addresses can hide it: a second look goes through the whole table.

use std::{
    collections::{BTreeSet, HashMap},
    io, panic, thread,
};

use selfconn_ebpf::{Endpoint, state};

use super::{
    entry::{DumpedSocket, SocketEntry},
    limit::FirstMatch,
    netns::{self, Namespace, NetnsId, VisitOptions},
    netns_enter,
    netns_search::SearchLimits,
    sock_diag::{
        DiagReader,
        exact::{self, Cookie},
    },
};

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EOPNOTSUPP: i32 = 95;

/// The hint for an EPERM of SOCK_DESTROY.
const NEEDS_NET_ADMIN: &str =
    "destroying sockets needs CAP_NET_ADMIN in their network namespace: run as root, or grant it";

/// Why a socket that exists could not be destroyed.
const HIDDEN: &str = "another socket with the same addresses and ports, which is not bound to a device, hides it \
                      from SOCK_DESTROY";

/// Number of requests for a socket that is bound to another device each time.
const MAX_REQUESTS: usize = 3;

/// What is known about a self-connection that is to be destroyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetSocket {
    /// Source and destination.
    pub endpoint: Endpoint,
    /// `None`: unknown.
    pub cookie: Option<Cookie>,
    /// The inode of the socket's file. `None`: unknown.
    pub inode: Option<u64>,
    /// The user that owns the socket. `None`: unknown.
    pub uid: Option<u32>,
    /// Processes and threads to try first to enter its network namespace.
    pub netns_hints: Vec<u32>,
}

/// The cookie of this self-connection. `None`: it does not exist any more, or only its TIME_WAIT socket is left.
///
/// # Errors
/// A text for people, if the namespace cannot be found or entered, if the kernel does not answer, or if it is not
/// certain which socket it is.
pub fn look_up(target: &TargetSocket) -> Result<Option<Cookie>, String> {
    let look = || match target.cookie {
        Some(cookie) => {
            let found = find(&target.endpoint, cookie)?;
            Ok(found.filter(|row| row.entry.state != state::TIME_WAIT).map(|_| cookie))
        }
        None => identify(target),
    };
    run_in_namespace(target, look)
}

/// Destroys this self-connection if it has this cookie. Returns true if it existed. If it has already become
/// a TIME_WAIT socket by itself, that socket stays.
///
/// # Errors
/// As [`look_up`], and if this process is not permitted to destroy sockets.
pub fn destroy(target: &TargetSocket, cookie: Cookie) -> Result<bool, String> {
    destroy_if(target, cookie, || true)
}

/// As [`destroy`]. `may_destroy` is called just before the request to the kernel, after the search for the socket's
/// network namespace, which may take long. If it returns false, nothing is destroyed.
///
/// # Errors
/// As [`destroy`], and if `may_destroy` returns false.
pub fn destroy_if(
    target: &TargetSocket,
    cookie: Cookie,
    may_destroy: impl FnOnce() -> bool + Send,
) -> Result<bool, String> {
    run_in_namespace(target, || destroy_here(&target.endpoint, cookie, false, may_destroy))
}

fn run_in_namespace<T: Send>(
    target: &TargetSocket,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T, String> {
    netns_enter::run_in_namespace(NetnsId::from(&target.endpoint), &target.netns_hints, work)
        .map_err(|error| explain_error(&error))
}

/// Destroys the self-connections of a snapshot, TIME_WAIT included. Returns for each entry whether it still
/// existed, or the reason why it could not be destroyed.
///
/// # Errors
/// If no thread can be started.
pub fn destroy_all(entries: &[SocketEntry]) -> io::Result<Vec<Result<bool, String>>> {
    let mut by_netns: HashMap<u32, Vec<usize>> = HashMap::new();
    for (index, entry) in entries.iter().enumerate() {
        by_netns.entry(entry.endpoint.netns).or_default().push(index);
    }
    let mut outcomes = vec![Err("its network namespace was not found again".to_owned()); entries.len()];
    let wanted: BTreeSet<u32> = by_netns.keys().copied().collect();
    let visit = || {
        let search = Some(SearchLimits::COMMAND);
        netns::visit(
            VisitOptions { existing: Some(&wanted), search, ..VisitOptions::default() },
            |&Namespace { id, .. }| {
                for index in by_netns.remove(&id.inode).unwrap_or_default() {
                    let &SocketEntry { endpoint, state, cookie, .. } = &entries[index];
                    if !id.may_be(NetnsId::from(&endpoint)) {
                        continue;
                    }
                    outcomes[index] = match cookie.and_then(Cookie::new) {
                        Some(cookie) => destroy_here(&endpoint, cookie, true, || true)
                            .map_err(|error| explain_error_in(&error, state)),
                        None => Err("its cookie is unknown: only sock_diag reports it".to_owned()),
                    };
                }
                Ok(())
            },
        )
    };
    thread::scope(|scope| -> io::Result<()> {
        let thread = thread::Builder::new().name("namespaces".to_owned()).spawn_scoped(scope, visit)?;
        // A namespace that could not be visited shows in the outcome of each of its entries.
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause));
        Ok(())
    })?;
    Ok(outcomes)
}

/// Checks that this process may destroy sockets in its own network namespace and that this kernel supports
/// it.
///
/// # Errors
/// The reason why not, with a hint.
pub fn can_destroy() -> Result<(), String> {
    exact::probe_destroy().map_err(|error| match error.raw_os_error() {
        // The listener existed, so ENOENT does not refer to the socket.
        Some(ENOENT) => format!("{error}: the kernel has no sock_diag for TCP: modprobe tcp_diag"),
        _ => explain_error(&error),
    })
}

/// Checks that this process may enter other network namespaces.
///
/// # Errors
/// The reason why not, with a hint.
pub fn can_enter() -> Result<(), String> {
    // This runs on its own thread to be safe, although the thread enters the namespace that it is already in.
    let entered = thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, netns_enter::may_enter)?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    });
    entered.map_err(|error| format!("entering another network namespace: {error}: it needs CAP_SYS_ADMIN"))
}

fn destroy_here(
    endpoint: &Endpoint,
    cookie: Cookie,
    time_wait: bool,
    may_destroy: impl FnOnce() -> bool,
) -> io::Result<bool> {
    let Some(mut row) = find(endpoint, cookie)? else { return Ok(false) };
    if !time_wait && row.entry.state == state::TIME_WAIT {
        return Ok(false);
    }
    if !may_destroy() {
        return Err(io::Error::other("it may not be destroyed any more"));
    }
    for _ in 0..MAX_REQUESTS {
        let Endpoint { ifindex, .. } = row.entry.endpoint;
        if exact::destroy(&Endpoint { ifindex, ..*endpoint }, cookie)? {
            return Ok(true);
        }
        match find(endpoint, cookie)? {
            Some(now) if time_wait || now.entry.state != state::TIME_WAIT => row = now,
            _ => return Ok(false),
        }
        if row.entry.endpoint.ifindex == ifindex {
            break;
        }
    }
    Err(io::Error::other(HIDDEN))
}

/// The self-connection with this cookie, in the network namespace of the calling thread. `None`: it does not exist.
fn find(endpoint: &Endpoint, cookie: Cookie) -> io::Result<Option<DumpedSocket>> {
    if let Some(row) = exact::look_up(endpoint, cookie)? {
        return Ok(Some(row).filter(|row| is_at(row, endpoint)));
    }
    find_in_table(|row| row.entry.cookie == Some(cookie.get()) && is_at(row, endpoint))
}

/// The cookie of the only open self-connection that agrees with what is known. `None`: none of the sockets at its
/// addresses and ports is its socket. A socket keeps its inode as long as a process has it open.
fn identify(target: &TargetSocket) -> io::Result<Option<Cookie>> {
    let uncertain = |why| Err(io::Error::other(format!("which socket it is, is not certain: {why}")));
    let is_open = |row: &DumpedSocket| {
        is_at(row, &target.endpoint) && row.entry.state != state::TIME_WAIT && row.entry.inode != 0
    };
    // One look may miss a socket, because the table changes while it is read.
    for _ in 0..2 {
        let has_inode = |row: &DumpedSocket| target.inode.is_none_or(|inode| row.entry.inode == inode);
        match find_in_table(|row| is_open(row) && has_inode(row))? {
            Some(_) if target.inode.is_none() => {
                return uncertain("the programs could read neither its cookie nor its inode");
            }
            Some(row) if row.entry.uid == target.uid => return Ok(row.entry.cookie.and_then(Cookie::new)),
            Some(_) => return uncertain("the socket with its inode has another owner"),
            None => {}
        }
    }
    Ok(None)
}

/// The first matching socket of those whose source is their destination, in the network namespace of the calling
/// thread, TIME_WAIT included. No other is kept, because a user can have any number of them.
fn find_in_table(is_match: impl Fn(&DumpedSocket) -> bool) -> io::Result<Option<DumpedSocket>> {
    let mut first = FirstMatch::new(is_match);
    DiagReader::new().read(false, &mut first)?;
    Ok(first.found)
}

/// True if this socket is a self-connection of the addresses and ports of this endpoint, bound to whatever device. The
/// kernel may also return a listener here. The family does not count: a socket with v4-mapped addresses can become one
/// of IPv4 (IPV6_ADDRFORM, `do_ipv6_setsockopt`, net/ipv6/ipv6_sockglue.c at v5.10), and the kernel finds it by either.
fn is_at(row: &DumpedSocket, endpoint: &Endpoint) -> bool {
    // The kernel reports no namespace: the thread is in the namespace of the endpoint.
    let at = Endpoint { netns: 0, netns_cookie: 0, ifindex: row.entry.endpoint.ifindex, ..*endpoint };
    row.is_self_connection() && row.entry.endpoint.any_family() == at.any_family()
}

fn explain_error(error: &io::Error) -> String {
    explain_error_in(error, state::ESTABLISHED)
}

fn explain_error_in(error: &io::Error, socket_state: u8) -> String {
    match error.raw_os_error() {
        Some(EPERM) => format!("{error}: {NEEDS_NET_ADMIN}"),
        Some(EOPNOTSUPP) if socket_state == state::TIME_WAIT => {
            format!("{error}: this kernel cannot destroy a socket in TIME_WAIT")
        }
        Some(EOPNOTSUPP) => format!("{error}: the kernel was built without CONFIG_INET_DIAG_DESTROY"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, net::Ipv4Addr, os::unix::fs::MetadataExt as _};

    use super::*;
    use crate::{detect::samples, system::netns_cookie};

    #[test]
    fn only_the_self_connection_at_the_endpoint_is_destroyed() {
        let [v4, mapped] =
            [false, true].map(|is_ipv6| Endpoint::new(1, Ipv4Addr::LOCALHOST.into(), 4, is_ipv6));
        for (source, destination, state, is_destroyed) in [
            ("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED, true),
            ("127.0.0.1:4", "127.0.0.1:4", state::TIME_WAIT, true),
            ("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::ESTABLISHED, true),
            // Other sockets that the kernel may return instead.
            ("127.0.0.1:4", "0.0.0.0:0", state::LISTEN, false),
            ("0.0.0.0:4", "0.0.0.0:0", state::LISTEN, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::LISTEN, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::CLOSE, false),
            ("127.0.0.1:4", "127.0.0.1:5", state::ESTABLISHED, false),
            ("127.0.0.1:5", "127.0.0.1:5", state::ESTABLISHED, false),
            ("127.0.0.2:4", "127.0.0.2:4", state::ESTABLISHED, false),
            ("127.0.0.1:4", "127.0.0.2:4", state::ESTABLISHED, false),
            ("[::1]:4", "[::1]:4", state::ESTABLISHED, false),
        ] {
            let row = super::super::entry::tests::row(source, destination, state);
            // Bound to a device before, or of another family.
            for endpoint in [v4, mapped, Endpoint { ifindex: 3, ..v4 }] {
                let case = format!("{source} {destination} {} {endpoint:?}", state::name(state));
                assert_eq!(is_at(&row, &endpoint), is_destroyed, "{case}");
            }
        }
    }

    #[test]
    fn a_namespace_is_found_again_also_if_the_cookie_is_unknown_on_one_side() {
        let inode = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let in_netns = |netns_cookie| {
            let at = Endpoint { netns: inode as u32, netns_cookie, ..samples::endpoint("127.0.0.1", 1) };
            // No socket has this cookie.
            SocketEntry { cookie: Some(u64::MAX - 1), ..samples::entry(at, state::ESTABLISHED) }
        };
        let is_known = netns_cookie::current().is_some();
        let outcomes = destroy_all(&[0, u64::MAX >> 1].map(in_netns)).unwrap();
        assert_eq!(outcomes[0], Ok(false), "the namespace was looked into");
        assert_eq!(outcomes[1].is_err(), is_known, "{:?}", outcomes[1]);
    }

    #[test]
    fn an_error_of_the_kernel_is_explained_with_a_hint() {
        for (errno, socket_state, expected) in [
            (EPERM, state::ESTABLISHED, "needs CAP_NET_ADMIN"),
            (EOPNOTSUPP, state::ESTABLISHED, "CONFIG_INET_DIAG_DESTROY"),
            (EOPNOTSUPP, state::TIME_WAIT, "TIME_WAIT"),
            (105, state::ESTABLISHED, "os error 105"),
        ] {
            let text = explain_error_in(&io::Error::from_raw_os_error(errno), socket_state);
            assert!(text.contains(expected), "{text}");
        }
    }
}
