//! `selfconn repro`: makes one harmless self-connection on purpose and narrates it, so that everything else can
//! be tried against a real one. It never sends to another host and never needs a privilege.
//!
//! Here is the order of events; `bind` and `retry` are the two ways to the connection, `step` is what there is to
//! tell, `narrate` and `draw` tell it.

mod address;
mod bind;
mod draw;
mod hold;
mod narrate;
mod retry;
mod step;
mod table;

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

pub(super) use draw::grouped;

use address::{Address, Endpoint, Own};
use hold::Held;
use narrate::{Narrator, StdoutClosed, Style};
use step::{After, Bind, Checked, Echoed, How, Step, Summary};
use table::State;

/// What `--help` ends with.
pub const EXAMPLE: &str = "\
Examples:
  selfconn repro                        the textbook client, on a free port
  selfconn repro 127.0.0.1 55555        the same on this port
  selfconn repro ::1 --hold 60          IPv6, kept open for a minute: see `ss -tn`
  selfconn repro --mode retry           the accident: dial until it answers itself

SIGINT and SIGTERM end --hold early: the connection is closed as usual, the story
told to its end. The port stays in TIME_WAIT for 60 s, as after any such accident.";

/// Make one harmless self-connection and narrate it.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The address of this host to connect to itself; an IPv6 link-local one with %INTERFACE
    #[arg(value_name = "ADDR", default_value = "127.0.0.1")]
    address: Address,

    /// The port, source and destination in one [default: a free one]
    #[arg(value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// How to come by it
    #[arg(long, value_enum, default_value_t = Mode::Bind)]
    mode: Mode,

    /// Keep the connection open for so long
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    hold: Option<Duration>,

    /// With --mode retry: give up after so many dials [default: ten times the expected number]
    #[arg(long, value_name = "N")]
    attempts: Option<NonZeroU64>,

    /// Print a JSON object for each step, and a summary
    #[arg(long)]
    json: bool,

    /// Make so many connections, one after the other
    #[arg(long, value_name = "N", hide = true, default_value = "1", conflicts_with = "port")]
    count: NonZeroU64,

    /// Connect from a thread of this name
    #[arg(long, value_name = "NAME", hide = true, value_parser = thread_name)]
    thread: Option<String>,
}

/// The two ways to a self-connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// The textbook client: bind a port, connect to the same one
    Bind,
    /// The accident: dial a closed port until the kernel chooses it as the source
    Retry,
}

/// A dial or an answer on the loopback takes longer only if something drops it.
const PATIENCE: Duration = Duration::from_secs(5);

const REQUEST: &str = "hello, is anybody there?";

/// Makes the connection or connections and tells them on stdout. An error may quote the name of a process, which
/// is the caller's to escape. Not from within an asynchronous runtime: the hold has its own.
pub fn run(args: &Args) -> Result<ExitCode> {
    let done = match &args.thread {
        None => repeat(args),
        Some(name) => thread::scope(|scope| {
            let worker = thread::Builder::new().name(name.clone()).spawn_scoped(scope, || repeat(args));
            worker.context("cannot start a thread")?.join().map_err(|_| anyhow!("the thread panicked"))?
        }),
    };
    match done {
        Err(error) if error.is::<StdoutClosed>() => Ok(ExitCode::SUCCESS),
        done => done.map(|()| ExitCode::SUCCESS),
    }
}

fn repeat(args: &Args) -> Result<()> {
    if args.attempts.is_some() && args.mode != Mode::Retry {
        bail!("--attempts counts the dials of --mode retry: add that, or leave it out");
    }
    let own = address::own(&args.address)?;
    let style = match (args.json, args.count.get()) {
        (true, _) => Style::Json,
        (false, 1) => Style::Story,
        (false, _) => Style::Lines,
    };
    let mut narrator = Narrator::new(style);
    for _ in 0..args.count.get() {
        if once(args, own, &mut narrator)? == Held::Stopped {
            break;
        }
    }
    Ok(())
}

/// A connection that is open and known to be to itself.
struct Opened {
    socket: Socket,
    attempts: u64,
    /// As the daemon calls it: who chose the source port.
    cause: &'static str,
}

