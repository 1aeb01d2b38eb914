//! `selfconn repro`: makes one harmless self-connection on purpose and prints each step, so that the other
//! commands can be tried on a real self-connection. It never sends to another host and needs no privilege.
//!
//! This module has the sequence of steps. `bind` and `retry` are the two ways to open the connection, `hold`
//! keeps it open, `step` has the steps as data, and `narrate` and `draw` print them. `address` checks the
//! address, and `table` reads `/proc/net/tcp`.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt as _;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;
use serde::Serialize;
use socket2::Socket;

use address::AddressArg;
use address::EndpointText;
use address::LocalAddr;
use hold::HoldEnd;
use narrate::NarrationStyle;
use narrate::Narrator;
use narrate::StdoutClosed;
use step::AfterClose;
use step::BindResult;
use step::Checked;
use step::CloseKind;
use step::Echoed;
use step::ReproStep;
use step::ReproSummary;
use table::State;

mod address;
mod bind;
mod draw;
mod hold;
mod narrate;
mod retry;
mod step;
mod table;

pub(super) use draw::group_thousands;

/// Printed at the end of `--help`.
pub const EXAMPLE: &str = "\
Examples:
  selfconn repro                        the textbook client, on a free port
  selfconn repro 127.0.0.1 55555        the same on this port
  selfconn repro ::1 --hold 60          IPv6, kept open for a minute: see `ss -tn`
  selfconn repro --mode retry           the accident: retry a closed port until it succeeds

SIGINT and SIGTERM end --hold early; the remaining steps follow as usual. After the close
the port stays in TIME_WAIT for 60 s, as after any self-connection.";

/// Make one harmless self-connection and narrate it.
#[derive(Debug, Clone, clap::Args)]
pub struct ReproArgs {
    /// Address of this host; an IPv6 link-local address needs %INTERFACE
    #[arg(value_name = "ADDR", default_value = "127.0.0.1")]
    address: AddressArg,

    /// Port, used as source and destination port [default: a free port]
    #[arg(value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// How to make the self-connection
    #[arg(long, value_enum, default_value_t = ReproMode::Bind)]
    mode: ReproMode,

    /// Keep the connection open for this time
    #[arg(long, value_name = "SECONDS", value_parser = super::duration::parse_seconds)]
    hold: Option<Duration>,

    /// With --mode retry: give up after this many attempts [default: 10 times the expected number]
    #[arg(long, value_name = "N")]
    attempts: Option<NonZeroU64>,

    /// Print one JSON object for each step, and a summary
    #[arg(long)]
    json: bool,

    /// Make this many connections, one after the other
    #[arg(long, value_name = "N", hide = true, default_value = "1", conflicts_with = "port")]
    count: NonZeroU64,

    /// Connect from a thread with this name
    #[arg(long, value_name = "NAME", hide = true, value_parser = parse_thread_name)]
    thread: Option<String>,
}

/// The two ways to a self-connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReproMode {
    /// The textbook client: bind a port, connect to the same one
    Bind,
    /// The accident: connect to a closed port until the kernel chooses it as the source port
    Retry,
}

/// A connect or a reply on the loopback interface takes longer only if something drops the packets.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

const REQUEST: &str = "hello, is anybody there?";

/// Makes the connections and prints their steps to stdout. An error can contain the name of a process, which
/// the caller must escape. Do not call this within an asynchronous runtime, because `hold` starts its
/// local_addr runtime.
pub fn run(args: &ReproArgs) -> Result<ExitCode> {
    let outcome = match &args.thread {
        None => run_all(args),
        Some(name) => thread::scope(|scope| {
            let worker = thread::Builder::new().name(name.clone()).spawn_scoped(scope, || run_all(args));
            worker.context("cannot start a thread")?.join().map_err(|_| anyhow!("the thread panicked"))?
        }),
    };
    match outcome {
        Err(error) if error.is::<StdoutClosed>() => Ok(ExitCode::SUCCESS),
        outcome => outcome.map(|()| ExitCode::SUCCESS),
    }
}

