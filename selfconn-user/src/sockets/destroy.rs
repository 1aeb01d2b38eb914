//! SOCK_DESTROY of a self-connection, and of nothing else: it is looked up in its network namespace, its addresses and
//! its state are verified, and it is destroyed by its cookie. Whatever else has come to its place by then stays.

use std::{collections::HashMap, io, net::IpAddr, panic, thread};

use selfconn_ebpf::state;

use super::{
    Found, Namespace, Row, STATES,
    exact::{self, Cookie},
    namespaces,
};

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EOPNOTSUPP: i32 = 95;

/// What helps where the kernel refuses.
const NEEDS_NET_ADMIN: &str =
    "destroying sockets needs CAP_NET_ADMIN in their network namespace: run as root, or grant it";

/// Where a self-connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Inode of the network namespace.
    pub netns: u32,
    /// Source and destination address, as in [`Found`].
    pub addr: IpAddr,
    /// Source and destination port.
    pub port: u16,
    /// Whether the socket is IPv6.
    pub is_ipv6: bool,
    /// The interface of a link-local address.
    pub ifindex: Option<u32>,
}

impl From<&Found> for Target {
    fn from(found: &Found) -> Self {
        let &Found { netns, addr, port, is_ipv6, ifindex, .. } = found;
        Self { netns, addr, port, is_ipv6, ifindex }
    }
}

/// The cookie of the self-connection at this place; `None`: there is none, or nothing is left of it but TIME_WAIT. The
/// namespace is looked for near these processes and threads first.
///
/// # Errors
/// In words: that the namespace can't be found or entered, or the kernel doesn't answer.
pub fn look_up(target: &Target, near: &[u32]) -> Result<Option<Cookie>, String> {
    let look = || {
        let row = present(exact::look_up(target, None))?;
        Ok(row.filter(|row| target.is(row) && row.state != state::TIME_WAIT).and_then(|row| row.cookie))
    };
    let cookie = namespaces::within(target.netns, near, look).map_err(|error| why(&error))?;
    Ok(cookie.and_then(Cookie::new))
}

/// Destroys the self-connection at this place that has this cookie; whether it was there. What it has become by itself,
/// TIME_WAIT, stays.
///
/// # Errors
/// As [`look_up`], or that this process may not.
pub fn destroy(target: &Target, cookie: Cookie, near: &[u32]) -> Result<bool, String> {
    let destroy = || destroy_here(target, cookie, false);
    namespaces::within(target.netns, near, destroy).map_err(|error| why(&error))
}

/// Destroys what a survey found, TIME_WAIT included: of each whether it was there, or why it could not be done.
///
/// # Errors
/// When there can be no thread.
pub fn destroy_all(found: &[Found]) -> io::Result<Vec<Result<bool, String>>> {
    let mut by_netns: HashMap<u32, Vec<usize>> = HashMap::new();
    for (at, found) in found.iter().enumerate() {
        by_netns.entry(found.netns).or_default().push(at);
    }
    let mut outcomes = vec![Err("its network namespace was not found again".to_owned()); found.len()];
    let visit = || {
        namespaces::visit(&[], |&Namespace { inode: netns, .. }| {
            for at in by_netns.remove(&netns).unwrap_or_default() {
                outcomes[at] = match found[at].cookie.and_then(Cookie::new) {
                    Some(cookie) => destroy_here(&(&found[at]).into(), cookie, true)
                        .map_err(|error| told(&error, found[at].state)),
                    None => Err("its cookie is unknown: only sock_diag tells it".to_owned()),
                };
            }
            Ok(())
        })
    };
    thread::scope(|scope| -> io::Result<()> {
        let thread = thread::Builder::new().name("namespaces".to_owned()).spawn_scoped(scope, visit)?;
        // What it could not see is told of each.
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause));
        Ok(())
    })?;
    Ok(outcomes)
}

/// Whether this process may destroy sockets in its own network namespace, on this kernel.
///
/// # Errors
/// Why not, with the cure.
pub fn can_destroy() -> Result<(), String> {
    exact::rehearse().map_err(|error| match error.raw_os_error() {
        // The listener was there.
        Some(ENOENT) => format!("{error}: the kernel has no sock_diag for TCP: modprobe tcp_diag"),
        _ => why(&error),
    })
}

