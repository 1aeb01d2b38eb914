//! The port that Prometheus scrapes, and that a load balancer asks for health. It runs on a thread of its own, without
//! any capability, owns nothing of the daemon, and opens no file that a request names.
//!
//! Whoever can reach the port may be hostile, so everything has a bound: connections (a new one takes the place of the
//! oldest), their age, the size of a request, one request each, and how often the loop is asked.

use std::{collections::VecDeque, convert::Infallible, io, net::SocketAddr, thread};

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
    task::AbortHandle,
    time::{Duration, Instant, sleep, timeout},
};

use super::Numbers;
use crate::privileges;

/// So many connections at once.
const CONNECTIONS: usize = 64;

/// How old a connection may get.
const AGE: Duration = Duration::from_secs(10);

/// While every place is taken, a new connection comes so much later: what a flood costs is bounded.
const BREATH: Duration = Duration::from_millis(1);

/// For so long an answer of the loop serves everybody.
const FRESH: Duration = Duration::from_millis(200);

/// A loop that doesn't answer for so long is told to be stuck.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest request; hyper takes no less.
const REQUEST_BYTES: usize = 8 << 10;

/// A question to the loop, and where the answer goes.
pub type Question = oneshot::Sender<Numbers>;

/// The bound port.
#[derive(Debug)]
pub struct Port {
    listener: std::net::TcpListener,
    address: SocketAddr,
}

impl Port {
    /// Binds, and serves nobody yet.
    ///
    /// # Errors
    /// When the port can't be had.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let bind = || -> io::Result<Self> {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address })
        };
        bind().map_err(|error| {
            let cure = match error.kind() {
                io::ErrorKind::AddrInUse => ": give --metrics another port; ss -ltnp shows who has this one",
                io::ErrorKind::AddrNotAvailable => ": this host does not have that address",
                io::ErrorKind::PermissionDenied => ": a port below 1024 takes CAP_NET_BIND_SERVICE",
                _ => "",
            };
            anyhow!("cannot serve metrics on {address}: {error}{cure}")
        })
    }

    /// Serves from now on. Privileges must have been given up, for the new thread begins with those of this one.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn serve(self) -> io::Result<mpsc::Receiver<Question>> {
        let (questions, asked) = mpsc::channel(1);
        let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        log::info!("metrics: http://{}/metrics", self.address);
        thread::Builder::new().name("metrics".to_owned()).spawn(move || {
            if let Err(error) = privileges::keep(CapabilitySet::empty()) {
                log::error!("the thread that serves metrics keeps too many privileges: {error}");
            }
            if let Err(error) = runtime.block_on(serve(self.listener, questions)) {
                log::error!("metrics are not served any more: {error}");
            }
        })?;
        Ok(asked)
    }
}

async fn serve(listener: std::net::TcpListener, questions: mpsc::Sender<Question>) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let (wanted, wants) = mpsc::channel(CONNECTIONS);
    tokio::spawn(answer(wants, questions));
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, which takes a while to change, or the peer is gone already.
                log::debug!("metrics: accept: {error}");
                sleep(FRESH).await;
                continue;
            }
        };
        open.retain(|task| !task.is_finished());
        if open.len() == CONNECTIONS {
            if let Some(oldest) = open.pop_front() {
                oldest.abort();
            }
            sleep(BREATH).await;
        }
        open.push_back(tokio::spawn(timeout(AGE, converse(stream, wanted.clone()))).abort_handle());
    }
}

