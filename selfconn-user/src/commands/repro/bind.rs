//! The textbook client: it binds a port and connects to the same one. No luck is needed, and no server.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use socket2::Socket;

use super::address::{Endpoint, Own};
use super::narrate::Narrator;
use super::step::{Bound, Connected, Step};
use super::table::{self, State};
use super::{Opened, PATIENCE, dial_error};

/// Binds, connects, and tells both.
pub(super) fn open(own: Own, port: Option<u16>, narrator: &mut Narrator) -> Result<Opened> {
    let socket = own.tcp_socket()?;
    // Without SO_REUSEADDR, as most clients are; it would only let others with that option onto the port.
    let wanted = own.at(port.unwrap_or(0));
    socket.bind(&wanted.into()).map_err(|error| bind_error(wanted, &error))?;
    let local = socket.local_addr()?.as_socket().context("the kernel gave no local address")?;
    narrator.tell(&Step::Bound(Bound { local: Endpoint(local), chosen_by_kernel: port.is_none() }))?;

    socket.set_write_timeout(Some(PATIENCE))?;
    let begin = Instant::now();
    socket.connect(&local.into()).map_err(|error| dial_error(local, &error))?;
    narrator.tell(&Step::Connected(Connected {
        remote: Endpoint(local),
        duration_ns: super::nanos(begin.elapsed()),
        dialled: None,
    }))?;
    Ok(Opened { socket, attempts: 1, cause: "bound" })
}

/// Whether a server could have the endpoint now. The probe never listens, and leaves nothing behind.
pub(super) fn probe(own: Own, port: u16, reuse: bool) -> io::Result<()> {
    let socket: Socket = own.tcp_socket().map_err(io::Error::other)?;
    socket.set_reuse_address(reuse)?;
    socket.bind(&own.at(port).into())
}

/// Who has the endpoint, for the sentence `… has it`.
pub(super) fn occupant(endpoint: SocketAddr) -> String {
    let row = table::blocker(endpoint).ok().flatten();
    let Some(row) = row else { return "a socket that is bound and shows in no table".to_owned() };
    let who = row.holder().unwrap_or_else(|| "a process that cannot be seen from here".to_owned());
    match row.state {
        State::LISTEN => format!("{who} listens on it"),
        State::TIME_WAIT => format!("a TIME_WAIT has it for {:.0} s more", row.timer.as_secs_f64().ceil()),
        State(state) => format!("{who} has a connection on it ({state})"),
    }
}

fn bind_error(endpoint: SocketAddr, error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AddrInUse if endpoint.port() == 0 => {
            anyhow!(
                "the kernel has no port of net.ipv4.ip_local_port_range left to choose: name one after the address"
            )
        }
        io::ErrorKind::AddrInUse => {
            anyhow!("cannot bind {endpoint}: {}: choose another port, or leave it out", occupant(endpoint))
        }
        io::ErrorKind::PermissionDenied => anyhow!(
            "cannot bind {endpoint}: a port below net.ipv4.ip_unprivileged_port_start needs CAP_NET_BIND_SERVICE: \
             choose a higher one"
        ),
        _ => anyhow!("cannot bind {endpoint}: {error}"),
    }
}
