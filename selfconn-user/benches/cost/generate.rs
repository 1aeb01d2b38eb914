//! Traffic generators: processes that are pinned to a CPU, limited in count and time, and print what they
//! made.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TrafficKind {
    /// Connections that are made, accepted and closed.
    Churn,
    /// Self-connections.
    Selves,
    /// Connects that are refused.
    Refused,
    /// Binds that succeed.
    Bind,
    /// Connects of bound sockets to themselves, which a guard refuses.
    Prevented,
    /// Connects of bound sockets to a closed port.
    ClosedPort,
    /// A byte to a server and back, on one connection.
    RoundTrips,
    /// Blocks of 64 KiB to a server, on one connection.
    Bulk,
}

/// Options of a generator.
#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {
    kind: TrafficKind,
    /// The destination address
    #[arg(long, default_value = "127.0.0.1")]
    to: Ipv4Addr,
    /// A server at a port that connect() can't choose, as nearly every service has
    #[arg(long)]
    outside: bool,
    /// At most this number
    #[arg(long)]
    count: u64,
    /// At most this time
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
    /// The number a second; by default as many as possible
    #[arg(long)]
    rate: Option<f64>,
    /// The CPU to run on; by default any
    #[arg(long)]
    cpu: Option<usize>,
}

/// The traffic that a generator made.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct TrafficMade {
    pub(crate) count: u64,
    pub(crate) elapsed_ns: u64,
    /// Connects with another result than intended.
    pub(crate) others: u64,
}

impl TrafficMade {
    /// The number a second.
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 * 1e9 / self.elapsed_ns as f64
    }
}

/// Makes the traffic, and prints a [`TrafficMade`] on stdout.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    if let Some(cpu) = args.cpu {
        pin(cpu)?;
    }
    let made = match args.kind {
        TrafficKind::Churn => churn(args)?,
        TrafficKind::Selves => selves(args)?,
        TrafficKind::Refused => refused(args)?,
        TrafficKind::Bind => bind(args)?,
        TrafficKind::Prevented => refused_bound(args, |own| own)?,
        TrafficKind::ClosedPort => {
            let closed = SocketAddr::from((args.to, first_ephemeral_port()? - 1));
            refused_bound(args, |_| closed.into())?
        }
        TrafficKind::RoundTrips => round_trips(args)?,
        TrafficKind::Bulk => bulk(args)?,
    };
    println!("{}", serde_json::to_string(&made)?);
    Ok(())
}

/// Pins the calling thread to a CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None::<Pid>, &cpus).with_context(|| format!("run on CPU {cpu}"))
}

fn socket() -> Result<Socket> {
    Ok(Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?)
}

/// Calls `make` with the requested count and rate. `make` returns true if the result was the intended one.
fn paced(args: &GenerateArgs, mut make: impl FnMut() -> Result<bool>) -> Result<TrafficMade> {
    let (began, limit) = (Instant::now(), Duration::from_secs_f64(args.seconds));
    let (mut count, mut others) = (0, 0);
    while count < args.count {
        // The clock is read only once in 16 rounds, so that its cost does not matter.
        if (count + others) % 16 == 0 {
            let elapsed = began.elapsed();
            if elapsed > limit {
                break;
            }
            if let Some(rate) = args.rate {
                let due = Duration::from_secs_f64(count as f64 / rate);
                if let Some(early) = due.checked_sub(elapsed) {
                    thread::sleep(early);
                }
            }
        }
        match make()? {
            true => count += 1,
            false => others += 1,
        }
    }
    Ok(TrafficMade { count, elapsed_ns: began.elapsed().as_nanos() as u64, others })
}

