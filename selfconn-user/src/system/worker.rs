//! A worker thread for work that blocks, walks /proc or changes the network namespace, so that the event loop
//! does none of that. It owns no state of the daemon: it receives requests and sends one response to each, in
//! the order of the requests.

use std::{
    future::poll_fn,
    io,
    sync::mpsc,
    task::{Context, Poll},
};

use rustix::thread::CapabilitySet;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{
    busy::{BusyClock, ThreadProblem},
    capabilities, interrupt,
};

/// The event loop's end of the channels to a worker thread.
#[derive(Debug)]
pub struct Worker<Request, Response> {
    name: &'static str,
    requests: mpsc::Sender<Request>,
    responses: UnboundedReceiver<Response>,
    /// A response that [`Self::ready`] has received.
    next: Option<Response>,
    has_ended: bool,
    busy: BusyClock,
}

impl<Request: Send + 'static, Response: Send + 'static> Worker<Request, Response> {
    /// Starts a thread with this name and only these capabilities. `handle` may block.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        name: &'static str,
        capability_set: CapabilitySet,
        handle: impl Fn(Request) -> Response + Send + 'static,
    ) -> io::Result<Self> {
        let (requests, request_receiver) = mpsc::channel();
        let (response_sender, responses) = unbounded_channel();
        let busy = BusyClock::default();
        let of_thread = busy.clone();
        capabilities::spawn_restricted(name, capability_set, move || {
            interrupt::prepare();
            // Ends when the daemon drops its end of the channels.
            while let Ok(request) = request_receiver.recv() {
                of_thread.begin();
                let response = handle(request);
                of_thread.rest();
                if response_sender.send(response).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { name, requests, responses, next: None, has_ended: false, busy })
    }

    /// Sends a request. The response is in [`Self::try_response`] later.
    pub fn send(&self, request: Request) {
        // Fails only if the thread has ended, which `poll_ready` notices.
        let _ = self.requests.send(request);
    }

    /// Waits until a response is there. After the thread has ended, which only a panic does, there is none
    /// and this waits forever. Cancel safe.
    pub async fn ready(&mut self) {
        poll_fn(|context| self.poll_ready(context)).await;
    }

    /// As [`Self::ready`], for a future that waits for several workers.
    pub fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.next.is_some() {
            return Poll::Ready(());
        }
        if self.has_ended {
            return Poll::Pending;
        }
        match self.responses.poll_recv(context) {
            Poll::Ready(Some(response)) => {
                self.next = Some(response);
                Poll::Ready(())
            }
            Poll::Ready(None) => {
                self.has_ended = true;
                log::error!("the thread {} has ended; its work is not done any more", self.name);
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// The next response, if it is there.
    pub fn try_response(&mut self) -> Option<Response> {
        self.next.take().or_else(|| self.responses.try_recv().ok())
    }

    /// True if a panic has ended the thread.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// The name of the thread, and what is wrong with it.
    #[must_use]
    pub fn problem(&self) -> Option<(&'static str, ThreadProblem)> {
        Some((self.name, self.busy.problem(self.has_ended)?))
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
            assert_eq!((worker.try_response(), worker.problem()), (None, None));
            for number in [Some(2), Some(3), None, Some(4)] {
                worker.send(number);
            }
            for expected in [4, 6] {
                worker.ready().await;
                worker.ready().await;
                assert_eq!(worker.try_response(), Some(expected), "waiting twice takes one response");
            }
            let mut attempts = 0;
            while !worker.has_ended() && attempts < 1_000 {
                assert!(timeout(Duration::from_millis(10), worker.ready()).await.is_err());
                attempts += 1;
            }
            assert_eq!(worker.problem(), Some(("double", ThreadProblem::Ended)));
        });
    }
}
