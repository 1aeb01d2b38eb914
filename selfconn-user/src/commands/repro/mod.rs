//! `selfconn repro`: makes one harmless self-connection on purpose and prints each step, so that the other
//! commands can be tried on a real self-connection. It never sends to another host and needs no privilege.
//!
//! This module has the sequence of steps. `address` checks the address, `connect` has the two ways to open the
//! connection, `capture` and `segment` have its segments, `step` has the steps as data, and `narrate` and `draw`
//! print them.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream as StdStream},
    num::NonZeroU64,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::Access;
use selfconn_ebpf::state;
use serde::Serialize;
use socket2::Socket;
use tokio::{
    net::TcpStream,
    signal::unix::{SignalKind, signal},
};

use crate::sockets::{self, PortSocket};
use capture::Capture;
use connect::OpenedConnection;
use narrate::Narrator;
use segment::Packet;
use step::{BindResult, CloseKind, ReproStep, ReproSummary};

mod address;
mod capture;
mod connect;
mod draw;
mod narrate;
mod segment;
mod step;

/// Printed at the end of `--help`.
pub const EXAMPLE: &str = "\
Examples:
  selfconn repro                        the textbook client, on a free port
  selfconn repro 127.0.0.1 55555        the same on this port
  selfconn repro ::1 --hold 60          IPv6, kept open for a minute: see `ss -tn`
  selfconn repro --mode retry           the accident: retry a closed port until it succeeds
  selfconn repro --pcap self.pcap       keep its segments: see `tcpdump -r self.pcap`

SIGINT and SIGTERM end --hold early; the remaining steps follow as usual. After the close
the port stays in TIME_WAIT for 60 s, as after any self-connection. --mode retry connects and
resets a bound socket first, to see whether a guard or a firewall refuses it.";

/// Make one harmless self-connection and narrate it.
#[derive(Debug, Clone, clap::Args)]
pub struct ReproArgs {
    /// Address of this host; an IPv6 link-local address needs %INTERFACE
    #[arg(value_name = "ADDR", default_value = "127.0.0.1", value_parser = address::parse)]
    address: SocketAddr,

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

    /// Keep the captured segments in this file, for Wireshark or tcpdump; needs CAP_NET_RAW
    #[arg(long, value_name = "FILE", conflicts_with = "count")]
    pcap: Option<PathBuf>,

