//! The worker thread for work that blocks, walks /proc or changes the network namespace, so that the event
//! loop does none of that: snapshots of the socket table, lookups of sockets, and SOCK_DESTROY. It owns no
//! state of the daemon: it receives requests and sends responses.

use std::{io, sync::mpsc, thread};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::pipeline::take_snapshot;
use crate::{
    detect::remediation::RemedyRequest,
    sockets::{self, Cookie, SocketSnapshot},
    system::{capabilities, clock},
};

/// A request to the worker.
pub(super) enum SnapshotRequest {
    /// Take a snapshot of the socket table, also in the namespaces of these threads. At most one may be in
    /// progress.
    Table(Vec<u32>),
    /// Look up the cookie of a socket.
    LookUp(RemedyRequest),
    /// Destroy a socket.
    Destroy(RemedyRequest, Cookie),
}

/// A response of the worker.
pub(super) enum SnapshotResponse {
    Table(SocketSnapshot),
    /// Number of the connection, and the cookie. `None`: no such socket.
    LookedUp(u64, Result<Option<Cookie>, String>),
    /// Number of the connection, start time (`CLOCK_BOOTTIME`, nanoseconds), and whether the socket existed.
    Destroyed(u64, u64, Result<bool, String>),
}

/// The daemon's end of the channels to the worker thread.
pub(super) struct SnapshotWorker {
    requests: mpsc::Sender<SnapshotRequest>,
    responses: UnboundedReceiver<SnapshotResponse>,
}

impl SnapshotWorker {
    pub(super) fn start() -> io::Result<Self> {
        let (requests, request_receiver) = mpsc::channel();
        let (response_sender, responses) = unbounded_channel();
        thread::Builder::new().name("reader".to_owned()).spawn(move || {
            if let Err(error) = capabilities::restrict_to(capabilities::SNAPSHOT_WORKER) {
                log::error!("the thread that reads the socket table cannot drop its privileges: {error}");
            }
            // Ends when the daemon drops its end of the channel.
            while let Ok(request) = request_receiver.recv()
                && response_sender.send(handle(request)).is_ok()
            {}
        })?;
        Ok(Self { requests, responses })
    }

    /// Sends a request. The responses arrive in the order of the requests.
    pub(super) fn send(&self, request: SnapshotRequest) {
        if self.requests.send(request).is_err() {
            log::error!("the thread that reads the socket table has ended");
        }
    }

    /// Waits for the next response.
    pub(super) async fn next_response(&mut self) -> Option<SnapshotResponse> {
        self.responses.recv().await
    }
}

fn handle(request: SnapshotRequest) -> SnapshotResponse {
    match request {
        SnapshotRequest::Table(netns_hints) => SnapshotResponse::Table(take_snapshot(&netns_hints)),
        SnapshotRequest::LookUp(RemedyRequest { number, endpoint, ifindex, netns_hints }) => {
            SnapshotResponse::LookedUp(number, sockets::look_up(&endpoint, ifindex, &netns_hints))
        }
        SnapshotRequest::Destroy(RemedyRequest { number, endpoint, ifindex, netns_hints }, cookie) => {
            let began_ns = clock::boot_ns();
            let outcome = sockets::destroy(&endpoint, ifindex, cookie, &netns_hints);
            SnapshotResponse::Destroyed(number, began_ns, outcome)
        }
    }
}
