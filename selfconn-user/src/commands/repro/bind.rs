//! The textbook client: it binds a port and connects to the same port. This always works and needs no server.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use socket2::Socket;

use super::address::{EndpointText, LocalAddr};
use super::narrate::Narrator;
use super::step::{Bound, Connected, ReproStep};
use super::table::{self, State};
use super::{OpenedConnection, REPLY_TIMEOUT, connect_error};

/// Binds and connects, and prints both steps.
pub(super) fn open(
    local_addr: LocalAddr,
    port: Option<u16>,
    narrator: &mut Narrator,
) -> Result<OpenedConnection> {
    let socket = local_addr.tcp_socket()?;
    // Without SO_REUSEADDR, like most clients. The option would only allow other sockets with it on the same
    // port.
    let requested = local_addr.at(port.unwrap_or(0));
    socket.bind(&requested.into()).map_err(|error| bind_error(requested, &error))?;
    let local = socket.local_addr()?.as_socket().context("the kernel returned no local address")?;
    narrator
        .narrate(&ReproStep::Bound(Bound { local: EndpointText(local), chosen_by_kernel: port.is_none() }))?;

    socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
    let begin = Instant::now();
    socket.connect(&local.into()).map_err(|error| connect_error(local, &error))?;
    narrator.narrate(&ReproStep::Connected(Connected {
        remote: EndpointText(local),
        duration_ns: super::nanoseconds(begin.elapsed()),
        progress: None,
    }))?;
    Ok(OpenedConnection { socket, attempts: 1, cause: "bound" })
}

/// Binds the endpoint as a server would, and closes the socket at once. It never listens.
pub(super) fn try_bind(local_addr: LocalAddr, port: u16, reuse: bool) -> io::Result<()> {
    let socket: Socket = local_addr.tcp_socket().map_err(io::Error::other)?;
    socket.set_reuse_address(reuse)?;
    socket.bind(&local_addr.at(port).into())
}

/// The process or state that holds the endpoint, as a clause for an error message.
pub(super) fn describe_holder(endpoint: SocketAddr) -> String {
    let row = table::find_holder(endpoint).ok().flatten();
    let Some(row) = row else { return "a bound socket that no table lists has it".to_owned() };
    let process = row.holder().unwrap_or_else(|| "an unknown process".to_owned());
    match row.state {
        State::LISTEN => format!("{process} listens on it"),
        State::TIME_WAIT => {
            format!("a socket in TIME_WAIT has it for {:.0} s more", row.timer.as_secs_f64().ceil())
        }
        State(state) => format!("{process} has a connection on it ({state})"),
    }
}

fn bind_error(endpoint: SocketAddr, error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AddrInUse if endpoint.port() == 0 => {
            anyhow!("no port of net.ipv4.ip_local_port_range is free: name a port after the address")
        }
        io::ErrorKind::AddrInUse => {
            anyhow!(
                "cannot bind {endpoint}: {}: choose another port, or omit the port",
                describe_holder(endpoint)
            )
        }
        io::ErrorKind::PermissionDenied => anyhow!(
            "cannot bind {endpoint}: a port below net.ipv4.ip_unprivileged_port_start needs CAP_NET_BIND_SERVICE: \
             choose a higher port"
        ),
        _ => anyhow!("cannot bind {endpoint}: {error}"),
    }
}