fn run_all(args: &ReproArgs) -> Result<()> {
    if args.attempts.is_some() && args.mode != ReproMode::Retry {
        bail!("--attempts applies to --mode retry only: add --mode retry, or omit --attempts");
    }
    let local_addr = address::resolve_local(&args.address)?;
    let style = match (args.json, args.count.get()) {
        (true, _) => NarrationStyle::Json,
        (false, 1) => NarrationStyle::NumberedSteps,
        (false, _) => NarrationStyle::OneLine,
    };
    let mut narrator = Narrator::new(style);
    for _ in 0..args.count.get() {
        if run_once(args, local_addr, &mut narrator)? == HoldEnd::Signalled {
            break;
        }
    }
    Ok(())
}

/// An open self-connection.
struct OpenedConnection {
    socket: Socket,
    attempts: u64,
    /// How the source port was chosen, as in the `cause` of the daemon's events.
    cause: &'static str,
}

/// Makes one connection, closes it, and checks what remains of it.
fn run_once(args: &ReproArgs, local_addr: LocalAddr, narrator: &mut Narrator) -> Result<HoldEnd> {
    let opened = match args.mode {
        ReproMode::Bind => bind::open(local_addr, args.port, narrator),
        ReproMode::Retry => retry::open(local_addr, args.port, args.attempts.map(NonZeroU64::get), narrator),
    };
    let OpenedConnection { socket, attempts, cause } = opened?;
    let begin = Instant::now();
    // To read /proc/net/tcp the kernel walks all hash buckets, which takes longer than a connection. So a run
    // with many connections skips it.
    let reads_table = args.count.get() == 1;
    let endpoint = check_endpoints(&socket, reads_table, narrator)?;
    exchange_data(&socket, narrator)?;
    let (socket, hold_end) = match args.hold {
        Some(time) => hold::hold(socket, endpoint.port(), time, narrator)?,
        None => (socket, HoldEnd::TimeUp),
    };
    let how = if hold_end == HoldEnd::Destroyed { CloseKind::Destroyed } else { CloseKind::Fin };
    drop(socket);
    let duration_ns = nanoseconds(begin.elapsed());
    narrator.narrate(&ReproStep::Closed { how })?;
    let mut port_blocked_ns = None;
    if reads_table {
        let after = check_after_close(local_addr, endpoint, how)?;
        port_blocked_ns = after.port_blocked_ns;
        narrator.narrate(&ReproStep::After(after))?;
    }
    narrator.narrate(&ReproStep::Summary(ReproSummary {
        pid: std::process::id(),
        tid: rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(),
        comm: read_comm("/proc/self/comm"),
        thread_comm: read_comm("/proc/thread-self/comm"),
        netns: fs::metadata("/proc/thread-self/ns/net").ok().map(|namespace| namespace.ino()),
        mode: args.mode,
        cause,
        family: if endpoint.is_ipv4() { "ipv4" } else { "ipv6" },
        addr: endpoint.ip().to_canonical(),
        ifindex: scope_id(endpoint),
        port: endpoint.port(),
        attempts,
        bytes_sent: REQUEST.len(),
        bytes_received: REQUEST.len(),
        duration_ns,
        how,
        port_blocked_ns,
        endpoint,
    }))?;
    Ok(hold_end)
}

/// Compares the two addresses of the socket, and looks up its row in `/proc/net/tcp`.
fn check_endpoints(socket: &Socket, reads_table: bool, narrator: &mut Narrator) -> Result<SocketAddr> {
    let (local, remote) = endpoint_addrs(socket)?;
    let row = if reads_table { table::self_connection(local)? } else { None };
    let state = row.map(|row| row.state);
    narrator.narrate(&ReproStep::Checked(Checked {
        local: EndpointText(local),
        remote: EndpointText(remote),
        state,
    }))?;
    if local != remote {
        bail!("{local} is connected to {remote}, which is not a self-connection: choose another port");
    }
    Ok(local)
}