/// One request and its answer. Whatever goes wrong is the peer's.
async fn converse(stream: TcpStream, wanted: mpsc::Sender<Want>) {
    let respond = |request: Request<Incoming>| {
        let wanted = wanted.clone();
        async move { Ok::<_, Infallible>(respond(request.method(), request.uri().path(), &wanted).await) }
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(AGE)
        .keep_alive(false)
        .max_buf_size(REQUEST_BYTES)
        .serve_connection(TokioIo::new(stream), service_fn(respond));
    if let Err(error) = connection.await {
        log::debug!("metrics: {error}");
    }
}

/// Somebody who wants a page.
type Want = oneshot::Sender<Option<Page>>;

/// What the loop answered, ready to be sent.
#[derive(Clone, Debug)]
struct Page {
    metrics: Bytes,
    health: Bytes,
    is_healthy: bool,
}

/// Asks the loop for all who want to know, and not more often than its answer gets old.
async fn answer(mut wants: mpsc::Receiver<Want>, questions: mpsc::Sender<Question>) {
    let mut last: Option<(Instant, Page)> = None;
    while let Some(first) = wants.recv().await {
        if last.as_ref().is_none_or(|(at, _)| at.elapsed() >= FRESH) {
            let page = timeout(PATIENCE, ask(&questions)).await.ok().flatten();
            last = page.map(|page| (Instant::now(), page));
        }
        let page = last.as_ref().map(|(_, page)| page);
        // Nobody is left to hear it: that is the peer's affair.
        let _ = first.send(page.cloned());
        while let Ok(next) = wants.try_recv() {
            let _ = next.send(page.cloned());
        }
    }
}

async fn ask(questions: &mpsc::Sender<Question>) -> Option<Page> {
    let (question, answer) = oneshot::channel();
    questions.send(question).await.ok()?;
    let numbers = answer.await.ok()?;
    let health = match numbers.ailments.as_slice() {
        [] => "ok\n".to_owned(),
        ailments => ailments.join("\n") + "\n",
    };
    Some(Page {
        metrics: numbers.text().into(),
        health: health.into(),
        is_healthy: numbers.ailments.is_empty(),
    })
}

async fn respond(method: &Method, path: &str, wanted: &mpsc::Sender<Want>) -> Response<Full<Bytes>> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let plain = |status, text: &'static str| response(status, PLAIN, Bytes::from_static(text.as_bytes()));
    if !matches!(path, "/" | "/metrics" | "/healthz") {
        return plain(StatusCode::NOT_FOUND, "not found: there are /metrics and /healthz\n");
    }
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    if path == "/" {
        return plain(StatusCode::OK, "selfconn: /metrics for Prometheus, /healthz for health\n");
    }
    let (want, page) = oneshot::channel();
    let page = match wanted.send(want).await {
        Ok(()) => page.await.ok().flatten(),
        Err(_) => None,
    };
    match page {
        None => plain(StatusCode::SERVICE_UNAVAILABLE, "the daemon's loop does not answer\n"),
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
    };

    use super::*;

    fn health(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn a_loop_that_does_not_answer_is_told_to_be_stuck_until_it_does() {
        let port = Port::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = port.address;
        let mut questions = port.serve().unwrap();
        let stuck = health(address);
        assert!(stuck.starts_with("HTTP/1.0 503") && stuck.ends_with("does not answer\n"), "{stuck}");
        // The loop turns again: what it was asked meanwhile is nobody's any more.
        thread::spawn(move || {
            while let Some(question) = questions.blocking_recv() {
                let _ = question.send(Numbers::default());
            }
        });
        let turns = health(address);
        assert!(turns.starts_with("HTTP/1.0 200") && turns.ends_with("ok\n"), "{turns}");
    }

    #[test]
    fn the_loop_is_asked_a_few_times_a_second_however_many_want_to_know() {
        let port = Port::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let (address, mut questions) = (port.address, port.serve().unwrap());
        let asked = Arc::new(AtomicU64::new(0));
        let counts = Arc::clone(&asked);
        thread::spawn(move || {
            while let Some(question) = questions.blocking_recv() {
                counts.fetch_add(1, Ordering::Relaxed);
                let _ = question.send(Numbers::default());
            }
        });
        let (began, mut answers) = (Instant::now(), 0);
        while began.elapsed() < FRESH * 3 {
            health(address);
            answers += 1;
        }
        let (asked, most) = (asked.load(Ordering::Relaxed), began.elapsed().div_duration_f64(FRESH) + 1.0);
        assert!(asked > 0 && asked as f64 <= most && answers > asked, "{asked} of {answers}, {most} allowed");
    }
}
