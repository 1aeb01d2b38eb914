//! Destroys a self-connection with SOCK_DESTROY, and never any other socket. The socket is looked up in its
//! network namespace, its addresses and its state are verified, and it is destroyed by its cookie. If another
//! socket has taken its place in the meantime, that socket is not affected.

use std::{collections::HashMap, io, panic, thread};

use selfconn_ebpf::{Endpoint, state};

use super::{
    entry::{DumpedSocket, SocketEntry},
    netns::{self, Namespace},
    sock_diag::exact::{self, Cookie},
};

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EOPNOTSUPP: i32 = 95;

/// The hint for an EPERM of SOCK_DESTROY.
const NEEDS_NET_ADMIN: &str =
    "destroying sockets needs CAP_NET_ADMIN in their network namespace: run as root, or grant it";

/// The cookie of the self-connection at this endpoint. `None`: it does not exist, or only its TIME_WAIT
/// socket is left. `ifindex` is the interface of a link-local address. The namespaces of the processes and
/// threads in `netns_hints` are searched first.
///
/// # Errors
/// A text for people, if the namespace cannot be found or entered, or if the kernel does not answer.
pub fn look_up(
    endpoint: &Endpoint,
    ifindex: Option<u32>,
    netns_hints: &[u32],
) -> Result<Option<Cookie>, String> {
    let look = || {
        let row = none_if_missing(exact::look_up(endpoint, ifindex, None))?;
        let is_open = |row: &DumpedSocket| is_at(row, endpoint) && row.entry.state != state::TIME_WAIT;
        Ok(row.filter(is_open).and_then(|row| row.entry.cookie))
    };
    let cookie =
        netns::run_in_namespace(endpoint.netns, netns_hints, look).map_err(|error| explain_error(&error))?;
    Ok(cookie.and_then(Cookie::new))
}

/// Destroys this self-connection if it has this cookie. Returns true if it existed. If it has already become
/// a TIME_WAIT socket by itself, that socket stays.
///
/// # Errors
/// As [`look_up`], and if this process is not permitted to destroy sockets.
pub fn destroy(
    endpoint: &Endpoint,
    ifindex: Option<u32>,
    cookie: Cookie,
    netns_hints: &[u32],
) -> Result<bool, String> {
    let destroy = || destroy_here(endpoint, ifindex, cookie, false);
    netns::run_in_namespace(endpoint.netns, netns_hints, destroy).map_err(|error| explain_error(&error))
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
    let visit = || {
        netns::visit(&[], |&Namespace { inode: netns, .. }| {
            for index in by_netns.remove(&netns).unwrap_or_default() {
                let &SocketEntry { endpoint, ifindex, state, cookie, .. } = &entries[index];
                outcomes[index] = match cookie.and_then(Cookie::new) {
                    Some(cookie) => destroy_here(&endpoint, ifindex, cookie, true)
                        .map_err(|error| explain_error_in(&error, state)),
                    None => Err("its cookie is unknown: only sock_diag reports it".to_owned()),
                };
            }
            Ok(())
        })
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
        let thread = thread::Builder::new().spawn_scoped(scope, netns::may_enter)?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    });
    entered.map_err(|error| format!("entering another network namespace: {error}: it needs CAP_SYS_ADMIN"))
}

fn destroy_here(
    endpoint: &Endpoint,
    ifindex: Option<u32>,
    cookie: Cookie,
    time_wait: bool,
) -> io::Result<bool> {
    let row = none_if_missing(exact::look_up(endpoint, ifindex, Some(cookie)))?;
    let may_destroy =
        |row: &DumpedSocket| is_at(row, endpoint) && (time_wait || row.entry.state != state::TIME_WAIT);
    if !row.is_some_and(|row| may_destroy(&row)) {
        return Ok(false);
    }
    exact::destroy(endpoint, ifindex, cookie)
}

/// True if this socket is the self-connection at this endpoint. The kernel may also return a listener here.
/// The family counts: the sockets of the two families are different sockets to destroy.
fn is_at(row: &DumpedSocket, endpoint: &Endpoint) -> bool {
    // The kernel reports no namespace: the thread is in the namespace of the endpoint.
    row.is_self_connection() && row.entry.endpoint == Endpoint { netns: 0, ..*endpoint }
}

/// Converts ENOENT to `None`, because the absence of the socket is a valid result.
fn none_if_missing(result: io::Result<Option<DumpedSocket>>) -> io::Result<Option<DumpedSocket>> {
    match result {
        Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(None),
        outcome => outcome,
    }
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
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn only_the_self_connection_at_the_endpoint_is_destroyed() {
        let [v4, mapped] =
            [false, true].map(|is_ipv6| Endpoint::new(1, Ipv4Addr::LOCALHOST.into(), 4, is_ipv6));
        for (source, destination, state, plain, v6) in [
            ("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED, true, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::TIME_WAIT, true, false),
            ("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::ESTABLISHED, false, true),
            // Other sockets that the kernel may return instead.
            ("127.0.0.1:4", "0.0.0.0:0", state::LISTEN, false, false),
            ("0.0.0.0:4", "0.0.0.0:0", state::LISTEN, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::LISTEN, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::CLOSE, false, false),
            ("127.0.0.1:4", "127.0.0.1:5", state::ESTABLISHED, false, false),
            ("127.0.0.1:5", "127.0.0.1:5", state::ESTABLISHED, false, false),
            ("127.0.0.2:4", "127.0.0.2:4", state::ESTABLISHED, false, false),
            ("127.0.0.1:4", "127.0.0.2:4", state::ESTABLISHED, false, false),
        ] {
            let row = super::super::entry::tests::row(source, destination, state);
            let case = format!("{source} {destination} {}", state::name(state));
            assert_eq!((is_at(&row, &v4), is_at(&row, &mapped)), (plain, v6), "{case}");
        }
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
