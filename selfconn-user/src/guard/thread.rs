//! The daemon's end of the thread that attaches the guard to every network namespace, and looks whether it still is
//! there.

use std::{
    io,
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    time::Duration,
};

use selfconn_ebpf::guard::FirstConnect;
use tokio::{sync::mpsc as mpsc_async, time::timeout};

use super::{
    start::Guard,
    work::{GuardReport, GuardWork},
};
use crate::{
    bpf::guard::{GuardMethod, GuardSwitch},
    system::capabilities,
};

/// Maximum number of first connects that wait for the thread.
const MAX_FIRST_CONNECTS: usize = 1_024;

/// Maximum number of reports that wait for the daemon.
const MAX_REPORTS: usize = 64;

/// How long the end of the daemon waits until the thread has closed the links of its own network namespace and of
/// root's. The kernel closes the others when the process exits.
const LINK_TIMEOUT: Duration = Duration::from_millis(300);

/// How long the end of the daemon waits until the thread has removed the filters, which would stay. The end of the
/// process waits as long again.
const FILTER_TIMEOUT: Duration = Duration::from_secs(5);

/// The daemon's end.
#[derive(Debug)]
pub struct GuardThread {
    /// `None`: the program is turned off, and the thread is to detach it and to end.
    first_connects: Option<SyncSender<FirstConnect>>,
    reports: mpsc_async::Receiver<GuardReport>,
    next: Option<GuardReport>,
    has_ended: bool,
    switch: GuardSwitch,
    method: GuardMethod,
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
        let (switch, method) = (guard.program.switch()?, guard.method());
        capabilities::spawn_restricted("guard", capabilities::GUARD_THREAD, move || {
            let _ended: mpsc::Sender<()> = ended;
            GuardWork::new(guard, report_sender).run(&receiver);
        })?;
        let first_connects = Some(first_connects);
        Ok(Self { first_connects, reports, next: None, has_ended: false, switch, method, end })
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

    /// Turns the program off everywhere, so that nothing more is refused, and detaches it. Waits for the filters, and
    /// for links only as long as a run may take to end.
    pub async fn stop(&mut self) {
        self.begin_end();
        let (limit, reports) = (self.limit(), &mut self.reports);
        let ended = async { while reports.recv().await.is_some() {} };
        if timeout(limit, ended).await.is_ok() {
            self.has_ended = true;
        } else if self.method == GuardMethod::Clsact {
            log::warn!("the guard could not be detached in time");
        }
    }

    fn begin_end(&mut self) {
        if self.first_connects.take().is_some()
            && let Err(error) = self.switch.turn_off()
        {
            log::warn!("the guard goes on until it is detached: {error}");
        }
    }

    const fn limit(&self) -> Duration {
        match self.method {
            GuardMethod::Tcx => LINK_TIMEOUT,
            GuardMethod::Clsact => FILTER_TIMEOUT,
        }
    }
}

impl Drop for GuardThread {
    /// Waits until the filters are removed, also if the daemon ends by an error. Links end with the process.
    fn drop(&mut self) {
        self.begin_end();
        if self.method == GuardMethod::Clsact
            && self.end.recv_timeout(FILTER_TIMEOUT) == Err(RecvTimeoutError::Timeout)
        {
            log::warn!("the guard could not be detached in time");
        }
    }
}