/// Whether this process may enter other network namespaces.
///
/// # Errors
/// Why not, with the cure.
pub fn can_enter() -> Result<(), String> {
    // On a thread of its own, though it should stay where it is.
    let entered = thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, namespaces::may_enter)?;
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    });
    entered.map_err(|error| format!("entering another network namespace: {error}: it needs CAP_SYS_ADMIN"))
}

fn destroy_here(target: &Target, cookie: Cookie, time_wait: bool) -> io::Result<bool> {
    let row = present(exact::look_up(target, Some(cookie)))?;
    let is_it = |row: &Row| target.is(row) && (time_wait || row.state != state::TIME_WAIT);
    if !row.is_some_and(|row| is_it(&row)) {
        return Ok(false);
    }
    exact::destroy(target, cookie)
}

impl Target {
    /// Whether this socket, which may be a listener, is a self-connection at this place.
    fn is(&self, row: &Row) -> bool {
        row.source == row.destination
            && (row.source.0.to_canonical(), row.source.1) == (self.addr, self.port)
            && row.source.0.is_ipv6() == self.is_ipv6
            && STATES & 1 << row.state != 0
    }
}

/// That there is none is an answer, too.
fn present(looked: io::Result<Option<Row>>) -> io::Result<Option<Row>> {
    match looked {
        Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(None),
        outcome => outcome,
    }
}

fn why(error: &io::Error) -> String {
    told(error, state::ESTABLISHED)
}

fn told(error: &io::Error, of: u8) -> String {
    match error.raw_os_error() {
        Some(EPERM) => format!("{error}: {NEEDS_NET_ADMIN}"),
        Some(EOPNOTSUPP) if of == state::TIME_WAIT => format!("{error}: this kernel ends no TIME_WAIT early"),
        Some(EOPNOTSUPP) => format!("{error}: the kernel was built without CONFIG_INET_DIAG_DESTROY"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn only_a_connection_to_itself_at_that_place_is_meant() {
        let target =
            Target { netns: 1, addr: Ipv4Addr::LOCALHOST.into(), port: 4, is_ipv6: false, ifindex: None };
        let mapped = Target { is_ipv6: true, ..target };
        for (source, destination, state, plain, v6) in [
            ("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED, true, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::TIME_WAIT, true, false),
            ("[::ffff:127.0.0.1]:4", "[::ffff:127.0.0.1]:4", state::ESTABLISHED, false, true),
            // What the kernel may answer instead.
            ("127.0.0.1:4", "0.0.0.0:0", state::LISTEN, false, false),
            ("0.0.0.0:4", "0.0.0.0:0", state::LISTEN, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::LISTEN, false, false),
            ("127.0.0.1:4", "127.0.0.1:4", state::CLOSE, false, false),
            ("127.0.0.1:4", "127.0.0.1:5", state::ESTABLISHED, false, false),
            ("127.0.0.1:5", "127.0.0.1:5", state::ESTABLISHED, false, false),
            ("127.0.0.2:4", "127.0.0.2:4", state::ESTABLISHED, false, false),
            ("127.0.0.1:4", "127.0.0.2:4", state::ESTABLISHED, false, false),
        ] {
            let row = super::super::tests::row(source, destination, state);
            let what = format!("{source} {destination} {}", state::name(state));
            assert_eq!((target.is(&row), mapped.is(&row)), (plain, v6), "{what}");
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_told_with_its_cure() {
        for (errno, of, says) in [
            (EPERM, state::ESTABLISHED, "needs CAP_NET_ADMIN"),
            (EOPNOTSUPP, state::ESTABLISHED, "CONFIG_INET_DIAG_DESTROY"),
            (EOPNOTSUPP, state::TIME_WAIT, "TIME_WAIT"),
            (105, state::ESTABLISHED, "os error 105"),
        ] {
            let told = told(&io::Error::from_raw_os_error(errno), of);
            assert!(told.contains(says), "{told}");
        }
    }
}
