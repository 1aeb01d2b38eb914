//! Runs the self-tests of the hooks: connects the self-test's socket, keeps its records away from the
//! connections, and reads the probes' counters.

use std::{fmt, time::Duration};

use anyhow::Result;
use selfconn_ebpf::{Transition, state};
use tokio::time::Instant;

use crate::{
    bpf::{attach::Method, loader::Counters},
    detect::probe_health::{DeadProbes, ProbeHealth, SelfTestCounts, SelfTestOutcome},
};
use recognition::Recognition;
use socket::SelfTestSocket;

pub mod recognition;
pub mod socket;

/// What to say if the host has dropped the packets of a self-test: one line of text for people.
pub const NOT_CONNECTED: &str = "the self-test has shown nothing: its socket was not connected within two seconds. \
    Packets of loopback were dropped, perhaps because net.core.netdev_max_backlog is too small for this load";

/// The schedule of the self-tests, and their socket. Without the privileges to create the socket there are no
/// self-tests, but the self-tests of other daemons are recognized nevertheless.
pub struct SelfTest {
    health: Option<(ProbeHealth, SelfTestSocket)>,
    recognition: Recognition,
}

impl SelfTest {
    /// Tests these methods at this interval.
    #[must_use]
    pub fn new(socket: Option<SelfTestSocket>, interval: Duration, methods: Vec<Method>) -> Self {
        let own_cookie = socket.as_ref().map(SelfTestSocket::cookie);
        let health = socket.map(|socket| (ProbeHealth::new(methods, interval, Instant::now()), socket));
        Self { health, recognition: Recognition::new(own_cookie, rustix::process::getuid().as_raw()) }
    }

    /// Handles a transition of a self-test. Returns true if it was one: such a transition is not processed
    /// further.
    pub(super) fn consume(&mut self, t: &Transition) -> bool {
        let is_ours = self.recognition.is_ours(t);
        let is_test = is_ours || self.recognition.is_other(t);
        if is_test && let Some((health, _)) = &mut self.health {
            health.on_record(is_ours, t.new == state::ESTABLISHED);
        }
        is_test
    }

    /// True if the socket with this cookie is the socket of a self-test.
    pub(super) fn is_self_test_socket(&self, cookie: u64) -> bool {
        self.recognition.is_self_test_socket(cookie)
    }

    /// Results so far. `None`: there are no self-tests.
    pub(super) fn counts(&self) -> Option<SelfTestCounts> {
        self.health.as_ref().map(|(health, _)| health.counts())
    }

    /// True if the last self-test passed, or if there are no self-tests.
    pub(super) fn is_healthy(&self) -> bool {
        self.health.as_ref().is_none_or(|(health, _)| health.is_healthy())
    }

    /// When the next self-test begins, or the current one times out.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.health.as_ref().map(|(health, _)| health.next_at())
    }

    /// Begins a self-test, if due. `counters` reads the probes' counters.
    pub(super) fn begin_if_due(&mut self, counters: impl FnOnce() -> Result<Counters>) {
        let now = Instant::now();
        let Some((health, test)) = self.health.as_mut().filter(|(health, _)| health.is_due(now)) else {
            return;
        };
        match counters().and_then(|before| Ok((before, test.connect()?))) {
            Ok((before, ())) => health.begin(before, now),
            Err(error) => {
                log::error!("the self-test can't be started: {error:#}");
                health.postpone(now);
            }
        }
    }

    /// True if a self-test has its record, or has timed out.
    pub(super) fn can_evaluate(&self) -> bool {
        self.health.as_ref().is_some_and(|(health, _)| health.can_evaluate(Instant::now()))
    }

    /// Evaluates the self-test. All records so far must have been drained: if the daemon was stopped for a
    /// while, the test has timed out but its records are still in the ring buffer. `Some`: the hooks are dead.
    pub(super) fn evaluate(&mut self, counters: Result<Counters>) -> Option<DeadProbes> {
        let now = Instant::now();
        let (health, test) = self.health.as_mut()?;
        let outcome = match counters {
            Ok(after) => Some(health.evaluate(&after, test.is_connected(), now)?),
            Err(error) => {
                log::error!("the probes' counters can't be read: {error:#}");
                health.postpone(now);
                None
            }
        };
        // The test is over, with or without an outcome: a connected socket can't be connected again.
        test.disconnect();
        match outcome {
            Some(SelfTestOutcome::Passed) => log::debug!("self-test passed"),
            Some(SelfTestOutcome::Failed(dead)) => log::warn!("self-test failed: {dead:?}"),
            Some(SelfTestOutcome::HooksDead(dead)) => return Some(dead),
            Some(SelfTestOutcome::NotConnected) => log::warn!("{NOT_CONNECTED}"),
            None => {}
        }
        None
    }
}

/// The self-tests have shown that the hooks do not work any more: the reason why the run ends.
pub struct HooksDead(pub(super) DeadProbes);

impl fmt::Display for HooksDead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(DeadProbes { methods, ring }) = self;
        let methods: Vec<_> = methods.iter().map(|method| method.name()).collect();
        match (methods.is_empty(), ring) {
            (true, _) => write!(f, "the ring buffer delivers no records any more")?,
            (false, _) => write!(f, "{} observes no transitions any more", methods.join(" and "))?,
        }
        write!(
            f,
            ", as repeated self-tests have shown: exiting, so that a restart can attach the hooks again"
        )
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};

    use anyhow::anyhow;

    use super::*;

    /// A test of `tp_btf` whose socket is in this network namespace.
    fn self_test() -> SelfTest {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let SocketAddr::V4(free) = listener.local_addr().unwrap() else { unreachable!() };
        drop(listener);
        SelfTest::new(Some(SelfTestSocket::bind(free).unwrap()), Duration::ZERO, vec![Method::TpBtf])
    }

    fn is_connected(test: &SelfTest) -> bool {
        test.health.as_ref().is_some_and(|(_, socket)| socket.is_connected())
    }

    /// On a busy host another thread of the kernel delivers the SYN.
    fn is_connected_soon(test: &SelfTest) -> bool {
        let until = Instant::now() + Duration::from_secs(10);
        while !is_connected(test) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        is_connected(test)
    }

    #[test]
    fn unreadable_counters_postpone_the_test_and_leave_the_socket_unconnected() {
        let mut test = self_test();
        for _ in 0..3 {
            test.begin_if_due(|| Ok(Counters::default()));
            assert!(is_connected_soon(&test));
            assert_eq!(test.evaluate(Err(anyhow!("EPERM"))), None);
            assert!(!is_connected(&test), "the next test would fail with EISCONN");
            assert!(!test.can_evaluate());
        }
        // A test that goes on keeps its connection.
        test.begin_if_due(|| Ok(Counters::default()));
        assert!(is_connected_soon(&test));
        assert_eq!(test.evaluate(Ok(Counters::default())), None);
        assert!(is_connected(&test));
        // Unreadable counters at the beginning start no test.
        let mut test = self_test();
        test.begin_if_due(|| Err(anyhow!("EPERM")));
        assert!(!is_connected(&test) && !test.can_evaluate());
    }
}
