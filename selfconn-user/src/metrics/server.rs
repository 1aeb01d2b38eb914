//! The HTTP server for Prometheus (`/metrics`) and for health checks (`/healthz`). It runs on a separate
//! thread without capabilities, owns no state of the daemon, and opens no file that a request names.
//!
//! A client may be hostile, so everything is bounded: the number of connections (a new one replaces an old
//! one), their age, the size of a request, the requests of a connection (one), and the rate of requests to
//! the event loop.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use anyhow::{Result, anyhow};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;
use rustix::thread::CapabilitySet;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{mpsc, oneshot},
    task::{AbortHandle, yield_now},
    time::{Duration, Instant, sleep, timeout},
};

use super::MetricsSnapshot;
use crate::system::capabilities;

/// Maximum number of open connections. A client sends its request a moment after connect(). This many connections of
/// others must be accepted in that moment before its connection is replaced.
const MAX_CONNECTIONS: usize = 256;

/// Maximum number of open connections without a whole request, while there are others that can be replaced.
const MAX_WITHOUT_REQUEST: usize = MAX_CONNECTIONS / 2;

/// Maximum number of connections that the kernel keeps until they are accepted. `net.core.somaxconn` limits it, too.
/// The kernel drops the SYN of a client that finds no room, and the client waits for a second.
const LISTEN_BACKLOG: i32 = 4_096;

/// Number of connections that are accepted before the open ones are served again. It is small compared with
/// [`MAX_WITHOUT_REQUEST`], so that no connection is replaced before its request is looked for.
const ACCEPT_BATCH: usize = 32;

/// Delay before a connection is replaced while none can be, because their responses are being made.
const REPLACE_BACKOFF: Duration = Duration::from_millis(1);

/// Maximum age of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Delay after accept() failed.
const ACCEPT_ERROR_BACKOFF: Duration = Duration::from_millis(200);

/// Time for which a response of the event loop is reused.
const RESPONSE_TTL: Duration = Duration::from_millis(200);

/// An event loop that does not respond within this time is reported as stuck.
const LOOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum size of a request. hyper accepts no smaller limit.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// A request to the event loop: the channel to which it sends its response.
pub type MetricsRequest = oneshot::Sender<MetricsSnapshot>;

/// The bound port, before it is served.
#[derive(Debug)]
pub struct MetricsListener {
    listener: std::net::TcpListener,
    address: SocketAddr,
}

impl MetricsListener {
    /// Binds the port. No request is served yet.
    ///
    /// # Errors
    /// If the port cannot be bound.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let bind = || -> io::Result<Self> {
            let listener = std::net::TcpListener::bind(address)?;
            // std listens with a backlog of 128.
            rustix::net::listen(&listener, LISTEN_BACKLOG)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address })
        };
        bind().map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    ": give --metrics another port; ss -ltnp shows the process that uses this one"
                }
                io::ErrorKind::AddrNotAvailable => ": this host does not have that address",
                io::ErrorKind::PermissionDenied => ": a port below 1024 needs CAP_NET_BIND_SERVICE",
                _ => "",
            };
            anyhow!("cannot serve metrics on {address}: {error}{hint}")
        })
    }

    /// Starts to serve. Privileges must be dropped before, because the new thread inherits those of this
    /// thread.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn serve(self) -> io::Result<mpsc::Receiver<MetricsRequest>> {
        let (loop_requests, receiver) = mpsc::channel(1);
        let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        log::info!("metrics: http://{}/metrics", self.address);
        capabilities::spawn_restricted("metrics", CapabilitySet::empty(), move || {
            if let Err(error) = runtime.block_on(serve(self.listener, loop_requests)) {
                log::error!("metrics are no longer served: {error}");
            }
        })?;
        Ok(receiver)
    }
}

