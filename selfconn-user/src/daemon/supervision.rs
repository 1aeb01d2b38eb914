//! Supervision from outside: the service manager, whose watchdog expects regular pings, and the clients that
//! scrape the metrics. The event loop serves both itself. If they get no answer, the loop is therefore stuck.

use std::time::Duration;

use tokio::{
    sync::mpsc::Receiver,
    time::{Instant, sleep},
};

use crate::{
    bpf::attach::Choice,
    metrics::server::MetricsRequest,
    system::{clock::sleep_until_some, sd_notify::ServiceManager},
};

/// Time after which a message is sent again to a service manager that did not read its socket.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The service manager and the metrics server, as far as the event loop serves them.
pub struct Supervision {
    manager: Option<ServiceManager>,
    requests: Option<Receiver<MetricsRequest>>,
    /// When the watchdog must get its next ping. `None`: the service manager has no watchdog.
    ping_at: Option<Instant>,
}

impl Supervision {
    /// `None`: there is no service manager, or no metrics server.
    #[must_use]
    pub fn new(manager: Option<ServiceManager>, requests: Option<Receiver<MetricsRequest>>) -> Self {
        Self { manager, requests, ping_at: None }
    }

    /// Reports to the service manager that the hooks are attached.
    pub(super) fn ready(&mut self, methods: &Choice<()>) {
        if let Some(manager) = &mut self.manager {
            let names: Vec<_> = methods.live.iter().map(|(method, ())| method.name()).collect();
            manager.ready(&format!("watching by {}", names.join(" and ")));
            // The next ping keeps its time: repeated reloads must not postpone it.
            self.ping_at = self.ping_at.or(manager.ping_interval().map(|interval| Instant::now() + interval));
        }
    }

    /// Reports that the log is being reopened. [`Self::ready`] ends the reload.
    pub(super) fn reloading(&mut self) {
        if let Some(manager) = &mut self.manager {
            manager.reloading();
        }
    }

    /// Reports that the daemon is stopping.
    pub(super) fn stopping(&mut self) {
        if let Some(manager) = &mut self.manager {
            manager.stopping();
        }
    }

    /// Waits for the next request for metrics, and pings the watchdog meanwhile. It is cancel safe: no
    /// request is lost if the future is dropped.
    pub(super) async fn next_metrics_request(&mut self) -> MetricsRequest {
        loop {
            let Self { requests, ping_at, manager } = self;
            let next_request = async {
                match requests {
                    Some(requests) => requests.recv().await,
                    None => std::future::pending().await,
                }
            };
            // A turn of the loop may end before the sleep below does.
            manager.iter_mut().for_each(ServiceManager::send_unsent);
            let has_unsent = manager.as_ref().is_some_and(ServiceManager::has_unsent);
            tokio::select! {
                biased;
                () = sleep(RETRY_INTERVAL), if has_unsent => {}
                () = sleep_until_some(*ping_at) => {
                    if let Some(manager) = manager {
                        manager.ping();
                        *ping_at = manager.ping_interval().map(|interval| Instant::now() + interval);
                    }
                }
                request = next_request => match request {
                    Some(request) => return request,
                    // The metrics server's thread has ended, and has logged why.
                    None => self.requests = None,
                }
            }
        }
    }
}
