//! Keeping the connection open: until the time is up, somebody says stop, or somebody destroys it.

use std::net::TcpStream as StdStream;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::Socket;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

use super::narrate::Narrator;
use super::step::Step;

/// Why the hold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Enough,
    /// By SIGINT or SIGTERM.
    Stopped,
    Destroyed,
}

/// Holds the connection, and gives it back. The signals are caught before the step is told, so that a reader may
/// send one at once.
pub(super) fn hold(
    socket: Socket,
    port: u16,
    time: Duration,
    narrator: &mut Narrator,
) -> Result<(Socket, Held)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        // Moved, not cloned: a second descriptor of the socket would be seen from outside.
        socket.set_nonblocking(true)?;
        let stream = TcpStream::from_std(StdStream::from(socket))?;
        narrator.tell(&Step::Holding { seconds: time.as_secs_f64(), port })?;
        let held = tokio::select! {
            () = tokio::time::sleep(time) => Held::Enough,
            _ = interrupt.recv() => Held::Stopped,
            _ = terminate.recv() => Held::Stopped,
            // Nothing is on its way any more and nobody else can write: only an end makes it readable.
            _ = stream.readable() => Held::Destroyed,
        };
        Ok((stream.into_std()?.into(), held))
    })
}
