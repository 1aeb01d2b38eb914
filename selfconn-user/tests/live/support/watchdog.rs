//! A service manager with a watchdog, and the longest time for which a daemon leaves it without a ping.

use std::{
    os::unix::net::UnixDatagram,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::daemon::{HookVariant, TestDaemon};

/// What the service manager allows. The daemon sends a ping in each half of it.
const WATCHDOG: Duration = Duration::from_secs(1);

/// Reads the pings of one daemon.
pub(crate) struct Watchdog {
    is_over: Arc<AtomicBool>,
    /// `None`: it has ended.
    reader: Option<JoinHandle<Duration>>,
    _folder: TempDir,
}

impl Watchdog {
    /// Starts a daemon, and reads its pings from then on.
    pub(crate) fn start_daemon(options: &[&str]) -> (TestDaemon, Self) {
        Self::start_daemon_with(options, |command| command.spawn().unwrap())
    }

    /// As [`Self::start_daemon`]; `spawn` starts the process.
    pub(crate) fn start_daemon_with(
        options: &[&str],
        spawn: impl FnOnce(&mut Command) -> Child,
    ) -> (TestDaemon, Self) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let daemon = TestDaemon::start_with(&HookVariant(vec![]), options, |command| {
            let usec = WATCHDOG.as_micros().to_string();
            spawn(command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", usec))
        });
        let is_over = Arc::new(AtomicBool::new(false));
        let of_reader = Arc::clone(&is_over);
        let reader = thread::spawn(move || longest_without_ping(&manager, &of_reader));
        (daemon, Self { is_over, reader: Some(reader), _folder: folder })
    }

    /// Fails if there was no ping for as long as the service manager allows. Must be called before the daemon ends.
    #[track_caller]
    pub(crate) fn assert_fed(mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let longest = self.reader.take().unwrap().join().unwrap();
        println!("FACT longest_without_ping_ms={}", longest.as_millis());
        assert!(longest < WATCHDOG, "{longest:?}");
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

fn longest_without_ping(manager: &UnixDatagram, is_over: &AtomicBool) -> Duration {
    manager.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let (mut last_ping, mut longest) = (Instant::now(), Duration::ZERO);
    let mut message = [0; 256];
    while !is_over.load(Ordering::Relaxed) {
        if manager.recv(&mut message).is_ok_and(|length| &message[..length] == b"WATCHDOG=1") {
            longest = longest.max(last_ping.elapsed());
            last_ping = Instant::now();
        }
    }
    longest.max(last_ping.elapsed())
}
