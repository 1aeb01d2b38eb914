//! The two ways to a self-connection. The textbook client binds a port and connects to the same port: this
//! works unless a guard or a firewall refuses it. The accident connects to a closed port again and again, each time
//! with a new socket, until the kernel chooses this port as the source port.

use std::{
    collections::{HashSet, hash_map::RandomState},
    hash::{BuildHasher as _, Hasher as _},
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;
use selfconn_ebpf::state;
use socket2::{Socket, Type};

use super::{
    address, nanoseconds,
    narrate::Narrator,
    step::{Progress, ReproStep},
};
use crate::{
    ports::{LocalPorts, Reach, chance_after, sysctl},
    sockets::{self, HolderSearch, SocketRef},
    system::route,
};

/// A connect or a reply on the loopback interface takes longer only if something drops the packets.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// The default limit of attempts, as a multiple of the expected number. One run in e^10 = 22,000 needs more.
const DEFAULT_LIMIT_FACTOR: u64 = 10;

const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// An open connection.
pub(super) struct OpenedConnection {
    pub(super) socket: Socket,
    pub(super) attempts: u64,
    /// How the source port was chosen, as in the `cause` of the daemon's events.
    pub(super) cause: &'static str,
}

/// The textbook client.
pub(super) fn bind(
    address: SocketAddr,
    port: Option<u16>,
    before_connect: impl FnOnce(u16),
    narrator: &mut Narrator,
) -> Result<OpenedConnection> {
    let socket = tcp_socket(address)?;
    // Without SO_REUSEADDR, like most clients. The option would only allow other sockets with it on the same
    // port.
    let requested = at(address, port.unwrap_or(0));
    socket.bind(&requested.into()).map_err(|error| bind_error(requested, &error))?;
    let local = socket.local_addr()?.as_socket().context("the kernel returned no local address")?;
    narrator.narrate(&ReproStep::Bound { local, chosen_by_kernel: port.is_none() })?;

    before_connect(local.port());
    let begin = Instant::now();
    connect_bound(&socket, local)?;
    let duration_ns = nanoseconds(begin.elapsed());
    narrator.narrate(&ReproStep::Connected { remote: local, duration_ns, progress: None })?;
    Ok(OpenedConnection { socket, attempts: 1, cause: "bound" })
}

/// The accident. Before the loop, this checks that it can succeed at all.
pub(super) fn retry(
    address: SocketAddr,
    port: Option<u16>,
    limit: Option<u64>,
    before_connect: impl FnOnce(u16),
    narrator: &mut Narrator,
) -> Result<OpenedConnection> {
    let ports = sysctl::local_ports()?;
    let remote = match port {
        Some(port) => at(address, port),
        None => choose_port(&ports, address)?,
    };
    check_port(&ports, remote)?;
    let source = address::source(remote)?;
    if remote.ip() != source {
        bail!(
            "connect() to {} uses the source address {source}, so it cannot self-connect: connect to {source}, or \
             use --mode bind",
            remote.ip()
        );
    }
    check_refusal(remote)?;
    let expected_dials = ports.expected_connects();
    let limit = limit.unwrap_or(DEFAULT_LIMIT_FACTOR * u64::from(expected_dials));
    let range = (ports.range.low, ports.range.high);
    narrator.narrate(&ReproStep::Connecting { remote, range, expected_dials, limit })?;

    before_connect(remote.port());
    let begin = Instant::now();
    let progress = |attempts: u64| Progress {
        attempts,
        per_second: attempts as f64 / begin.elapsed().as_secs_f64().max(1e-9),
        expected_dials,
        chance: chance_after(attempts, expected_dials),
    };
    let mut last_progress = begin;
    for attempts in 1..=limit {
        let socket = tcp_socket(remote)?;
        match socket.connect(&remote.into()) {
            Ok(()) => {
                let duration_ns = nanoseconds(begin.elapsed());
                let (local, peer) = endpoints(&socket)?;
                if local != peer {
                    bail!(
                        "a server started to listen on {remote} and accepted the connection: choose another port"
                    );
                }
                let progress = Some(progress(attempts));
                narrator.narrate(&ReproStep::Connected { remote, duration_ns, progress })?;
                return Ok(OpenedConnection { socket, attempts, cause: "ephemeral" });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(connect_error(remote, &error)),
        }
        if last_progress.elapsed() >= PROGRESS_INTERVAL {
            narrator.narrate(&ReproStep::Progress(progress(attempts)))?;
            last_progress = Instant::now();
        }
    }
    let chance = progress(limit).chance * 100.0;
    Err(anyhow!(
        "none of {limit} attempts connected {remote} to itself, although the probability was {chance:.2} %: run it \
         again, or allow more attempts with --attempts"
    ))
}

/// Connects a socket to the endpoint that it has bound.
fn connect_bound(socket: &Socket, endpoint: SocketAddr) -> Result<()> {
    socket.connect(&endpoint.into()).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => anyhow!(
            "{endpoint} refuses a connect from itself, although nobody listens there: a guard (selfconn run --guard \
             refuse) or a firewall does so: to let it pass, add --guard-except port={} to the options of the guard",
            endpoint.port()
        ),
        _ => connect_error(endpoint, &error),
    })
}

