//! The cookie of a network namespace: its identity until the next boot.

use std::os::fd::AsRawFd as _;

use socket2::{Domain, Socket, Type};

/// The cookie of the network namespace that the calling thread is in (`SO_NETNS_COOKIE`, v5.14). `None`: this kernel
/// does not have the option.
#[must_use]
pub fn current() -> Option<u64> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None).ok()?;
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the option writes at most `length` bytes to the number, and a length to `length`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (outcome == 0 && cookie != 0).then_some(cookie)
}
