//! The traffic: processes of their own, pinned to a CPU, bounded in count and time, that say at the end what they made.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Connections that are made, accepted and closed.
    Churn,
    /// Self-connections.
    Selves,
    /// Dials that are refused.
    Refused,
}

/// How much, where and how fast.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    kind: Kind,
    /// The address dialled
    #[arg(long, default_value = "127.0.0.1")]
    to: Ipv4Addr,
    /// At most so many
    #[arg(long)]
    count: u64,
    /// At most so long
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
    /// So many a second; without it as fast as it goes
    #[arg(long)]
    rate: Option<f64>,
    /// The CPU to run on; without it any
    #[arg(long)]
    cpu: Option<usize>,
}

/// What was made.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Made {
    pub(crate) count: u64,
    pub(crate) elapsed_ns: u64,
    /// Dials that were refused, or that hit themselves, against the intention.
    pub(crate) others: u64,
}

impl Made {
    /// So many a second.
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 * 1e9 / self.elapsed_ns as f64
    }
}

/// Generates, and says on stdout what.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(cpu) = args.cpu {
        pin(cpu)?;
    }
    let made = match args.kind {
        Kind::Churn => churn(args)?,
        Kind::Selves => selves(args)?,
        Kind::Refused => refused(args)?,
    };
    println!("{}", serde_json::to_string(&made)?);
    Ok(())
}

/// Keeps the calling thread on one CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None::<Pid>, &cpus).with_context(|| format!("run on CPU {cpu}"))
}

fn socket() -> Result<Socket> {
    Ok(Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?)
}

/// Calls `make` as often and as fast as asked; `make` says whether it made what was intended.
fn paced(args: &Args, mut make: impl FnMut() -> Result<bool>) -> Result<Made> {
    let (began, limit) = (Instant::now(), Duration::from_secs_f64(args.seconds));
    let (mut count, mut others) = (0, 0);
    while count < args.count {
        // The clock is asked once for each few, so that it doesn't count.
        if (count + others) % 16 == 0 {
            let elapsed = began.elapsed();
            if elapsed > limit {
                break;
            }
            if let Some(rate) = args.rate {
                let due = Duration::from_secs_f64(count as f64 / rate);
                if let Some(early) = due.checked_sub(elapsed) {
                    std::thread::sleep(early);
                }
            }
        }
        match make()? {
            true => count += 1,
            false => others += 1,
        }
    }
    Ok(Made { count, elapsed_ns: began.elapsed().as_nanos() as u64, others })
}

/// Connections to a server in this process; reset, so that no TIME_WAIT uses the ports up.
fn churn(args: &Args) -> Result<Made> {
    let server = socket()?;
    server.bind(&SocketAddr::from((args.to, 0)).into())?;
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
fn selves(args: &Args) -> Result<Made> {
    paced(args, || self_connection(args.to).map(|_| true))
}

/// Binds a port that the kernel chooses, and connects to it; to be reset when it is closed.
pub(crate) fn self_connection(address: Ipv4Addr) -> Result<(Socket, u16)> {
    let client = socket()?;
    client.set_linger(Some(Duration::ZERO))?;
    client.bind(&SocketAddr::from((address, 0)).into())?;
    let own = client.local_addr()?;
    client.connect(&own)?;
    Ok((client, own.as_socket().context("no address")?.port()))
}

/// Dials a port where nobody listens, out of the parity that `connect()` chooses from; so it never hits itself.
fn refused(args: &Args) -> Result<Made> {
    let low: u16 = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?
        .split_ascii_whitespace()
        .next()
        .context("no port range")?
        .parse()?;
    let target = SocketAddr::V4(SocketAddrV4::new(args.to, low + 1)).into();
    let made = paced(args, || Ok(socket()?.connect(&target).is_err()))?;
    ensure!(made.others == 0, "a dial of a closed port was answered");
    Ok(made)
}
