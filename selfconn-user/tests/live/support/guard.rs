//! The guard under test: its methods on this kernel, and connects to itself with everything that a program sees of
//! them.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    net::sockopt::socket_error,
};
use serde_json::Value;
use socket2::Socket;

use super::{
    client::socket,
    daemon::{HookVariant, TestDaemon, is_event, is_kernel_at_least},
};

/// The methods by which the guard can be attached here.
pub(crate) fn guard_methods() -> &'static [&'static str] {
    if is_kernel_at_least((6, 6)) { &["tcx", "clsact"] } else { &["clsact"] }
}

/// A daemon that refuses connects to itself in the network namespace of the calling thread, and in no other, where
/// something else may need its own.
pub(crate) fn refusing(method: &str, options: &[&str]) -> TestDaemon {
    let all = [&["--guard", "refuse", "--guard-own-netns", "--guard-method", method][..], options].concat();
    TestDaemon::start(&HookVariant(vec![]), &all)
}

/// What a program sees of a connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConnectOutcome {
    /// The errno of connect(2). 0: none.
    pub(crate) errno: i32,
    /// The events of poll(2), at once for a blocking socket, and once there are any for another.
    pub(crate) poll: PollFlags,
    /// `SO_ERROR`, read after that.
    pub(crate) error: i32,
    pub(crate) is_connected: bool,
}

impl fmt::Display for ConnectOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_connected { "connected" } else { "refused" })
    }
}

/// Connects, and asks everything that a program can ask then.
pub(crate) fn connect(socket: &Socket, target: SocketAddr) -> ConnectOutcome {
    let errno = match socket.connect(&target.into()) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap(),
    };
    outcome_of(socket, errno)
}

pub(crate) fn outcome_of(socket: &Socket, errno: i32) -> ConnectOutcome {
    const EINPROGRESS: i32 = 115;
    let mut polled = [PollFd::new(socket, PollFlags::IN | PollFlags::OUT)];
    let timeout = if errno == EINPROGRESS { Duration::from_secs(10) } else { Duration::ZERO };
    poll(&mut polled, Some(&timeout.try_into().unwrap())).unwrap();
    let poll = polled[0].revents();
    let error = socket_error(socket.as_fd()).unwrap().err().map_or(0, rustix::io::Errno::raw_os_error);
    ConnectOutcome { errno, poll, error, is_connected: socket.peer_addr().is_ok() }
}

/// Binds a port that the kernel chooses, and connects to it.
pub(crate) fn connect_itself(address: IpAddr) -> ConnectOutcome {
    let socket = socket(address);
    socket.bind(&SocketAddr::new(address, 0).into()).unwrap();
    let own = socket.local_addr().unwrap().as_socket().unwrap();
    connect(&socket, own)
}

/// True if a connect to itself is refused within this time. One whose SYN is lost is not: the kernel repeats it after a
/// second.
pub(crate) fn is_refused_within(address: IpAddr, time: Duration) -> bool {
    let socket = socket(address);
    socket.bind(&SocketAddr::new(address, 0).into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    let own = socket.local_addr().unwrap();
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if socket.connect(&own).is_err_and(|error| refused(&error)) {
        return true;
    }
    poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&time.try_into().unwrap())).unwrap();
    socket.take_error().unwrap().is_some_and(|error| refused(&error))
}

/// A port that nobody listens on.
pub(crate) fn closed_port(address: SocketAddr) -> SocketAddr {
    let other = socket(address.ip());
    other.bind(&address.into()).unwrap();
    let mut closed = address;
    closed.set_port(other.local_addr().unwrap().as_socket().unwrap().port());
    closed
}

/// The sum of the counts of these events.
pub(crate) fn count_of<'a>(events: impl IntoIterator<Item = &'a Value>) -> u64 {
    let prevented = events.into_iter().filter(|event| event["event"] == "prevented");
    prevented.map(|event| event["count"].as_u64().unwrap()).sum()
}

/// The refused connects to itself in this network namespace, each with its opener. Where all programs of the default can
/// be preempted, the kernel may run none of them at a connect, so that the opener is unknown; it counts each that it
/// doesn't run.
pub(crate) fn opened(events: &[Value], netns: u64) -> Vec<&Value> {
    let prevented = events.iter().filter(|event| is_event("prevented", netns)(event));
    let (opened, unknown): (Vec<_>, Vec<_>) = prevented.partition(|event| event["pid"].is_u64());
    let not_run = events.last().unwrap()["not_examined"].as_u64().unwrap_or(0);
    let missed = if HookVariant(vec![]).may_lose_both() { not_run / 2 } else { 0 };
    assert!(count_of(unknown.iter().copied()) <= missed, "{not_run} times not run: {unknown:#?}");
    opened
}

/// Repeats `attempt` until it succeeds.
#[track_caller]
pub(crate) fn wait_until(deadline: Duration, what: &str, mut attempt: impl FnMut() -> bool) {
    let until = Instant::now() + deadline;
    while !attempt() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A counter of the kernel's TCP in the network namespace of the calling thread, such as `InCsumErrors`.
pub(crate) fn tcp_counter(name: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|known| known == name).unwrap();
    Ok(values.split(' ').nth(at).unwrap().parse().unwrap())
}
