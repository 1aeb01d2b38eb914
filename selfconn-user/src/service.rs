//! What systemd is told, when it started us with `Type=notify`: that the hooks are live, that the loop still turns,
//! that it ends. The protocol is one datagram for each message (sd_notify(3)).
//!
//! The watchdog is fed by the loop itself: a thread of its own would go on feeding it beside a loop that is stuck.

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

/// The service manager that started us.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
    feed_every: Option<Duration>,
}

impl Manager {
    /// Who says in the environment that it waits for messages, if anybody.
    ///
    /// # Errors
    /// When it can't be reached, though it says so.
    pub fn find() -> io::Result<Option<Self>> {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address(&name)?)?;
        let text = |name| env::var(name).ok();
        let limit =
            watchdog(text("WATCHDOG_USEC").as_deref(), text("WATCHDOG_PID").as_deref(), std::process::id());
        Ok(Some(Self { socket, feed_every: limit.map(|limit| limit / 2) }))
    }

    /// How often the watchdog wants to be fed; `None`: there is none.
    #[must_use]
    pub fn feed_every(&self) -> Option<Duration> {
        self.feed_every
    }

    /// The hooks are live.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// The loop turns.
    pub fn feed(&self) {
        self.tell("WATCHDOG=1");
    }

    /// Files are opened again; [`Self::ready`] ends it.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// The run ends.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, message: &str) {
        if let Err(error) = self.socket.send(message.as_bytes()) {
            log::warn!("the service manager can't be told {message:?}: {error}");
        }
    }
}

/// A path, or with `@` in front a name in the abstract namespace.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(name),
    }
}

/// The watchdog's limit, if it is meant for this process.
fn watchdog(microseconds: Option<&str>, pid: Option<&str>, own: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    microseconds?.parse().ok().filter(|limit| *limit > 0).map(Duration::from_micros)
}

/// A message has a line for each variable.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_ours_unless_it_names_another() {
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
            assert_eq!(watchdog(microseconds, pid, 7), limit, "{microseconds:?} {pid:?}");
        }
    }

    #[test]
    fn a_name_with_an_at_is_abstract() {
        let abstract_one = address(OsStr::new("@selfconn/1")).unwrap();
        assert_eq!(abstract_one.as_abstract_name(), Some(&b"selfconn/1"[..]));
        let path = address(OsStr::new("/run/systemd/notify")).unwrap();
        assert_eq!(path.as_pathname(), Some(std::path::Path::new("/run/systemd/notify")));
        assert!(address(OsStr::new(&"x".repeat(200))).is_err());
    }

    #[test]
    fn a_status_is_one_line() {
        assert_eq!(one_line("a\nREADY=1"), "a READY=1");
    }
}