/// Connects a bound socket to itself for a moment, because no number of attempts succeeds where something refuses
/// them. It is reset, so the port is free again at once.
fn check_refusal(endpoint: SocketAddr) -> Result<()> {
    let socket = tcp_socket(endpoint)?;
    socket.bind(&endpoint.into()).map_err(|error| bind_error(endpoint, &error))?;
    connect_bound(&socket, endpoint)?;
    rustix::net::connect_unspec(&socket).context("cannot reset the first connection")
}

/// Both addresses of the socket.
pub(super) fn endpoints(socket: &Socket) -> Result<(SocketAddr, SocketAddr)> {
    let local = socket.local_addr()?;
    let remote = socket.peer_addr().map_err(|error| match error.kind() {
        io::ErrorKind::NotConnected => destroyed_error(),
        _ => error.into(),
    })?;
    local.as_socket().zip(remote.as_socket()).context("the kernel returned no addresses")
}

/// Binds the endpoint as a server would, and closes the socket at once. It never listens.
pub(super) fn try_bind(endpoint: SocketAddr, reuse: bool) -> io::Result<()> {
    let socket = route::socket(endpoint, Type::STREAM)?;
    socket.set_reuse_address(reuse)?;
    socket.bind(&endpoint.into())
}

fn tcp_socket(address: SocketAddr) -> Result<Socket> {
    let socket = route::socket(address, Type::STREAM).context("cannot create a TCP socket")?;
    socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
    Ok(socket)
}

fn at(mut address: SocketAddr, port: u16) -> SocketAddr {
    address.set_port(port);
    address
}

/// Checks that a connect to this endpoint can self-connect.
fn check_port(ports: &LocalPorts, endpoint: SocketAddr) -> Result<()> {
    if let Some(reason) = unreachable_reason(ports, endpoint.port()) {
        bail!("a connect to {endpoint} never self-connects: {reason}: omit the port, or use --mode bind");
    }
    try_bind(endpoint, false).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => anyhow!(
            "a connect to {endpoint} cannot self-connect: {}: use a closed port, or omit the port",
            describe_holder(endpoint)
        ),
        _ => anyhow!("cannot use {endpoint}: {error}"),
    })
}

fn unreachable_reason(ports: &LocalPorts, port: u16) -> Option<String> {
    let range = ports.range;
    match ports.reach(port) {
        Reach::First => None,
        Reach::Last => {
            let parity = if range.low.is_multiple_of(2) { "even" } else { "odd" };
            Some(format!(
                "of the range {range}, connect() chooses {parity} ports while any is free \
                 (only bind() to port 0 and IP_LOCAL_PORT_RANGE use the other ports)"
            ))
        }
        Reach::Reserved => Some("the port is listed in net.ipv4.ip_local_reserved_ports".to_owned()),
        Reach::Outside => Some(format!("the port is outside of net.ipv4.ip_local_port_range, {range}")),
    }
}

