//! The worker that looks up and destroys sockets for the remedy. The worker that reads the socket tables can be
//! busy for long, so this is a separate thread.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    detect::remediation::RemedyRequest,
    sockets::{self, Cookie, TargetSocket},
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

/// The permission to destroy sockets, which the loop withdraws at the end of a run: a request may still be in the
/// worker's channel then, or the worker may still search for the network namespace. It has the number of the last
/// connection of which the kernel was asked to destroy the socket.
#[derive(Clone, Debug)]
pub(super) struct DestroyPermission(Arc<AtomicU64>);

/// In place of the number of a connection.
const NONE: u64 = u64::MAX;
const WITHDRAWN: u64 = u64::MAX - 1;

impl DestroyPermission {
    pub(super) fn new() -> Self {
        Self(Arc::new(AtomicU64::new(NONE)))
    }

    /// Called just before the kernel is asked to destroy the socket of this connection. False: it must not be.
    fn use_for(&self, number: u64) -> bool {
        let used = |last| (last != WITHDRAWN).then_some(number);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, used).is_ok()
    }

    /// From here on the kernel is not asked to destroy a socket. Returns the last connection for which it was asked. It
    /// may not have answered yet. It has answered for all others, because the worker does one after another.
    pub(super) fn withdraw(&self) -> Option<u64> {
        Some(self.0.swap(WITHDRAWN, Ordering::AcqRel)).filter(|last| ![NONE, WITHDRAWN].contains(last))
    }
}

/// `destroys`: false for a dry run, whose thread has no privilege to destroy sockets.
pub(super) fn start(destroys: bool, permission: DestroyPermission) -> io::Result<RemedyWorker> {
    start_with(destroys, permission, sockets::look_up, |target, cookie, may_destroy| {
        sockets::destroy_if(target, cookie, may_destroy)
    })
}

/// As [`start`], with other functions in place of [`sockets::look_up`] and [`sockets::destroy_if`].
pub(super) fn start_with(
    destroys: bool,
    permission: DestroyPermission,
    look_up: impl Fn(&TargetSocket) -> Result<Option<Cookie>, String> + Send + 'static,
    destroy: impl Fn(&TargetSocket, Cookie, &(dyn Fn() -> bool + Sync)) -> Result<bool, String> + Send + 'static,
) -> io::Result<RemedyWorker> {
    Worker::start("remedy", capabilities::remedy_worker(destroys), move |request| match request {
        SocketRequest::LookUp(RemedyRequest { number, target }) => {
            SocketResponse::LookedUp(number, look_up(&target))
        }
        SocketRequest::Destroy(RemedyRequest { number, target }, cookie) => {
            let began_ns = clock::boot_ns();
            let outcome = destroy(&target, cookie, &|| permission.use_for(number));
            SocketResponse::Destroyed(number, began_ns, outcome)
        }
    })
}
