//! Keeps the connection open until the time is up, a signal arrives, or another process destroys the
//! connection.

use std::net::TcpStream as StdStream;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::Socket;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

use super::narrate::Narrator;
use super::step::ReproStep;

/// Why the hold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HoldEnd {
    TimeUp,
    /// SIGINT or SIGTERM arrived.
    Signalled,
    Destroyed,
}

/// Holds the connection, and returns it. The signal handlers are set up before the step is printed, so that a
/// reader of the output can send a signal at once.
pub(super) fn hold(
    socket: Socket,
    port: u16,
    time: Duration,
    narrator: &mut Narrator,
) -> Result<(Socket, HoldEnd)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        // Moved, not cloned, because a second descriptor of the socket would be visible from outside.
        socket.set_nonblocking(true)?;
        let stream = TcpStream::from_std(StdStream::from(socket))?;
        narrator.narrate(&ReproStep::Holding { seconds: time.as_secs_f64(), port })?;
        let hold_end = tokio::select! {
            () = tokio::time::sleep(time) => HoldEnd::TimeUp,
            _ = interrupt.recv() => HoldEnd::Signalled,
            _ = terminate.recv() => HoldEnd::Signalled,
            // All data has been read and no other process can write, so the socket becomes readable only if
            // it ends.
            _ = stream.readable() => HoldEnd::Destroyed,
        };
        Ok((stream.into_std()?.into(), hold_end))
    })
}
