//! The worker that looks up and destroys sockets for the remedy. The worker that reads the socket tables can be
//! busy for long, so this is a separate thread.

use std::io;

use crate::{
    detect::remediation::RemedyRequest,
    sockets::{self, Cookie},
    system::{capabilities, clock, worker::Worker},
};

pub(super) enum SocketRequest {
    /// Look up the cookie of a socket.
    LookUp(RemedyRequest),
    /// Destroy a socket.
    Destroy(RemedyRequest, Cookie),
}

pub(super) enum SocketResponse {
    /// Number of the connection, and the cookie. `None`: no such socket.
    LookedUp(u64, Result<Option<Cookie>, String>),
    /// Number of the connection, start time (`CLOCK_BOOTTIME`, nanoseconds), and whether the socket existed.
    Destroyed(u64, u64, Result<bool, String>),
}

pub(super) type RemedyWorker = Worker<SocketRequest, SocketResponse>;

pub(super) fn start() -> io::Result<RemedyWorker> {
    Worker::start("remedy", capabilities::REMEDY_WORKER, |request| match request {
        SocketRequest::LookUp(RemedyRequest { number, target }) => {
            SocketResponse::LookedUp(number, sockets::look_up(&target))
        }
        SocketRequest::Destroy(RemedyRequest { number, target }, cookie) => {
            let began_ns = clock::boot_ns();
            let outcome = sockets::destroy(&target, cookie);
            SocketResponse::Destroyed(number, began_ns, outcome)
        }
    })
}