/// Connections to a server in this process. They are reset, because TIME_WAIT entries would use up the ports.
fn churn(args: &GenerateArgs) -> Result<TrafficMade> {
    let server = socket()?;
    let port = if args.outside { first_ephemeral_port()? - 1 } else { 0 };
    server.set_reuse_address(true)?;
    server.bind(&SocketAddr::from((args.to, port)).into())?;
    server.listen(128)?;
    let address = server.local_addr()?;
    paced(args, || {
        let client = socket()?;
        client.connect(&address)?;
        let (accepted, _) = server.accept()?;
        client.set_linger(Some(Duration::ZERO))?;
        drop(client);
        drop(accepted);
        Ok(true)
    })
}

/// Self-connections, each reset at once.
fn selves(args: &GenerateArgs) -> Result<TrafficMade> {
    paced(args, || self_connection(args.to).map(|_| true))
}

/// Binds a port that the kernel chooses, and connects to it. It is reset when it is closed.
pub(crate) fn self_connection(address: Ipv4Addr) -> Result<(Socket, u16)> {
    let client = socket()?;
    client.set_linger(Some(Duration::ZERO))?;
    client.bind(&SocketAddr::from((address, 0)).into())?;
    let own = client.local_addr()?;
    client.connect(&own)?;
    Ok((client, own.as_socket().context("no address")?.port()))
}

/// Connects to a port without a listener. `connect()` chooses source ports of the other parity, so it never
/// hits itself.
fn refused(args: &GenerateArgs) -> Result<TrafficMade> {
    let target = SocketAddr::V4(SocketAddrV4::new(args.to, first_ephemeral_port()? + 1)).into();
    let made = paced(args, || Ok(socket()?.connect(&target).is_err()))?;
    ensure!(made.others == 0, "a connect to a closed port succeeded");
    Ok(made)
}

/// Sockets that are bound and closed.
fn bind(args: &GenerateArgs) -> Result<TrafficMade> {
    let address = SocketAddr::from((args.to, first_ephemeral_port()? - 1)).into();
    paced(args, || Ok(socket()?.bind(&address).is_ok()))
}

/// Connects of sockets with a port that the kernel chose, to this destination for their own address.
fn refused_bound(args: &GenerateArgs, destination: impl Fn(SockAddr) -> SockAddr) -> Result<TrafficMade> {
    let any_port = SocketAddr::from((args.to, 0)).into();
    paced(args, || {
        let client = socket()?;
        client.bind(&any_port)?;
        let refused = client.connect(&destination(client.local_addr()?));
        Ok(refused.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
    })
}

/// A connection to a server in this process: both ends.
fn connection(args: &GenerateArgs) -> Result<(TcpStream, TcpStream)> {
    let server = TcpListener::bind((args.to, 0))?;
    let client = TcpStream::connect(server.local_addr()?)?;
    let (accepted, _) = server.accept()?;
    for end in [&client, &accepted] {
        end.set_nodelay(true)?;
    }
    Ok((client, accepted))
}

fn round_trips(args: &GenerateArgs) -> Result<TrafficMade> {
    let (mut client, mut server) = connection(args)?;
    let mut byte = [1];
    paced(args, || {
        client.write_all(&byte)?;
        server.read_exact(&mut byte)?;
        server.write_all(&byte)?;
        client.read_exact(&mut byte)?;
        Ok(true)
    })
}

fn bulk(args: &GenerateArgs) -> Result<TrafficMade> {
    let (mut client, mut server) = connection(args)?;
    let reader = thread::spawn(move || io::copy(&mut server, &mut io::sink()));
    let block = vec![1; 64 << 10];
    let began = Instant::now();
    let made = paced(args, || Ok(client.write_all(&block).map(|()| true)?))?;
    drop(client);
    reader.join().map_err(|_| anyhow!("a thread panicked"))??;
    // With what was still on its way.
    Ok(TrafficMade { elapsed_ns: began.elapsed().as_nanos() as u64, ..made })
}

/// The first port of the range from which `connect()` chooses.
fn first_ephemeral_port() -> Result<u16> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    Ok(range.split_ascii_whitespace().next().context("no port range")?.parse()?)
}