/// One connection from its opening to what it leaves behind.
fn once(args: &Args, own: Own, narrator: &mut Narrator) -> Result<Held> {
    let opened = match args.mode {
        Mode::Bind => bind::open(own, args.port, narrator),
        Mode::Retry => retry::open(own, args.port, args.attempts.map(NonZeroU64::get), narrator),
    };
    let Opened { socket, attempts, cause } = opened?;
    let begin = Instant::now();
    // The kernel walks all its buckets for a look at the table, which is longer than a connection takes: many
    // in a row are made as fast as they can be.
    let closely = args.count.get() == 1;
    let endpoint = look_at_ends(&socket, closely, narrator)?;
    talk(&socket, narrator)?;
    let (socket, held) = match args.hold {
        Some(time) => hold::hold(socket, endpoint.port(), time, narrator)?,
        None => (socket, Held::Enough),
    };
    let how = if held == Held::Destroyed { How::Destroyed } else { How::Fin };
    drop(socket);
    let duration_ns = nanos(begin.elapsed());
    narrator.tell(&Step::Closed { how })?;
    let mut port_blocked_ns = None;
    if closely {
        let after = look_at_remains(own, endpoint, how)?;
        port_blocked_ns = after.port_blocked_ns;
        narrator.tell(&Step::After(after))?;
    }
    narrator.tell(&Step::Summary(Summary {
        pid: std::process::id(),
        tid: rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(),
        comm: comm("/proc/self/comm"),
        thread_comm: comm("/proc/thread-self/comm"),
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
    Ok(held)
}

/// The two ends as the socket tells them, and the row of the kernel's table.
fn look_at_ends(socket: &Socket, closely: bool, narrator: &mut Narrator) -> Result<SocketAddr> {
    let (local, remote) = ends(socket)?;
    let row = if closely { table::self_connection(local)? } else { None };
    let state = row.map(|row| row.state);
    narrator.tell(&Step::Checked(Checked { local: Endpoint(local), remote: Endpoint(remote), state }))?;
    if local != remote {
        bail!("{local} is connected to {remote}, which is not itself: choose another port");
    }
    Ok(local)
}

fn ends(socket: &Socket) -> Result<(SocketAddr, SocketAddr)> {
    let local = socket.local_addr()?;
    let remote = socket.peer_addr().map_err(|error| match error.kind() {
        io::ErrorKind::NotConnected => destroyed(),
        _ => error.into(),
    })?;
    local.as_socket().zip(remote.as_socket()).context("the kernel gave no addresses")
}

/// Only a deliberate act ends such a connection from outside.
fn destroyed() -> anyhow::Error {
    anyhow!(
        "somebody destroyed the connection before it could talk: does `selfconn run --remedy` do that here?"
    )
}

/// Asks, and hears the question: the client is its own server.
fn talk(mut socket: &Socket, narrator: &mut Narrator) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut heard = [0; REQUEST.len()];
    let said = socket.write_all(REQUEST.as_bytes()).and_then(|()| socket.read_exact(&mut heard));
    // Told by its text alone: an EPIPE here is not the one of stdout.
    said.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            destroyed()
        }
        _ => anyhow!("the connection did not carry its own data: {error}"),
    })?;
    let text = String::from_utf8_lossy(&heard).into_owned();
    if text != REQUEST {
        bail!("wrote {REQUEST:?} and read {text:?}");
    }
    narrator.tell(&Step::Echoed(Echoed { bytes: text.len(), text }))
}

/// The row that stays in the table, and what a server is told that wants the port. The segments of the close
/// need not have come round when `close()` returns (they may be queued or delayed), hence the deadline.
fn look_at_remains(own: Own, endpoint: SocketAddr, how: How) -> Result<After> {
    let deadline = Instant::now() + Duration::from_secs(1);
    let row = loop {
        let row = table::self_connection(endpoint)?;
        let settled = how == How::Destroyed || row.as_ref().is_some_and(|row| row.state == State::TIME_WAIT);
        if settled || Instant::now() > deadline {
            break row;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let bind = |reuse| match bind::probe(own, endpoint.port(), reuse) {
        Ok(()) => Ok(Bind::Free),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(Bind::InUse),
        Err(error) => Err(error).with_context(|| format!("cannot bind {endpoint} again")),
    };
    Ok(After {
        endpoint,
        state: row.as_ref().map(|row| row.state),
        port_blocked_ns: row.filter(|row| row.state == State::TIME_WAIT).map(|row| nanos(row.timer)),
        bind: bind(false)?,
        bind_reuseaddr: bind(true)?,
    })
}

fn dial_error(endpoint: SocketAddr, error: &io::Error) -> anyhow::Error {
    // This is how SO_SNDTIMEO ends a connect().
    if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) {
        return anyhow!(
            "no answer from {endpoint} in {PATIENCE:?}: either lo is down (ip link set lo up), or a firewall \
             drops it"
        );
    }
    let cure = match error.kind() {
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => ": is lo up? ip link set lo up",
        io::ErrorKind::AddrNotAvailable => ": every source port is taken: wait, or close connections",
        _ => "",
    };
    anyhow!("cannot connect to {endpoint}: {error}{cure}")
}

fn comm(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end_matches('\n').to_owned())
}

fn scope_id(endpoint: SocketAddr) -> Option<u32> {
    match endpoint {
        SocketAddr::V6(endpoint) => Some(endpoint.scope_id()).filter(|&index| index != 0),
        SocketAddr::V4(_) => None,
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number of seconds, as in 60 or 0.5")?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

fn thread_name(text: &str) -> Result<String, String> {
    // The kernel cuts a longer one off; a name that comes out as another is of no use here.
    match text.len() {
        1..=15 if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err("a thread's name has 1 to 15 bytes".to_owned()),
    }
}
