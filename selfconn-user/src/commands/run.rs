//! `selfconn run`: the options of the daemon, and how it is put together.

use std::{io, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    daemon::{Daemon, outside::Outside},
    kernel::{
        attach::{Hooks, Method, Wanted},
        host::Host,
        tracer::{
            Options, Tracer,
            binds::{BindMethod, WantedBinds},
        },
    },
    logger, memory,
    metrics::server::Port,
    privileges::{self, Plan},
    selftest::SelfTest,
    service::Manager,
    sink::{Format, Sinks, file::LogFile, journal},
};

mod remedy;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn run                                   watch, and tell people on this terminal
  selfconn run --log /var/log/selfconn/events.jsonl
  selfconn run --json | jq 'select(.event == \"established\") | .comm'
  selfconn run --remedy dry-run --remedy-except 'unit=postgresql*'
                                                 say what --remedy destroy would destroy";

/// Options of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Append events as JSON lines to FILE
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Report every state a self-connection goes through
    #[arg(long)]
    states: bool,
    /// Write JSON lines to stdout (the default unless it is a terminal)
    #[arg(long, conflicts_with = "text")]
    json: bool,
    /// Write text for people to stdout (the default on a terminal)
    #[arg(long)]
    text: bool,
    /// Serve metrics for Prometheus and /healthz on this port
    #[arg(long, value_name = "ADDR:PORT", value_parser = socket_address)]
    metrics: Option<SocketAddr>,
    /// Size of the ring buffer: a power of two, from 4K to 1G
    #[arg(long, value_name = "BYTES", default_value = "8M", value_parser = ring_bytes)]
    ring_size: u32,
    /// Which hooks to attach
    #[arg(long, value_enum, default_value_t = HooksArg::Auto)]
    hooks: HooksArg,
    /// Attach inet_sock_set_state by this method only
    #[arg(long, value_enum, value_name = "METHOD")]
    tracepoint_method: Option<TracepointMethod>,
    /// Attach tcp_set_state by this method only
    #[arg(long, value_enum, value_name = "METHOD")]
    function_method: Option<FunctionMethod>,
    #[command(flatten)]
    remedy: remedy::RemedyArgs,
    /// How to see that a server can't bind a port
    #[arg(long, value_enum, value_name = "METHOD", default_value_t = BindsArg::Auto)]
    bind_method: BindsArg,
    /// Say more on stderr; twice: let the eBPF programs speak, too
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say nothing on stdout, and only errors on stderr
    #[arg(short, long, conflicts_with_all = ["verbose", "json", "text"])]
    quiet: bool,
    /// How many dials in flight and self-connections to remember
    #[arg(long, hide = true, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    dials: u32,
    /// Of how many ports to count refused dials apart
    #[arg(long, hide = true, default_value_t = 4_096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    refusals: u32,
    /// How often to compare with the kernel's socket table
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    reconcile: u64,
    /// How often to test whether the hooks see
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    self_test: u64,
    /// Work as if the kernel had no BTF
    #[arg(long, hide = true)]
    without_btf: bool,
    /// Ask the kernel's BTF where the addresses of a socket are, even if they are where they usually are
    #[arg(long, hide = true)]
    any_layout: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HooksArg {
    /// Whatever loads here
    Auto,
    /// Both hooks, or fail
    Both,
    /// inet_sock_set_state only
    Tracepoint,
    /// tcp_set_state only
    Function,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BindsArg {
    /// Whatever loads here
    Auto,
    /// At the end of inet_csk_get_port
    Fexit,
    /// At the system call bind
    Perf,
    /// Not at all
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TracepointMethod {
    Perf,
    #[value(name = "tp_btf")]
    TpBtf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FunctionMethod {
    Fentry,
    Kprobe,
}

impl Args {
    fn wanted(&self) -> Wanted {
        Wanted {
            hooks: match self.hooks {
                HooksArg::Auto => Hooks::Auto,
                HooksArg::Both => Hooks::Both,
                HooksArg::Tracepoint => Hooks::Tracepoint,
                HooksArg::Function => Hooks::Function,
            },
            tracepoint: self.tracepoint_method.map(|method| match method {
                TracepointMethod::Perf => Method::Perf,
                TracepointMethod::TpBtf => Method::TpBtf,
            }),
            function: self.function_method.map(|method| match method {
                FunctionMethod::Fentry => Method::Fentry,
                FunctionMethod::Kprobe => Method::Kprobe,
            }),
        }
    }

    /// Whether structured entries take the place of what stdout would say.
    fn tells_journal(&self) -> bool {
        !(self.quiet || self.json || self.text) && journal::is_journal(io::stdout())
    }

    fn format(&self) -> Option<Format> {
        if self.quiet || self.tells_journal() {
            None
        } else if self.json || !(self.text || rustix::termios::isatty(io::stdout())) {
            Some(Format::Json)
        } else {
            Some(Format::Text)
        }
    }
}

/// A size such as `4M`: a power of two that the kernel takes for a ring buffer.
fn ring_bytes(text: &str) -> Result<u32, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let bytes = digits.parse::<u32>().ok().and_then(|number| number.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if bytes.is_power_of_two() && (1 << 12..=1 << 30).contains(&bytes) => Ok(bytes),
        _ => Err("not a power of two from 4K to 1G".to_owned()),
    }
}

/// An address and a port, such as `[::1]:9435`.
fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "not an address and a port, such as 127.0.0.1:9435".to_owned())
}

