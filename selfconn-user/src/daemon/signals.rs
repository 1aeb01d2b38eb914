//! The signals that the daemon handles.

use std::io;

use rustix::process::Signal as SignalNumber;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
pub(super) enum SignalAction {
    Stop,
    ReopenLog,
}

pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
    /// With a handler for SIGXFSZ, a limit on the log's size is a write error and does not kill the daemon.
    _too_large: Signal,
}

impl Signals {
    /// Installs the handlers. Without a file to reopen, SIGHUP keeps its default action: the daemon ends with
    /// its terminal.
    pub(super) fn install(can_reopen: bool) -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: can_reopen.then(|| signal(SignalKind::hangup())).transpose()?,
            _too_large: signal(SignalKind::from_raw(SignalNumber::XFSZ.as_raw()))?,
        })
    }

    /// Waits for the next signal. Cancel safe.
    pub(super) async fn next(&mut self) -> SignalAction {
        let Self { interrupt, terminate, hangup, .. } = self;
        let hung_up = async {
            match hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = interrupt.recv() => SignalAction::Stop,
            _ = terminate.recv() => SignalAction::Stop,
            _ = hung_up => SignalAction::ReopenLog,
        }
    }
}
