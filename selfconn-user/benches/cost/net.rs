//! A network namespace for the traffic of a measurement.

use std::{
    fs,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// A namespace with `lo` up. It exists as long as this, or a process in it.
pub(crate) struct NetNamespace {
    fd: OwnedFd,
}

impl NetNamespace {
    pub(crate) fn new() -> Result<Self> {
        let make = || -> Result<OwnedFd> {
            // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                .context("make a network namespace: run as root")?;
            raise_lo().context("raise lo")?;
            Ok(fs::File::open("/proc/thread-self/ns/net").context("open a network namespace")?.into())
        };
        // A new thread, so that this one keeps its namespace.
        let made = thread::spawn(make).join();
        made.unwrap_or_else(|_| bail!("making a network namespace panicked")).map(|fd| Self { fd })
    }

    /// Runs a closure on a thread inside.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("enter a network namespace")?;
                work()
            });
            inside.join().unwrap_or_else(|_| bail!("a thread panicked"))
        })
    }

    /// A command that runs this binary inside.
    pub(crate) fn helper(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.args(arguments);
        self.enter(&mut command);
        command
    }

    /// Makes a command start inside.
    pub(crate) fn enter(&self, command: &mut Command) {
        let fd = self.fd.as_raw_fd();
        // SAFETY: setns is async-signal-safe, and the descriptor is open between fork and exec: `self`
        // outlives the spawn in every caller, and close-on-exec comes later.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(fd, libc::CLONE_NEWNET) == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            });
        }
    }
}

/// Runs a command. Returns its stdout.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    finish(child.with_context(|| format!("start {what}"))?).with_context(|| format!("run {what}"))
}

/// Waits for a child whose stdout is a pipe. Returns its stdout.
pub(crate) fn finish(mut child: Child) -> Result<String> {
    let mut printed = String::new();
    child.stdout.take().context("no stdout")?.read_to_string(&mut printed)?;
    let status = child.wait()?;
    if status.success() { Ok(printed) } else { bail!("{status}") }
}

fn raise_lo() -> io::Result<()> {
    // SAFETY: this C struct has only integers and bytes, so all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    // SAFETY: this ioctl takes a pointer to a struct ifreq.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