async fn serve(
    listener: std::net::TcpListener,
    loop_requests: mpsc::Sender<MetricsRequest>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let (page_requests, requests) = mpsc::channel(MAX_CONNECTIONS);
    tokio::spawn(serve_pages(requests, loop_requests));
    let mut open: VecDeque<Connection> = VecDeque::new();
    let mut accepted = 0_usize;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Either no descriptor is free, which lasts for a while, or the peer has already closed.
                log::debug!("metrics: accept: {error}");
                sleep(ACCEPT_ERROR_BACKOFF).await;
                continue;
            }
        };
        while open.len() >= MAX_CONNECTIONS {
            open.retain(|connection| !connection.task.is_finished());
            if open.len() < MAX_CONNECTIONS {
                break;
            }
            match replaceable(&open.iter().map(|connection| connection.phase.get())) {
                Some(index) => open.remove(index).into_iter().for_each(|connection| connection.task.abort()),
                None => sleep(REPLACE_BACKOFF).await,
            }
        }
        let phase = SharedPhase::default();
        let task = serve_connection(stream, page_requests.clone(), phase.clone());
        open.push_back(Connection {
            phase,
            task: tokio::spawn(timeout(CONNECTION_TIMEOUT, task)).abort_handle(),
        });
        accepted += 1;
        if accepted.is_multiple_of(ACCEPT_BATCH) {
            yield_now().await;
        }
    }
}

/// An open connection.
struct Connection {
    phase: SharedPhase,
    task: AbortHandle,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// The whole request has not arrived yet.
    NoRequest,
    /// The response is being made.
    Requested,
    /// The response is being sent.
    Responded,
}

/// The [`Phase`] of a connection, which its task sets.
#[derive(Clone, Default)]
struct SharedPhase(Arc<AtomicU8>);

impl SharedPhase {
    fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Relaxed);
    }

    fn get(&self) -> Phase {
        match self.0.load(Ordering::Relaxed) {
            0 => Phase::NoRequest,
            1 => Phase::Requested,
            _ => Phase::Responded,
        }
    }
}

/// The index of the connection that the next one replaces, in a full list that begins with the oldest. A connection
/// without a whole request comes first, because a scraper sends its request at once. It does not come first while
/// such connections are few: otherwise clients that do not read their responses would leave no time to send a request.
///
/// `None`: wait. A connection whose response is being made is never replaced; the response takes [`LOOP_TIMEOUT`] at
/// most.
fn replaceable(phases: &(impl Iterator<Item = Phase> + Clone)) -> Option<usize> {
    let without_request = phases.clone().filter(|phase| *phase == Phase::NoRequest).count();
    let replaced = if without_request > MAX_WITHOUT_REQUEST { Phase::NoRequest } else { Phase::Responded };
    phases.clone().position(|phase| phase == replaced)
}

/// Serves one request. Errors are only logged, because the peer causes them.
async fn serve_connection(stream: TcpStream, page_requests: mpsc::Sender<PageRequest>, phase: SharedPhase) {
    let respond = |request: Request<Incoming>| {
        let (page_requests, phase) = (page_requests.clone(), phase.clone());
        async move {
            phase.set(Phase::Requested);
            let response = respond(request.method(), request.uri().path(), &page_requests).await;
            phase.set(Phase::Responded);
            Ok::<_, Infallible>(response)
        }
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(MAX_REQUEST_BYTES)
        .serve_connection(TokioIo::new(stream), service_fn(respond));
    if let Err(error) = connection.await {
        log::debug!("metrics: {error}");
    }
}

/// A request for a page: the channel to which the page is sent.
type PageRequest = oneshot::Sender<Option<Page>>;

/// The rendered response of the event loop.
#[derive(Clone, Debug)]
struct Page {
    metrics: Bytes,
    health: Bytes,
    is_healthy: bool,
}

/// Serves all page requests. Asks the event loop at most once in each [`RESPONSE_TTL`].
async fn serve_pages(mut requests: mpsc::Receiver<PageRequest>, loop_requests: mpsc::Sender<MetricsRequest>) {
    let mut last: Option<(Instant, Page)> = None;
    while let Some(first) = requests.recv().await {
        if last.as_ref().is_none_or(|(at, _)| at.elapsed() >= RESPONSE_TTL) {
            let page = timeout(LOOP_TIMEOUT, request_page(&loop_requests)).await.ok().flatten();
            last = page.map(|page| (Instant::now(), page));
        }
        let page = last.as_ref().map(|(_, page)| page);
        // Fails only if the peer has closed its connection.
        let _ = first.send(page.cloned());
        while let Ok(next) = requests.try_recv() {
            let _ = next.send(page.cloned());
        }
    }
}

async fn request_page(loop_requests: &mpsc::Sender<MetricsRequest>) -> Option<Page> {
    let (request, response) = oneshot::channel();
    loop_requests.send(request).await.ok()?;
    let snapshot = response.await.ok()?;
    let health = match snapshot.health_problems.as_slice() {
        [] => "ok\n".to_owned(),
        problems => problems.join("\n") + "\n",
    };
    Some(Page {
        metrics: snapshot.text().into(),
        health: health.into(),
        is_healthy: snapshot.health_problems.is_empty(),
    })
}

async fn respond(
    method: &Method,
    path: &str,
    page_requests: &mpsc::Sender<PageRequest>,
) -> Response<Full<Bytes>> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let plain = |status, text: &'static str| response(status, PLAIN, Bytes::from_static(text.as_bytes()));
    if !matches!(path, "/" | "/metrics" | "/healthz") {
        return plain(StatusCode::NOT_FOUND, "not found: there are /metrics and /healthz\n");
    }
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    if path == "/" {
        return plain(StatusCode::OK, "selfconn: /metrics for Prometheus, /healthz for health\n");
    }
    let (request, page) = oneshot::channel();
    let page = match page_requests.send(request).await {
        Ok(()) => page.await.ok().flatten(),
        Err(_) => None,
    };
    match page {
        None => plain(StatusCode::SERVICE_UNAVAILABLE, "the daemon's event loop does not respond\n"),
        Some(page) if path == "/metrics" => response(StatusCode::OK, TEXT_FORMAT, page.metrics),
        Some(page) => {
            let status = if page.is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            response(status, PLAIN, page.health)
        }
    }
}