/// Chooses a random closed port that can self-connect. Random, so that two runs at the same time use
/// different ports.
fn choose_port(ports: &LocalPorts, address: SocketAddr) -> Result<SocketAddr> {
    let candidates: Vec<_> = ports.first_ports().map(|port| at(address, port)).collect();
    if candidates.is_empty() {
        bail!(
            "no connect can self-connect here: net.ipv4.ip_local_reserved_ports covers every port that connect() \
             chooses: use --mode bind"
        );
    }
    let start = RandomState::new().build_hasher().finish() as usize % candidates.len();
    let (before, after) = candidates.split_at(start);
    let free = after.iter().chain(before).copied().find(|&endpoint| try_bind(endpoint, false).is_ok());
    free.with_context(|| {
        format!("no port that connect() chooses from {} is free: wait, or use --mode bind", ports.range)
    })
}

/// The process or state that holds the endpoint, as a clause for an error message: a listener first, then
/// TIME_WAIT, then any other.
fn describe_holder(endpoint: SocketAddr) -> String {
    let competes = |ip: std::net::IpAddr| ip.is_unspecified() || ip == endpoint.ip().to_canonical();
    let sockets = sockets::on_port(endpoint.port()).unwrap_or_default();
    let holder = sockets
        .into_iter()
        .filter(|socket| competes(socket.addr))
        .min_by_key(|socket| (socket.state != state::LISTEN, socket.state != state::TIME_WAIT));
    let Some(socket) = holder else { return "a bound socket that no table lists has it".to_owned() };
    if let Some(left) = socket.time_wait_left {
        return format!("a socket in TIME_WAIT has it for {:.0} s more", left.as_secs_f64().ceil());
    }
    let holders = sockets::find_holders(&HashSet::from([socket.inode]), HolderSearch::Complete, usize::MAX);
    let process =
        holders.of(&SocketRef::of_inode(socket.inode)).and_then(|holders| holders.first()).map_or_else(
            || "an unknown process".to_owned(),
            |process| format!("{} (pid {})", process.comm.as_deref().unwrap_or("?"), process.pid),
        );
    match socket.state {
        state::LISTEN => format!("{process} listens on it"),
        other => format!("{process} has a connection on it ({})", state::name(other)),
    }
}

fn bind_error(endpoint: SocketAddr, error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AddrInUse if endpoint.port() == 0 => {
            anyhow!("no port of net.ipv4.ip_local_port_range is free: name a port after the address")
        }
        io::ErrorKind::AddrInUse => anyhow!(
            "cannot bind {endpoint}: {}: choose another port, or omit the port",
            describe_holder(endpoint)
        ),
        io::ErrorKind::PermissionDenied => anyhow!(
            "cannot bind {endpoint}: a port below net.ipv4.ip_unprivileged_port_start needs CAP_NET_BIND_SERVICE: \
             choose a higher port"
        ),
        _ => anyhow!("cannot bind {endpoint}: {error}"),
    }
}

fn connect_error(endpoint: SocketAddr, error: &io::Error) -> anyhow::Error {
    // EINPROGRESS is the error of a connect() that SO_SNDTIMEO ended.
    if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) {
        return anyhow!(
            "no reply from {endpoint} within {REPLY_TIMEOUT:?}: either lo is down (run: ip link set lo up), or a firewall \
             drops the packets"
        );
    }
    let hint = match error.kind() {
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            ": if lo is down, run: ip link set lo up"
        }
        io::ErrorKind::AddrNotAvailable => ": no source port is free: wait, or close connections",
        _ => "",
    };
    anyhow!("cannot connect to {endpoint}: {error}{hint}")
}

/// The error for a connection that another process destroyed. Nothing else ends a self-connection from
/// outside.
pub(super) fn destroyed_error() -> anyhow::Error {
    anyhow!(
        "another process destroyed the connection before it could exchange data: check if `selfconn run --remedy` runs \
         here"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_cannot_self_connect_is_rejected_with_the_reason() {
        let ports = LocalPorts::parse("40000 40199", "40010-40020").unwrap();
        for (port, want) in [
            (40000, None),
            (40001, Some("chooses even ports")),
            (40012, Some("ip_local_reserved_ports")),
            (39998, Some("outside of net.ipv4.ip_local_port_range, 40000-40199")),
        ] {
            let reason = unreachable_reason(&ports, port);
            assert_eq!(reason.is_some(), want.is_some(), "{port}: {reason:?}");
            assert!(reason.unwrap_or_default().contains(want.unwrap_or_default()), "{port}");
        }
    }
}
