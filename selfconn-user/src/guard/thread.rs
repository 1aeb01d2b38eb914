//! The daemon's end of the thread that attaches the guard to every network namespace, and looks whether it still is
//! there.

use std::{
    io,
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    time::Duration,
};

use selfconn_ebpf::guard::FirstConnect;
use tokio::sync::mpsc as mpsc_async;

use super::{
    start::Guard,
    work::{GuardReport, GuardWork},
};
use crate::system::capabilities;

/// Maximum number of first connects that wait for the thread.
const MAX_FIRST_CONNECTS: usize = 1_024;

/// Maximum number of reports that wait for the daemon.
const MAX_REPORTS: usize = 64;

/// How long the end of the daemon waits for the end of the thread.
const DETACH_TIMEOUT: Duration = Duration::from_secs(5);

/// The daemon's end.
#[derive(Debug)]
pub struct GuardThread {
    /// `None`: the thread is to detach the program and to end.
    first_connects: Option<SyncSender<FirstConnect>>,
    reports: mpsc_async::Receiver<GuardReport>,
    next: Option<GuardReport>,
    has_ended: bool,
    /// Disconnected once the thread has ended.
    end: Receiver<()>,
}

impl GuardThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(guard: Guard) -> io::Result<Self> {
        let (first_connects, receiver) = mpsc::sync_channel(MAX_FIRST_CONNECTS);
        let (report_sender, reports) = mpsc_async::channel(MAX_REPORTS);
        let (ended, end) = mpsc::channel();
        capabilities::spawn_restricted("guard", capabilities::GUARD_THREAD, move || {
            let _ended: mpsc::Sender<()> = ended;
            GuardWork::new(guard, report_sender).run(&receiver);
        })?;
        Ok(Self { first_connects: Some(first_connects), reports, next: None, has_ended: false, end })
    }

    /// A namespace has its first connect to its own address.
    pub fn on_first_connect(&self, first: FirstConnect) {
        // Fails if the thread has ended, which `ready` notices, or if too many wait: the walk finds their namespaces.
        let _ = self.first_connects.as_ref().map(|requests| requests.try_send(first));
    }

    /// Waits until a report is there, for ever once the thread has ended. Cancel safe.
    pub async fn ready(&mut self) {
        if self.next.is_none() && !self.has_ended {
            self.next = self.reports.recv().await;
            self.has_ended = self.next.is_none();
        }
        if self.next.is_none() {
            std::future::pending::<()>().await;
        }
    }

    pub fn try_report(&mut self) -> Option<GuardReport> {
        self.next.take().or_else(|| self.reports.try_recv().ok())
    }

    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Detaches the program everywhere. Returns when that is done.
    pub async fn stop(&mut self) {
        drop(self.first_connects.take());
        while self.reports.recv().await.is_some() {}
        self.has_ended = true;
    }
}

impl Drop for GuardThread {
    /// Waits until the program is detached, also if the daemon ends by an error.
    fn drop(&mut self) {
        drop(self.first_connects.take());
        if self.end.recv_timeout(DETACH_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("the guard could not be detached in time");
        }
    }
}
