//! A worker thread for work that blocks, walks /proc or changes the network namespace, so that the event loop
//! does none of that. It owns no state of the daemon: it receives requests and sends one response to each, in
//! the order of the requests.

use std::{io, sync::mpsc};

use rustix::thread::CapabilitySet;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::system::capabilities;

/// The daemon's end of the channels to a worker thread.
pub(super) struct Worker<Request, Response> {
    name: &'static str,
    requests: mpsc::Sender<Request>,
    responses: UnboundedReceiver<Response>,
    has_ended: bool,
}

impl<Request: Send + 'static, Response: Send + 'static> Worker<Request, Response> {
    /// Starts a thread with this name and only these capabilities. `handle` may block.
    pub(super) fn start(
        name: &'static str,
        capability_set: CapabilitySet,
        handle: impl Fn(Request) -> Response + Send + 'static,
    ) -> io::Result<Self> {
        let (requests, request_receiver) = mpsc::channel();
        let (response_sender, responses) = unbounded_channel();
        capabilities::spawn_restricted(name, capability_set, move || {
            // Ends when the daemon drops its end of the channels.
            while let Ok(request) = request_receiver.recv()
                && response_sender.send(handle(request)).is_ok()
            {}
        })?;
        Ok(Self { name, requests, responses, has_ended: false })
    }

    pub(super) fn send(&self, request: Request) {
        // Fails only if the thread has ended, which `response` notices.
        let _ = self.requests.send(request);
    }

    /// Waits for the next response. After the thread has ended, which only a panic does, there is none and
    /// this waits forever. Cancel safe.
    pub(super) async fn response(&mut self) -> Response {
        if !self.has_ended {
            if let Some(response) = self.responses.recv().await {
                return response;
            }
            self.has_ended = true;
            log::error!("the thread {} has ended; its work is not done any more", self.name);
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::{panic::resume_unwind, time::Duration};

    use tokio::{runtime, time::timeout};

    use super::*;

    #[test]
    fn responses_arrive_in_order_until_the_thread_panics() {
        let runtime = runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let double = |number: Option<u32>| match number {
                Some(number) => 2 * number,
                // A panic without a message.
                None => resume_unwind(Box::new(())),
            };
            let mut worker = Worker::start("double", CapabilitySet::empty(), double).unwrap();
            for number in [Some(2), Some(3), None, Some(4)] {
                worker.send(number);
            }
            assert_eq!((worker.response().await, worker.response().await), (4, 6));
            let mut attempts = 0;
            while !worker.has_ended && attempts < 1_000 {
                assert!(timeout(Duration::from_millis(10), worker.response()).await.is_err());
                attempts += 1;
            }
            assert!(worker.has_ended);
        });
    }
}