fn endpoint_addrs(socket: &Socket) -> Result<(SocketAddr, SocketAddr)> {
    let local = socket.local_addr()?;
    let remote = socket.peer_addr().map_err(|error| match error.kind() {
        io::ErrorKind::NotConnected => destroyed_error(),
        _ => error.into(),
    })?;
    local.as_socket().zip(remote.as_socket()).context("the kernel returned no addresses")
}

/// The error for a connection that another process destroyed. Nothing else ends a self-connection from
/// outside.
fn destroyed_error() -> anyhow::Error {
    anyhow!(
        "another process destroyed the connection before it could exchange data: check if `selfconn run --remedy` runs \
         here"
    )
}

/// Writes a request and reads it back, because the client is its local_addr server.
fn exchange_data(mut socket: &Socket, narrator: &mut Narrator) -> Result<()> {
    socket.set_read_timeout(Some(REPLY_TIMEOUT))?;
    let mut received = [0; REQUEST.len()];
    let outcome = socket.write_all(REQUEST.as_bytes()).and_then(|()| socket.read_exact(&mut received));
    // Converted to text, because `run` must not confuse an EPIPE here with an EPIPE of stdout.
    outcome.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            destroyed_error()
        }
        _ => anyhow!("cannot exchange data over the connection: {error}"),
    })?;
    let text = String::from_utf8_lossy(&received).into_owned();
    if text != REQUEST {
        bail!("wrote {REQUEST:?} and read {text:?}");
    }
    narrator.narrate(&ReproStep::Echoed(Echoed { bytes: text.len(), text }))
}

/// Looks up the row that remains in `/proc/net/tcp`, and tries to bind the port again as a server would. It
/// waits with a deadline, because the segments of the close can still be queued or delayed when `close()`
/// returns.
fn check_after_close(local_addr: LocalAddr, endpoint: SocketAddr, how: CloseKind) -> Result<AfterClose> {
    let deadline = Instant::now() + Duration::from_secs(1);
    let row = loop {
        let row = table::self_connection(endpoint)?;
        let is_settled =
            how == CloseKind::Destroyed || row.as_ref().is_some_and(|row| row.state == State::TIME_WAIT);
        if is_settled || Instant::now() > deadline {
            break row;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let bind = |reuse| match bind::try_bind(local_addr, endpoint.port(), reuse) {
        Ok(()) => Ok(BindResult::Free),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(BindResult::InUse),
        Err(error) => Err(error).with_context(|| format!("cannot bind {endpoint} again")),
    };
    Ok(AfterClose {
        endpoint,
        state: row.as_ref().map(|row| row.state),
        port_blocked_ns: row.filter(|row| row.state == State::TIME_WAIT).map(|row| nanoseconds(row.timer)),
        bind: bind(false)?,
        bind_reuseaddr: bind(true)?,
    })
}

fn connect_error(endpoint: SocketAddr, error: &io::Error) -> anyhow::Error {
    // EINPROGRESS is the error of a connect() that SO_SNDTIMEO ended.
    if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) {
        return anyhow!(
            "no reply from {endpoint} within {REPLY_TIMEOUT:?}: either lo is down (run: ip link set lo up), or a firewall \
             drops the packets"
        );
    }
    let hint = match error.kind() {
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            ": if lo is down, run: ip link set lo up"
        }
        io::ErrorKind::AddrNotAvailable => ": no source port is free: wait, or close connections",
        _ => "",
    };
    anyhow!("cannot connect to {endpoint}: {error}{hint}")
}

fn read_comm(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end_matches('\n').to_owned())
}

fn scope_id(endpoint: SocketAddr) -> Option<u32> {
    match endpoint {
        SocketAddr::V6(endpoint) => Some(endpoint.scope_id()).filter(|&index| index != 0),
        SocketAddr::V4(_) => None,
    }
}

fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

fn parse_thread_name(text: &str) -> Result<String, String> {
    // The kernel truncates a longer name, and then the caller would look for the wrong name.
    match text.len() {
        1..=15 if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err("a thread name must have 1 to 15 bytes".to_owned()),
    }
}
