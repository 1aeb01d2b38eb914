//! The accident: a client connects to a closed port again and again, each time with a new socket, until the
//! kernel chooses this port as the source port. Before the loop, this module checks that it can succeed at
//! all.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::address::{EndpointText, LocalAddr};
use super::bind::{describe_holder, try_bind};
use super::narrate::Narrator;
use super::step::{ConnectLoop, Connected, Progress, ReproStep};
use super::{OpenedConnection, REPLY_TIMEOUT, connect_error, endpoint_addrs, nanoseconds};
use crate::ports::sysctl;
use crate::ports::{LocalPorts, Reach, chance_after};

/// The default limit of attempts, as a multiple of the expected number. One run in e^10 = 22,000 needs more.
const DEFAULT_LIMIT_FACTOR: u64 = 10;

/// Connects until the connection is a self-connection, and prints the progress.
pub(super) fn open(
    local_addr: LocalAddr,
    port: Option<u16>,
    limit: Option<u64>,
    narrator: &mut Narrator,
) -> Result<OpenedConnection> {
    let ports = sysctl::local_ports()?;
    let port = match port {
        Some(port) => check_port(&ports, local_addr, port)?,
        None => choose_port(&ports, local_addr)?,
    };
    let source = local_addr.source()?;
    if local_addr.at(0).ip() != source {
        bail!(
            "connect() to {local_addr} uses the source address {source}, so it cannot self-connect: \
             connect to {source}, or use --mode bind"
        );
    }
    let expected_dials = ports.expected_connects();
    let limit = limit.unwrap_or(DEFAULT_LIMIT_FACTOR * u64::from(expected_dials));
    let remote = local_addr.at(port);
    narrator.narrate(&ReproStep::Connecting(ConnectLoop {
        remote: EndpointText(remote),
        range: ports.range,
        expected_dials,
        limit,
    }))?;

    let begin = Instant::now();
    let progress = |attempts: u64| Progress {
        attempts,
        per_second: attempts as f64 / begin.elapsed().as_secs_f64().max(1e-9),
        expected_dials,
        chance: chance_after(attempts, expected_dials),
    };
    let mut last_progress = begin;
    for attempts in 1..=limit {
        let socket = local_addr.tcp_socket()?;
        socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
        match socket.connect(&remote.into()) {
            Ok(()) => {
                let (local, peer) = endpoint_addrs(&socket)?;
                if local != peer {
                    bail!(
                        "a server started to listen on {remote} and accepted the connection: choose another port"
                    );
                }
                narrator.narrate(&ReproStep::Connected(Connected {
                    remote: EndpointText(remote),
                    duration_ns: nanoseconds(begin.elapsed()),
                    progress: Some(progress(attempts)),
                }))?;
                return Ok(OpenedConnection { socket, attempts, cause: "ephemeral" });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(connect_error(remote, &error)),
        }
        if last_progress.elapsed() >= narrator.progress_interval() {
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

/// Returns the port if a connect to it can self-connect.
fn check_port(ports: &LocalPorts, local_addr: LocalAddr, port: u16) -> Result<u16> {
    let endpoint = local_addr.at(port);
    if let Some(reason) = unreachable_reason(ports, port) {
        bail!("a connect to {endpoint} never self-connects: {reason}: omit the port, or use --mode bind");
    }
    match try_bind(local_addr, port, false) {
        Ok(()) => Ok(port),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(port_taken_error(endpoint)),
        Err(error) => Err(anyhow!("cannot use {endpoint}: {error}")),
    }
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

fn port_taken_error(endpoint: SocketAddr) -> anyhow::Error {
    anyhow!(
        "a connect to {endpoint} cannot self-connect: {}: use a closed port, or omit the port",
        describe_holder(endpoint)
    )
}

/// Chooses a random closed port that can self-connect. Random, so that two runs at the same time use
/// different ports.
fn choose_port(ports: &LocalPorts, local_addr: LocalAddr) -> Result<u16> {
    let candidates: Vec<u16> = ports.first_ports().collect();
    if candidates.is_empty() {
        bail!(
            "no connect can self-connect here: net.ipv4.ip_local_reserved_ports covers every port that connect() \
             chooses: use --mode bind"
        );
    }
    let start = RandomState::new().build_hasher().finish() as usize % candidates.len();
    let (before, after) = candidates.split_at(start);
    after.iter().chain(before).copied().find(|&port| try_bind(local_addr, port, false).is_ok()).with_context(
        || format!("no port that connect() chooses from {} is free: wait, or use --mode bind", ports.range),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_cannot_self_connect_is_rejected_with_the_reason() {
        let ports = LocalPorts::parse("40000 40199", "40010-40020").unwrap();
        let rows = [
            (40000, None),
            (40001, Some("chooses even ports")),
            (40012, Some("ip_local_reserved_ports")),
            (39998, Some("outside of net.ipv4.ip_local_port_range, 40000-40199")),
        ];
        for (port, want) in rows {
            match (unreachable_reason(&ports, port), want) {
                (None, None) => {}
                (Some(why), Some(want)) => assert!(why.contains(want), "{port}: {why}"),
                (why, want) => panic!("{port}: {why:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn the_error_for_a_port_with_a_listener_names_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = port_taken_error(listener.local_addr().unwrap()).to_string();
        assert!(error.contains(&format!("(pid {}) listens on it", std::process::id())), "{error}");
    }

    #[test]
    fn the_sysctls_of_this_host_can_be_read() {
        let ports = sysctl::local_ports().unwrap();
        assert!(ports.range.low <= ports.range.high);
    }
}
