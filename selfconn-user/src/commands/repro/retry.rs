//! The accident: a client dials a closed port again and again, each time from a new socket, until the kernel
//! happens to choose that very port as the source. First come the reasons why it could never happen.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::address::{Endpoint, Own};
use super::bind::{occupant, probe};
use super::narrate::Narrator;
use super::step::{Connected, Dialling, Progress, Step};
use super::{Opened, PATIENCE, dial_error, ends, nanos};
use crate::ports::{LocalPorts, Reach, chance_after};
use crate::sysctl;

/// More dials than this many times the expected number are needed once in e^10, that is 22,000 runs.
const PATIENT: u64 = 10;

/// Dials until it hits, and tells how it goes.
pub(super) fn open(
    own: Own,
    port: Option<u16>,
    limit: Option<u64>,
    narrator: &mut Narrator,
) -> Result<Opened> {
    let ports = sysctl::local_ports()?;
    let port = match port {
        Some(port) => dialable(&ports, own, port)?,
        None => choose(&ports, own)?,
    };
    let source = own.source()?;
    if own.at(0).ip() != source {
        bail!(
            "connect() to {own} leaves from {source}, so that its two ends can't be equal: \
             dial {source}, or use --mode bind"
        );
    }
    let expected_dials = ports.expected_dials();
    let limit = limit.unwrap_or(PATIENT * u64::from(expected_dials));
    let remote = own.at(port);
    narrator.tell(&Step::Dialling(Dialling {
        remote: Endpoint(remote),
        range: ports.range,
        expected_dials,
        limit,
    }))?;

    let begin = Instant::now();
    let so_far = |attempts: u64| Progress {
        attempts,
        per_second: attempts as f64 / begin.elapsed().as_secs_f64().max(1e-9),
        expected_dials,
        chance: chance_after(attempts, expected_dials),
    };
    let mut told = begin;
    for attempts in 1..=limit {
        let socket = own.tcp_socket()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        match socket.connect(&remote.into()) {
            Ok(()) => {
                let (local, peer) = ends(&socket)?;
                if local != peer {
                    bail!(
                        "somebody began to listen on {remote} meanwhile, and was reached: choose another port"
                    );
                }
                narrator.tell(&Step::Connected(Connected {
                    remote: Endpoint(remote),
                    duration_ns: nanos(begin.elapsed()),
                    dialled: Some(so_far(attempts)),
                }))?;
                return Ok(Opened { socket, attempts, cause: "ephemeral" });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(dial_error(remote, &error)),
        }
        if told.elapsed() >= narrator.pace() {
            narrator.tell(&Step::Progress(so_far(attempts)))?;
            told = Instant::now();
        }
    }
    let chance = so_far(limit).chance * 100.0;
    Err(anyhow!(
        "none of {limit} dials to {remote} hit itself, for a chance of {chance:.2} %: run it again, \
         or allow more with --attempts"
    ))
}

/// The port, if a dial to it can hit itself.
fn dialable(ports: &LocalPorts, own: Own, port: u16) -> Result<u16> {
    let endpoint = own.at(port);
    if let Some(why) = why_never(ports, port) {
        bail!("a dial to {endpoint} never hits itself: {why}: leave the port out, or use --mode bind");
    }
    match probe(own, port, false) {
        Ok(()) => Ok(port),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(taken(endpoint)),
        Err(error) => Err(anyhow!("cannot use {endpoint}: {error}")),
    }
}

fn why_never(ports: &LocalPorts, port: u16) -> Option<String> {
    let range = ports.range;
    match ports.reach(port) {
        Reach::First => None,
        Reach::Last => {
            let parity = if range.low.is_multiple_of(2) { "even" } else { "odd" };
            Some(format!(
                "of the range {range}, connect() chooses {parity} ports while there are any \
                 (bind() to port 0 and IP_LOCAL_PORT_RANGE reach the others)"
            ))
        }
        Reach::Reserved => Some("it is listed in net.ipv4.ip_local_reserved_ports".to_owned()),
        Reach::Outside => Some(format!("it is outside of net.ipv4.ip_local_port_range, {range}")),
    }
}

fn taken(endpoint: SocketAddr) -> anyhow::Error {
    anyhow!(
        "a dial to {endpoint} can't hit itself: {}: dial a closed port, or leave it out",
        occupant(endpoint)
    )
}

/// A closed port that a dial can hit. Any: two runs beside each other should not meet.
fn choose(ports: &LocalPorts, own: Own) -> Result<u16> {
    let candidates: Vec<u16> = ports.first_ports().collect();
    if candidates.is_empty() {
        bail!(
            "no dial can hit itself here: net.ipv4.ip_local_reserved_ports covers every port that connect() \
             chooses: use --mode bind"
        );
    }
    let start = RandomState::new().build_hasher().finish() as usize % candidates.len();
    let (before, after) = candidates.split_at(start);
    after.iter().chain(before).copied().find(|&port| probe(own, port, false).is_ok()).with_context(|| {
        format!("each port that connect() chooses from {} is taken: wait, or use --mode bind", ports.range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_cannot_be_hit_is_refused_with_the_reason() {
        let ports = LocalPorts::parse("40000 40199", "40010-40020").unwrap();
        let rows = [
            (40000, None),
            (40001, Some("chooses even ports")),
            (40012, Some("ip_local_reserved_ports")),
            (39998, Some("outside of net.ipv4.ip_local_port_range, 40000-40199")),
        ];
        for (port, want) in rows {
            match (why_never(&ports, port), want) {
                (None, None) => {}
                (Some(why), Some(want)) => assert!(why.contains(want), "{port}: {why}"),
                (why, want) => panic!("{port}: {why:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn a_listener_is_named_when_its_port_is_dialled() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = taken(listener.local_addr().unwrap()).to_string();
        assert!(error.contains(&format!("(pid {}) listens on it", std::process::id())), "{error}");
    }

    #[test]
    fn the_sysctls_of_this_host_can_be_read() {
        let ports = sysctl::local_ports().unwrap();
        assert!(ports.range.low <= ports.range.high);
    }
}
