//! The worker thread that reads the local port range of a network namespace. The worker that reads the socket
//! table can be busy for longer than the report of a port at risk may take, so this is a separate thread. It
//! owns no state of the daemon either.

use std::{collections::HashMap, io, sync::mpsc, thread};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    ports::{LocalPorts, sysctl},
    sockets,
    system::capabilities,
};

/// The local ports of each namespace, or the reason why they are unknown.
pub(super) type PortRangeResponse = HashMap<u32, Result<LocalPorts, String>>;

/// Network namespaces, each with a process that may be in it.
type PortRangeRequest = HashMap<u32, u32>;

/// The daemon's end of the channels to the worker thread.
pub(super) struct PortRangeWorker {
    requests: mpsc::Sender<PortRangeRequest>,
    responses: UnboundedReceiver<PortRangeResponse>,
}

impl PortRangeWorker {
    pub(super) fn start() -> io::Result<Self> {
        let (requests, request_receiver) = mpsc::channel::<PortRangeRequest>();
        let (response_sender, responses) = unbounded_channel();
        thread::Builder::new().name("ranges".to_owned()).spawn(move || {
            if let Err(error) = capabilities::restrict_to(capabilities::PORT_RANGE_WORKER) {
                log::error!("the thread that reads port ranges cannot drop its privileges: {error}");
            }
            // Ends when the daemon drops its end of the channel.
            while let Ok(request) = request_receiver.recv() {
                if response_sender.send(request.into_iter().map(read).collect()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { requests, responses })
    }

    pub(super) fn send(&self, request: PortRangeRequest) {
        if self.requests.send(request).is_err() {
            log::error!("the thread that reads port ranges has ended");
        }
    }

    pub(super) async fn next_response(&mut self) -> Option<PortRangeResponse> {
        self.responses.recv().await
    }
}

fn read((netns, hint): (u32, u32)) -> (u32, Result<LocalPorts, String>) {
    let ports = || sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")));
    (netns, sockets::run_in_namespace(netns, &[hint], ports).map_err(|error| error.to_string()))
}
