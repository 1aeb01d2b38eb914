//! Notifications to the service manager: the real daemon and a socket that plays the part of systemd in
//! sd_notify(3).

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::net::UnixDatagram,
    process::Child,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::support::{
    client::run_self_connection,
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event},
    netns::TestNetns,
};

struct FakeServiceManager {
    socket: UnixDatagram,
    dir: tempfile::TempDir,
}

impl FakeServiceManager {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket, dir }
    }

    fn start(&self, watchdog: Option<Duration>) -> TestDaemon {
        TestDaemon::start_with(&HookVariant(vec![]), &[], |command| -> Child {
            command.env("NOTIFY_SOCKET", self.dir.path().join("notify"));
            if let Some(limit) = watchdog {
                command.env("WATCHDOG_USEC", limit.as_micros().to_string());
            }
            command.spawn().unwrap()
        })
    }

    fn receive(&self) -> String {
        let mut message = [0; 1 << 10];
        let length = self.socket.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    /// The messages received so far.
    fn receive_all_pending(&self) -> Vec<String> {
        self.socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut message = [0; 1 << 10];
        std::iter::from_fn(|| {
            let length = self.socket.recv(&mut message).ok()?;
            Some(String::from_utf8(message[..length].to_vec()).unwrap())
        })
        .collect()
    }
}

#[test]
fn ready_is_sent_when_the_hooks_are_live_and_stopping_at_the_end() {
    let net = TestNetns::enter_new();
    let manager = FakeServiceManager::new();
    let mut daemon = manager.start(None);
    let ready = manager.receive();
    assert!(ready.starts_with("READY=1\nSTATUS=watching by "), "{ready}");
    run_self_connection(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, is_event("closed", net.inode));
    daemon.stop();
    // Without a watchdog it has sent nothing else.
    assert_eq!(manager.receive_all_pending(), ["STOPPING=1"]);
}

#[test]
fn the_watchdog_is_pinged_only_while_the_loop_runs() {
    let net = TestNetns::enter_new();
    let manager = FakeServiceManager::new();
    let mut daemon = manager.start(Some(Duration::from_millis(400)));
    assert!(manager.receive().starts_with("READY=1"));
    let began = Instant::now();
    for _ in 0..5 {
        assert_eq!(manager.receive(), "WATCHDOG=1");
    }
    // Pings come at half the limit, so five of them take at least this long.
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
    // Pings also come while records arrive without a pause.
    let (mut pings, until) = (0, Instant::now() + DEADLINE);
    while pings < 3 {
        assert!(Instant::now() < until, "no watchdog ping under load");
        for _ in 0..50 {
            run_self_connection(Ipv4Addr::LOCALHOST.into());
        }
        pings += manager.receive_all_pending().len();
    }
    daemon.expect(1, is_event("closed", net.inode));
    // A stopped loop sends no ping.
    daemon.signal(Signal::STOP);
    let state = || fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    while !state().contains("State:\tT") {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(1));
    }
    manager.receive_all_pending();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(manager.receive_all_pending(), [""; 0]);
    daemon.signal(Signal::CONT);
    daemon.stop();
}
