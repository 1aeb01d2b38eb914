//! The daemon's end of the thread that attaches the guard to every network namespace, and looks whether it still is
//! there.

use std::{
    io,
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
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
    system::{
        busy::{BusyClock, ThreadProblem},
        capabilities,
    },
};

/// Maximum number of first connects that wait for the thread. Their namespaces' owners are not known yet, so they have no
/// shares. It is twice as many as the programs remember namespaces, and the thread takes hundreds at a time into its own
/// queue, which is fair.
const MAX_FIRST_CONNECTS: usize = 8_192;

/// Maximum number of reports that wait for the daemon.
const MAX_REPORTS: usize = 64;

/// How long the end of the daemon waits until the thread has closed the links of its own network namespace and of
/// root's. The kernel closes the others when the process exits.
const LINK_TIMEOUT: Duration = Duration::from_millis(300);

/// How long the end of the daemon waits until the thread has removed the filters, which would stay. The end of the
/// process waits as long again.
const FILTER_TIMEOUT: Duration = Duration::from_secs(5);

/// The first connects on their way to the thread.
#[derive(Debug)]
struct FirstConnects {
    /// `None`: the program is turned off, and the thread is to detach it and to end.
    sender: Option<SyncSender<FirstConnect>>,
    /// Number of those for which there was no room.
    dropped: u64,
}

impl FirstConnects {
    fn new() -> (Self, Receiver<FirstConnect>) {
        let (sender, receiver) = mpsc::sync_channel(MAX_FIRST_CONNECTS);
        (Self { sender: Some(sender), dropped: 0 }, receiver)
    }

    fn push(&mut self, first: FirstConnect) {
        let Some(sender) = &self.sender else { return };
        // If the thread has ended, `GuardThread::ready` notices that.
        if let Err(TrySendError::Full(_)) = sender.try_send(first) {
            if self.dropped == 0 {
                log::warn!(
                    "{MAX_FIRST_CONNECTS} network namespaces with a first connect wait for the guard; others \
                     are guarded after the next walk"
                );
            }
            self.dropped += 1;
        }
    }
}

/// The daemon's end.
#[derive(Debug)]
pub struct GuardThread {
    first_connects: FirstConnects,
    reports: mpsc_async::Receiver<GuardReport>,
    next: Option<GuardReport>,
    has_ended: bool,
    switch: GuardSwitch,
    method: GuardMethod,
    /// Disconnected once the thread has ended.
    end: Receiver<()>,
    busy: BusyClock,
}

impl GuardThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(guard: Guard) -> io::Result<Self> {
        let (first_connects, receiver) = FirstConnects::new();
        let (report_sender, reports) = mpsc_async::channel(MAX_REPORTS);
        let (ended, end) = mpsc::channel();
        let (switch, method) = (guard.program.switch()?, guard.method());
        let busy = BusyClock::default();
        let of_thread = busy.clone();
        capabilities::spawn_restricted("guard", capabilities::GUARD_THREAD, move || {
            let _ended: mpsc::Sender<()> = ended;
            of_thread.begin();
            GuardWork::new(guard, report_sender).run(&receiver, &of_thread);
        })?;
        Ok(Self { first_connects, reports, next: None, has_ended: false, switch, method, end, busy })
    }

    /// A namespace has its first connect to its own address.
    pub fn on_first_connect(&mut self, first: FirstConnect) {
        self.first_connects.push(first);
    }

    /// Number of first connects that the thread has no room for. The next walk finds their namespaces.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.first_connects.dropped
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

    /// What is wrong with the thread.
    #[must_use]
    pub fn problem(&self) -> Option<ThreadProblem> {
        self.busy.problem(self.has_ended)
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
        if self.first_connects.sender.take().is_some()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_connect_without_room_is_counted_and_one_that_was_taken_makes_room() {
        let first = |netns_cookie| FirstConnect {
            tag: selfconn_ebpf::tag::FIRST_CONNECT,
            padding: 0,
            tid: 7,
            netns_cookie,
            netns: 1,
            padding_end: 0,
        };
        let (mut first_connects, receiver) = FirstConnects::new();
        let count = MAX_FIRST_CONNECTS as u64;
        (0..count + 9).for_each(|cookie| first_connects.push(first(cookie)));
        assert_eq!((first_connects.dropped, receiver.recv().unwrap().netns_cookie), (9, 0));
        first_connects.push(first(count + 9));
        assert_eq!((first_connects.dropped, receiver.try_iter().count() as u64), (9, count));
        first_connects.sender = None;
        first_connects.push(first(0));
        assert_eq!(first_connects.dropped, 9, "the run ends");
    }
}