fn response(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, TcpStream},
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
        thread,
    };

    use super::*;

    fn health(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }

    #[test]
    fn an_event_loop_is_reported_as_stuck_until_it_responds() {
        let port = MetricsListener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = port.address;
        let mut requests = port.serve().unwrap();
        let stuck = health(address);
        assert!(stuck.starts_with("HTTP/1.0 503") && stuck.ends_with("does not respond\n"), "{stuck}");
        // The loop responds again. Nobody waits for the responses to its old requests.
        thread::spawn(move || {
            while let Some(request) = requests.blocking_recv() {
                let _ = request.send(MetricsSnapshot::default());
            }
        });
        let healthy = health(address);
        assert!(healthy.starts_with("HTTP/1.0 200") && healthy.ends_with("ok\n"), "{healthy}");
    }

    #[test]
    fn a_connection_whose_response_is_being_made_is_not_replaced() {
        use Phase::{NoRequest, Requested, Responded};
        let most = MAX_WITHOUT_REQUEST;
        // From the oldest to the newest, and which one is replaced.
        let rows = [
            (vec![(NoRequest, MAX_CONNECTIONS)], Some(0)),
            (vec![(Requested, 3), (Responded, 2), (NoRequest, most + 1)], Some(5)),
            // Clients that do not read their responses leave time to send a request.
            (vec![(Requested, 3), (NoRequest, most), (Responded, 2)], Some(most + 3)),
            (vec![(Responded, MAX_CONNECTIONS - 1), (NoRequest, 1)], Some(0)),
            (vec![(Requested, MAX_CONNECTIONS - most), (NoRequest, most)], None),
            (vec![(Requested, MAX_CONNECTIONS)], None),
        ];
        for (phases, expected) in rows {
            let all = phases.iter().flat_map(|(phase, count)| std::iter::repeat_n(*phase, *count));
            assert_eq!(replaceable(&all), expected, "{phases:?}");
        }
    }

    #[test]
    fn the_event_loop_is_asked_at_a_bounded_rate() {
        let port = MetricsListener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let (address, mut requests) = (port.address, port.serve().unwrap());
        let request_count = Arc::new(AtomicU64::new(0));
        let counts = Arc::clone(&request_count);
        thread::spawn(move || {
            while let Some(request) = requests.blocking_recv() {
                counts.fetch_add(1, Ordering::Relaxed);
                let _ = request.send(MetricsSnapshot::default());
            }
        });
        let (began, mut responses) = (Instant::now(), 0);
        while began.elapsed() < RESPONSE_TTL * 3 {
            health(address);
            responses += 1;
        }
        let (request_count, most) =
            (request_count.load(Ordering::Relaxed), began.elapsed().div_duration_f64(RESPONSE_TTL) + 1.0);
        assert!(
            request_count > 0 && request_count as f64 <= most && responses > request_count,
            "{request_count} of {responses}, {most} allowed"
        );
    }
}