    /// Make this many connections, one after the other
    #[arg(long, value_name = "N", hide = true, conflicts_with = "port", requires = "json")]
    count: Option<NonZeroU64>,

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

const REQUEST: &str = "hello, is anybody there?";

/// Makes the connections and prints their steps to stdout. An error can contain the name of a process, which
/// the caller must escape. Do not call this within an asynchronous runtime, because `hold` starts its own.
pub fn run(args: &ReproArgs) -> Result<ExitCode> {
    let outcome = match &args.thread {
        None => run_all(args),
        Some(name) => thread::scope(|scope| {
            let worker = thread::Builder::new().name(name.clone()).spawn_scoped(scope, || run_all(args));
            worker.context("cannot start a thread")?.join().map_err(|_| anyhow!("the thread panicked"))?
        }),
    };
    outcome.map(|()| ExitCode::SUCCESS)
}

fn run_all(args: &ReproArgs) -> Result<()> {
    if args.attempts.is_some() && args.mode != ReproMode::Retry {
        bail!("--attempts applies to --mode retry only: add --mode retry, or omit --attempts");
    }
    address::check_local(args.address)?;
    let mut narrator = Narrator::new(args.json);
    for _ in 0..args.count.map_or(1, NonZeroU64::get) {
        if run_once(args, &mut narrator)? == HoldEnd::Signalled {
            break;
        }
    }
    Ok(())
}

/// Makes one connection, closes it, and checks what remains of it.
fn run_once(args: &ReproArgs, narrator: &mut Narrator) -> Result<HoldEnd> {
    let capture = match args.count {
        None => Some(Capture::open()),
        Some(_) => None,
    };
    if let (Some(path), Some(Err(error))) = (&args.pcap, &capture) {
        bail!("cannot capture the segments for {}: {}", path.display(), capture_hint(error));
    }
    let pcap = args.pcap.as_deref().map(PcapFile::prepare).transpose()?;
    let attempts = args.attempts.map(NonZeroU64::get);
    let mut capture_outcome = Ok(());
    let before_connect = |port| {
        if let Some(Ok(capture)) = &capture {
            capture_outcome = capture.begin(port);
        }
    };
    let OpenedConnection { socket, attempts, cause } = match args.mode {
        ReproMode::Bind => connect::bind(args.address, args.port, before_connect, narrator)?,
        ReproMode::Retry => connect::retry(args.address, args.port, attempts, before_connect, narrator)?,
    };
    let begin = Instant::now();
    // To read /proc/net/tcp the kernel walks all hash buckets, which takes longer than a connection. So a run
    // with many connections skips it.
    let reads_table = args.count.is_none();
    let endpoint = check_endpoints(&socket, reads_table, narrator)?;
    exchange_data(&socket, narrator)?;
    let (socket, hold_end) = match args.hold {
        Some(time) => hold(socket, endpoint.port(), time, narrator)?,
        None => (socket, HoldEnd::TimeUp),
    };
    let how = if hold_end == HoldEnd::Destroyed { CloseKind::Destroyed } else { CloseKind::Fin };
    drop(socket);
    let duration_ns = nanoseconds(begin.elapsed());
    narrator.narrate(&ReproStep::Closed { how })?;
    let port_blocked_ns = if reads_table { check_after_close(endpoint, how, narrator)? } else { None };
    let (segments, not_captured) =
        match capture.map(|capture| captured_packets(capture, capture_outcome, endpoint)) {
            Some(Ok(packets)) => {
                if let Some(pcap) = pcap {
                    pcap.write(&segment::pcap(&packets))?;
                }
                (Some(segment::segments(&packets)), None)
            }
            Some(Err(error)) if pcap.is_some() => bail!("cannot capture the segments: {error}"),
            Some(Err(error)) => (None, Some(capture_hint(&error))),
            None => (None, None),
        };
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
        ifindex: match endpoint {
            SocketAddr::V6(endpoint) => Some(endpoint.scope_id()).filter(|&index| index != 0),
            SocketAddr::V4(_) => None,
        },
        port: endpoint.port(),
        attempts,
        bytes_sent: REQUEST.len(),
        bytes_received: REQUEST.len(),
        duration_ns,
        how,
        port_blocked_ns,
        segments,
        not_captured,
    }))?;
    Ok(hold_end)
}

/// A file for the segments. It is made, or an older one is replaced, only when there are segments.
struct PcapFile<'a> {
    path: &'a Path,
    /// `None`: it does not exist yet.
    existing: Option<fs::File>,
}

impl<'a> PcapFile<'a> {
    /// Checks that the file can be written, before anything happens.
    fn prepare(path: &'a Path) -> Result<Self> {
        let opened = match fs::OpenOptions::new().write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let access = Access::WRITE_OK | Access::EXEC_OK;
                rustix::fs::access(folder.unwrap_or(Path::new(".")), access)
                    .map(|()| None)
                    .map_err(Into::into)
            }
            opened => opened.map(Some),
        };
        Ok(Self { path, existing: opened.with_context(|| cannot_write(path))? })
    }

    fn write(self, content: &[u8]) -> Result<()> {
        let Self { path, existing } = self;
        let write = || {
            let mut file = match existing {
                Some(file) => {
                    // A pipe has no length.
                    if file.metadata()?.is_file() {
                        file.set_len(0)?;
                    }
                    file
                }
                None => fs::File::create(path)?,
            };
            file.write_all(content)
        };
        write().with_context(|| cannot_write(path))
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// What has been captured of a connection.
fn captured_packets(
    opened: io::Result<Capture>,
    begun: io::Result<()>,
    endpoint: SocketAddr,
) -> io::Result<Vec<Packet>> {
    let capture = opened?;
    begun?;
    // A packet has the address without its scope, and an IPv4-mapped one as IPv4.
    let packets = capture.packets(SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()))?;
    match packets.is_empty() {
        true => Err(io::Error::other("no segment of it came by on lo")),
        false => Ok(packets),
    }
}

fn capture_hint(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("a packet socket needs CAP_NET_RAW, which root has: {error}")
        }
        _ => error.to_string(),
    }
}

