//! What a service manager hears: the real daemon, and a socket that speaks systemd's side of sd_notify(3).

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::net::UnixDatagram,
    process::Child,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    client::talk_to_self,
    daemon::{DEADLINE, Daemon, Variant, of},
    net::Net,
};

struct Manager {
    socket: UnixDatagram,
    dir: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket, dir }
    }

    fn start(&self, watchdog: Option<Duration>) -> Daemon {
        Daemon::start_by(&Variant(vec![]), &[], |command| -> Child {
            command.env("NOTIFY_SOCKET", self.dir.path().join("notify"));
            if let Some(limit) = watchdog {
                command.env("WATCHDOG_USEC", limit.as_micros().to_string());
            }
            command.spawn().unwrap()
        })
    }

    fn hears(&self) -> String {
        let mut message = [0; 1 << 10];
        let length = self.socket.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    /// What has come in so far.
    fn has_heard(&self) -> Vec<String> {
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
fn it_is_ready_when_its_hooks_are_live_and_says_when_it_stops() {
    let net = Net::private();
    let manager = Manager::new();
    let mut daemon = manager.start(None);
    let ready = manager.hears();
    assert!(ready.starts_with("READY=1\nSTATUS=watching by "), "{ready}");
    talk_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, of("closed", net.inode));
    daemon.stop();
    // And without a watchdog it has said nothing else.
    assert_eq!(manager.has_heard(), ["STOPPING=1"]);
}

#[test]
fn the_watchdog_is_fed_by_the_loop_and_only_while_it_turns() {
    let net = Net::private();
    let manager = Manager::new();
    let mut daemon = manager.start(Some(Duration::from_millis(400)));
    assert!(manager.hears().starts_with("READY=1"));
    let began = Instant::now();
    for _ in 0..5 {
        assert_eq!(manager.hears(), "WATCHDOG=1");
    }
    // Five halves of its limit: not more often than that.
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
    // Also while records never cease to come.
    let (mut fed, until) = (0, Instant::now() + DEADLINE);
    while fed < 3 {
        assert!(Instant::now() < until, "it is not fed under load");
        for _ in 0..50 {
            talk_to_self(Ipv4Addr::LOCALHOST.into());
        }
        fed += manager.has_heard().len();
    }
    daemon.expect(1, of("closed", net.inode));
    // A loop that doesn't turn doesn't feed it.
    daemon.signal(Signal::STOP);
    let state = || fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    while !state().contains("State:\tT") {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(1));
    }
    manager.has_heard();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(manager.has_heard(), [""; 0]);
    daemon.signal(Signal::CONT);
    daemon.stop();
}
