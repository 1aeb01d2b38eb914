//! Notifies systemd if it started the process with `Type=notify`: that the hooks are attached, that the main
//! loop is running, and that the process is stopping. The protocol is one datagram for each message
//! (sd_notify(3)).
//!
//! The main loop itself pings the watchdog, because a separate thread would continue to ping even if the loop
//! is stuck.

use std::{
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

/// The service manager that started this process.
#[derive(Debug)]
pub struct ServiceManager {
    socket: UnixDatagram,
    ping_interval: Option<Duration>,
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
        socket.connect_addr(&address(&name)?)?;
        let variable = |name| env::var(name).ok();
        let limit = watchdog_limit(
            variable("WATCHDOG_USEC").as_deref(),
            variable("WATCHDOG_PID").as_deref(),
            std::process::id(),
        );
        Ok(Some(Self { socket, ping_interval: limit.map(|limit| limit / 2) }))
    }

    /// The interval between pings of the watchdog; `None`: there is no watchdog.
    #[must_use]
    pub fn ping_interval(&self) -> Option<Duration> {
        self.ping_interval
    }

    /// Reports that the hooks are attached.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// Reports that the main loop is running.
    pub fn ping(&self) {
        self.send("WATCHDOG=1");
    }

    /// Reports that files are being reopened; [`Self::ready`] reports the end of it.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// Reports that the process is stopping.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, message: &str) {
        if let Err(error) = self.socket.send(message.as_bytes()) {
            log::warn!("cannot send {message:?} to the service manager: {error}");
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
    fn a_status_is_one_line() {
        assert_eq!(one_line("a\nREADY=1"), "a READY=1");
    }
}