/// Compares the two addresses of the socket, and looks up its row in `/proc/net/tcp`.
fn check_endpoints(socket: &Socket, reads_table: bool, narrator: &mut Narrator) -> Result<SocketAddr> {
    let (local, remote) = connect::endpoints(socket)?;
    let row = if reads_table { find_self_connection(local)? } else { None };
    let state = row.map(|row| state::name(row.state));
    narrator.narrate(&ReproStep::Checked { local, remote, state })?;
    if local != remote {
        bail!("{local} is connected to {remote}, which is not a self-connection: choose another port");
    }
    Ok(local)
}

fn find_self_connection(endpoint: SocketAddr) -> Result<Option<PortSocket>> {
    let rows = sockets::on_port(endpoint.port()).context("cannot read /proc/net/tcp")?;
    let is_it = |row: &PortSocket| row.is_self_connection && row.addr == endpoint.ip().to_canonical();
    Ok(rows.into_iter().find(is_it))
}

/// Writes a request and reads it back, because the client is its own server.
fn exchange_data(mut socket: &Socket, narrator: &mut Narrator) -> Result<()> {
    socket.set_read_timeout(Some(connect::REPLY_TIMEOUT))?;
    let mut received = [0; REQUEST.len()];
    let outcome = socket.write_all(REQUEST.as_bytes()).and_then(|()| socket.read_exact(&mut received));
    // Converted to text, because `main` must not confuse an EPIPE here with an EPIPE of stdout.
    outcome.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            connect::destroyed_error()
        }
        _ => anyhow!("cannot exchange data over the connection: {error}"),
    })?;
    if received != REQUEST.as_bytes() {
        bail!("wrote {REQUEST:?} and read {:?}", String::from_utf8_lossy(&received));
    }
    narrator.narrate(&ReproStep::Echoed { text: REQUEST, bytes: received.len() })
}

/// Why the hold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HoldEnd {
    TimeUp,
    /// SIGINT or SIGTERM arrived.
    Signalled,
    Destroyed,
}

/// Keeps the connection open until the time is up, a signal arrives, or another process destroys it. The
/// signal handlers are set up before the step is printed, so that a reader of the output can send a signal at
/// once.
fn hold(socket: Socket, port: u16, time: Duration, narrator: &mut Narrator) -> Result<(Socket, HoldEnd)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        // Moved, not cloned, because a second descriptor of the socket would be visible from outside.
        socket.set_nonblocking(true)?;
        let stream = TcpStream::from_std(StdStream::from(socket))?;
        narrator.narrate(&ReproStep::Holding { seconds: time.as_secs_f64(), port })?;
        let hold_end = tokio::select! {
            () = tokio::time::sleep(time) => HoldEnd::TimeUp,
            _ = interrupt.recv() => HoldEnd::Signalled,
            _ = terminate.recv() => HoldEnd::Signalled,
            // All data has been read and no other process can write, so the socket becomes readable only if
            // it ends.
            _ = stream.readable() => HoldEnd::Destroyed,
        };
        Ok((stream.into_std()?.into(), hold_end))
    })
}

/// Looks up the row that remains in `/proc/net/tcp`, and tries to bind the port again as a server would.
/// Returns for how long the port stays blocked. It waits with a deadline, because the segments of the close
/// can still be queued or delayed when `close()` returns.
fn check_after_close(endpoint: SocketAddr, how: CloseKind, narrator: &mut Narrator) -> Result<Option<u64>> {
    let deadline = Instant::now() + Duration::from_secs(1);
    let row = loop {
        let row = find_self_connection(endpoint)?;
        let is_settled = how == CloseKind::Destroyed || row.is_some_and(|row| row.state == state::TIME_WAIT);
        if is_settled || Instant::now() > deadline {
            break row;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let bind = |reuse| match connect::try_bind(endpoint, reuse) {
        Ok(()) => Ok(BindResult::Free),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(BindResult::InUse),
        Err(error) => Err(error).with_context(|| format!("cannot bind {endpoint} again")),
    };
    let state = row.map(|row| state::name(row.state));
    let port_blocked_ns = row.and_then(|row| row.time_wait_left).map(nanoseconds);
    let (bind, bind_reuseaddr) = (bind(false)?, bind(true)?);
    narrator.narrate(&ReproStep::After { endpoint, state, port_blocked_ns, bind, bind_reuseaddr })?;
    Ok(port_blocked_ns)
}

fn read_comm(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end_matches('\n').to_owned())
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
