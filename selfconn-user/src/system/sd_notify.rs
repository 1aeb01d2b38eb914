//! Notifies systemd if it started the process with `Type=notify`: that the hooks are attached, that the main
//! loop is running, and that the process is stopping. The protocol is one datagram for each message
//! (sd_notify(3)).
//!
//! The main loop itself pings the watchdog, because a separate thread would continue to ping even if the loop
//! is stuck.

use std::{
    collections::VecDeque,
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// Maximum number of messages that wait for a manager that does not read its socket.
const MAX_UNSENT: usize = 64;

/// The service manager that started this process.
#[derive(Debug)]
pub struct ServiceManager {
    /// Non-blocking: a manager that does not read its socket must not stop the daemon.
    socket: UnixDatagram,
    ping_interval: Option<Duration>,
    /// Messages that the manager's socket had no room for, in order.
    unsent: VecDeque<String>,
}

impl ServiceManager {
    /// The service manager named in the environment variable `NOTIFY_SOCKET`; `None`: it is not set.
    ///
    /// # Errors
    /// If the variable is set but the socket cannot be reached.
    pub fn from_env() -> io::Result<Option<Self>> {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect_addr(&address(&name)?)?;
        let variable = |name| env::var(name).ok();
        let limit = watchdog_limit(
            variable("WATCHDOG_USEC").as_deref(),
            variable("WATCHDOG_PID").as_deref(),
            std::process::id(),
        );
        let ping_interval = limit.map(|limit| limit / 2);
        Ok(Some(Self { socket, ping_interval, unsent: VecDeque::new() }))
    }

    /// The interval between pings of the watchdog; `None`: there is no watchdog.
    #[must_use]
    pub fn ping_interval(&self) -> Option<Duration> {
        self.ping_interval
    }

    /// Reports that the hooks are attached.
    pub fn ready(&mut self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// Reports that the main loop is running.
    pub fn ping(&mut self) {
        self.send("WATCHDOG=1");
    }

    /// Reports that files are being reopened; [`Self::ready`] reports the end of it.
    pub fn reloading(&mut self) {
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// Reports that the process is stopping.
    pub fn stopping(&mut self) {
        self.send("STOPPING=1");
    }

    fn send(&mut self, message: &str) {
        // A repeated ping says no more than the one that waits.
        if self.unsent.len() < MAX_UNSENT && self.unsent.back().is_none_or(|last| last != message) {
            self.unsent.push_back(message.to_owned());
        }
        self.send_unsent();
    }

    /// True if a message waits for room in the manager's socket.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends the messages that wait, as far as there is room.
    pub fn send_unsent(&mut self) {
        while let Some(message) = self.unsent.front() {
            match self.socket.send(message.as_bytes()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => log::warn!("cannot send {message:?} to the service manager: {error}"),
                Ok(_) => {}
            }
            self.unsent.pop_front();
        }
    }
}

/// The address of the socket: a path, or with a leading `@` a name in the abstract namespace.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(name),
    }
}

/// The time limit of the watchdog, if the watchdog is meant for this process.
fn watchdog_limit(microseconds: Option<&str>, pid: Option<&str>, own_pid: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own_pid)) {
        return None;
    }
    microseconds?.parse().ok().filter(|limit| *limit > 0).map(Duration::from_micros)
}

/// Replaces line breaks, because a message has one line for each variable.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_applies_unless_it_names_another_pid() {
        let second = Some(Duration::from_secs(1));
        for (microseconds, pid, limit) in [
            (Some("1000000"), None, second),
            (Some("1000000"), Some("7"), second),
            (Some("1000000"), Some("8"), None),
            (Some("1000000"), Some("x"), None),
            (Some("0"), None, None),
            (Some("soon"), None, None),
            (None, Some("7"), None),
        ] {
            assert_eq!(watchdog_limit(microseconds, pid, 7), limit, "{microseconds:?} {pid:?}");
        }
    }

    #[test]
    fn a_name_with_a_leading_at_sign_is_abstract() {
        let abstract_address = address(OsStr::new("@selfconn/1")).unwrap();
        assert_eq!(abstract_address.as_abstract_name(), Some(&b"selfconn/1"[..]));
        let path = address(OsStr::new("/run/systemd/notify")).unwrap();
        assert_eq!(path.as_pathname(), Some(std::path::Path::new("/run/systemd/notify")));
        assert!(address(OsStr::new(&"x".repeat(200))).is_err());
    }

    #[test]
    fn a_manager_that_does_not_read_blocks_nothing_and_gets_the_rest_later() {
        let folder = tempfile::tempdir().unwrap();
        let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        manager.set_nonblocking(true).unwrap();
        let socket = UnixDatagram::unbound().unwrap();
        socket.connect(folder.path().join("notify")).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut service = ServiceManager { socket, ping_interval: None, unsent: VecDeque::new() };
        let mut sent = 0;
        while !service.has_unsent() && sent < 10_000 {
            service.ping();
            sent += 1;
        }
        assert!(service.has_unsent(), "the queue never fills");
        service.ping();
        service.stopping();
        assert_eq!(service.unsent, ["WATCHDOG=1", "STOPPING=1"]);
        let mut message = [0; 64];
        let mut received = Vec::new();
        while let Ok(length) = manager.recv(&mut message) {
            received.push(message[..length].to_vec());
            service.send_unsent();
        }
        assert_eq!((received.len(), service.has_unsent()), (sent + 1, false));
        assert_eq!(received.last().unwrap(), b"STOPPING=1");
    }

    #[test]
    fn a_status_is_one_line() {
        assert_eq!(one_line("a\nREADY=1"), "a READY=1");
    }
}