/// Runs until SIGINT or SIGTERM.
///
/// # Errors
/// When the log can't be opened, or the hooks can't be attached.
pub fn run(args: &Args) -> Result<ExitCode> {
    logger::init(args.verbose, args.quiet);
    // The log first: what can't be written must not be traced.
    let log = args.log.as_deref().map(LogFile::open).transpose()?;
    let port = args.metrics.map(Port::bind).transpose()?;
    let manager = Manager::find().context("cannot reach the service manager at NOTIFY_SOCKET")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        memory::keep_large_apart();
        let mut host = Host::look(args.without_btf)?;
        host.has_usual_layout &= !args.any_layout;
        // Before anything is attached: a remedy that can't work is told at once.
        let remedy = args.remedy.prepare(&mut host)?;
        let self_test = match SelfTest::prepare() {
            Ok(test) => Some(test),
            Err(why) => {
                host.lacks.push(format!("that the hooks see is not tested: {why}"));
                None
            }
        };
        let options = Options {
            wanted: args.wanted(),
            binds: match args.bind_method {
                BindsArg::Auto => WantedBinds::Auto,
                BindsArg::Fexit => WantedBinds::Only(BindMethod::Fexit),
                BindsArg::Perf => WantedBinds::Only(BindMethod::Perf),
                BindsArg::Off => WantedBinds::Off,
            },
            ring_bytes: args.ring_size,
            dials: args.dials,
            refusals: args.refusals,
            states: args.states,
            log: args.verbose > 1,
        };
        let tracer = Tracer::start(&host, options)?;
        // Attached; and no other thread may have been started yet.
        let plan = Plan { log: args.log.as_deref(), destroys: args.remedy.destroys() };
        let kept = privileges::drop_after_attach(plan, || tracer.counters().is_ok())?;
        let questions = port.map(Port::serve).transpose().context("cannot serve metrics")?;
        let outside = Outside::new(manager, questions);
        let sinks = Sinks::new(args.format(), args.tells_journal(), log)
            .context("cannot start a thread that writes events")?;
        let pace = Duration::from_secs(args.reconcile);
        let mut daemon = Daemon::new(&host, tracer, outside, sinks, args.states, pace, remedy)?;
        if let Some(test) = self_test {
            daemon.test_by(test, Duration::from_secs(args.self_test));
        }
        kept.narrow().context("cannot give up capabilities")?;
        drop(host);
        memory::give_back();
        match daemon.watch().await.context("cannot wait for events")? {
            None => Ok(ExitCode::SUCCESS),
            Some(blind) => bail!("{blind}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_size_is_a_power_of_two_that_the_kernel_takes() {
        for (text, bytes) in [
            ("4096", Some(4096)),
            ("4K", Some(4096)),
            ("4M", Some(4 << 20)),
            ("1g", Some(1 << 30)),
            ("2G", None),
            ("4G", None),
            ("3M", None),
            ("2048", None),
            ("", None),
            ("M", None),
            ("-4K", None),
        ] {
            assert_eq!(ring_bytes(text).ok(), bytes, "{text}");
        }
    }
}
