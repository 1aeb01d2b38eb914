//! `selfconn run`: the options of the daemon, and how its parts are created and started.

use std::{io, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::{
    bpf::{
        attach::{Hook, Hooks, Method, RequestedHooks},
        bind_method::{BindMethod, RequestedBindMethod},
        features::KernelFeatures,
        loader::{Tracer, TracerOptions},
        object::ObjectOptions,
    },
    budget::{cmdline::CmdlineLimit, log::LogRate, memory::LOG_QUEUE_BYTES},
    daemon::{
        Daemon, DaemonOptions,
        self_test::{SelfTest, socket::SelfTestSocket},
        supervision::Supervision,
    },
    event::Envelope,
    metrics::server::MetricsListener,
    output::{OutputLimits, Outputs, StdoutFormat, journald, log_file::LogFile},
    system::{
        capabilities::{self, PrivilegePlan},
        cgroup::WatchedGroup,
        identity::{HostName, Identity},
        logger, memory,
        sd_notify::ServiceManager,
    },
};

mod guard;
mod remedy;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn run                                   watch, and print events on this terminal
  selfconn run --log /var/log/selfconn/events.jsonl
  selfconn run --json | jq 'select(.event == \"established\") | .comm'
  selfconn run --remedy dry-run --remedy-except 'unit=postgresql*'
                                                 show what --remedy destroy would destroy";

#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Append events as JSON lines to FILE
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Write no more than this into FILE until it is rotated, and at most three quarters of it for one user in one
    /// session, unit or container; what is beyond is lost, and counted
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = log_limit)]
    log_limit: LogLimit,
    /// Also report every state change of a self-connection
    #[arg(long)]
    states: bool,
    /// Write JSON lines to stdout (the default unless it is a terminal)
    #[arg(long, conflicts_with = "text")]
    json: bool,
    /// Write readable text to stdout (the default on a terminal)
    #[arg(long)]
    text: bool,
    /// Serve metrics for Prometheus and /healthz on this port
    #[arg(long, value_name = "ADDR:PORT", value_parser = socket_address)]
    metrics: Option<SocketAddr>,
    /// Size of the ring buffer: a power of two, from 4K to 1G
    #[arg(long, value_name = "BYTES", default_value = "8M", value_parser = ring_bytes)]
    ring_size: u32,
    /// Which hooks to attach
    #[arg(long, value_enum, default_value_t = Hooks::Auto)]
    hooks: Hooks,
    /// Attach inet_sock_set_state by this method only
    #[arg(long, value_name = "METHOD", value_parser = method_of(Hook::InetSockSetState))]
    tracepoint_method: Option<Method>,
    /// Attach tcp_set_state by this method only
    #[arg(long, value_name = "METHOD", value_parser = method_of(Hook::TcpSetState))]
    function_method: Option<Method>,
    #[command(flatten)]
    remedy: remedy::RemedyArgs,
    #[command(flatten)]
    guard: guard::GuardArgs,
    /// Maximum number of events each second, and at once (if not given: of ten seconds), of one user in one session,
    /// unit or container, four times as many of the user in all of them together; more are counted
    #[arg(long, value_name = "RATE[/BURST]", default_value_t = LogRate::DEFAULT)]
    log_rate: LogRate,
    /// How much of a command line events have: full, name (the first argument), off, or bytes as JSON
    #[arg(long, value_name = "BYTES", default_value = "1024")]
    cmdline: CmdlineLimit,
    /// Name of this host in events, instead of $NODE_NAME and the name that the kernel has
    #[arg(long, value_name = "NAME")]
    host_name: Option<HostName>,
    /// How to observe that a server cannot bind a port
    #[arg(long, value_name = "METHOD", default_value = "auto", value_parser = bind_method())]
    bind_method: RequestedBindMethod,
    /// Log more on stderr; given twice, also log messages of the eBPF programs
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Write nothing to stdout, and only errors to stderr
    #[arg(short, long, conflicts_with_all = ["verbose", "json", "text"])]
    quiet: bool,
    /// Maximum number of pending connects and self-connections to track
    #[arg(long, hide = true, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    connect_table: u32,
    /// Maximum number of destination ports tracked for refused connects
    #[arg(long, hide = true, default_value_t = 4_096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    refused_table: u32,
    /// Interval of the comparison with the kernel's socket table
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    reconcile: u64,
    /// Report only the processes of this control group
    #[arg(long, hide = true, value_name = "ID:PATH")]
    only_group: Option<WatchedGroup>,
    /// Interval of the self-test of the hooks
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    self_test: u64,
    /// Work as if the kernel had no BTF
    #[arg(long, hide = true)]
    without_btf: bool,
    /// Use the programs that take socket offsets from BTF, even if this kernel has the static offsets
    #[arg(long, hide = true)]
    btf_offsets: bool,
}

impl RunArgs {
    fn requested_hooks(&self) -> RequestedHooks {
        RequestedHooks {
            hooks: self.hooks,
            tracepoint: self.tracepoint_method,
            function: self.function_method,
        }
    }

    fn stdout_format(&self) -> Option<StdoutFormat> {
        if self.quiet {
            None
        } else if self.text {
            Some(StdoutFormat::Text)
        } else if self.json {
            Some(StdoutFormat::Json)
        } else if journald::is_journal(io::stdout()) {
            Some(StdoutFormat::Journal)
        } else if rustix::termios::isatty(io::stdout()) {
            Some(StdoutFormat::Text)
        } else {
            Some(StdoutFormat::Json)
        }
    }
}

/// Parses one of these names.
fn one_of<T: Clone + Send + Sync + 'static>(
    values: Vec<(PossibleValue, T)>,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(values.iter().map(|(name, _)| name.clone())).try_map(move |name| {
        let value = values.iter().find(|(value, _)| value.get_name() == name);
        value.map(|(_, value)| value.clone()).ok_or("not one of the possible values")
    })
}

/// Parses the name of a method that attaches to this hook.
fn method_of(hook: Hook) -> impl TypedValueParser<Value = Method> {
    one_of(hook.candidates().iter().map(|method| (method.name().into(), *method)).collect())
}

/// Parses the name of a method that detects failed binds, `auto` or `off`.
fn bind_method() -> impl TypedValueParser<Value = RequestedBindMethod> {
    let named = |method: BindMethod| {
        (PossibleValue::new(method.name()).help(method.description()), RequestedBindMethod::Only(method))
    };
    let auto = PossibleValue::new("auto").help("The methods that this kernel accepts");
    let mut values = vec![(auto, RequestedBindMethod::Auto)];
    values.extend(BindMethod::ALL.map(named));
    values.push((PossibleValue::new("off").help("Do not observe binds"), RequestedBindMethod::Off));
    one_of(values)
}

/// Maximum length of the event log. `None`: no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LogLimit(Option<u64>);

/// The shortest limit of a log: after a rotation the new file has room for all lines that wait.
const MIN_LOG_LIMIT: u64 = 2 * LOG_QUEUE_BYTES as u64;

/// Parses `none`, or a size such as `1G`.
fn log_limit(text: &str) -> Result<LogLimit, String> {
    match (text, bytes(text)) {
        ("none", _) => Ok(LogLimit(None)),
        (_, Some(limit @ MIN_LOG_LIMIT..)) => Ok(LogLimit(Some(limit))),
        _ => Err("not a size of at least 16M, or none".to_owned()),
    }
}

/// Parses a number of bytes such as `4M`.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Parses a size such as `4M`: a power of two that the kernel accepts for a ring buffer.
fn ring_bytes(text: &str) -> Result<u32, String> {
    match bytes(text).and_then(|bytes| u32::try_from(bytes).ok()) {
        Some(bytes) if bytes.is_power_of_two() && (1 << 12..=1 << 30).contains(&bytes) => Ok(bytes),
        _ => Err("not a power of two from 4K to 1G".to_owned()),
    }
}

/// Parses an address and a port, such as `[::1]:21435`.
fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "not an address and a port, such as 127.0.0.1:21435".to_owned())
}

/// Runs the daemon until SIGINT or SIGTERM.
///
/// # Errors
/// If the run cannot be numbered, the log cannot be opened or the hooks cannot be attached.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    logger::init(args.verbose, args.quiet);
    let identity = Identity::read(args.host_name.as_ref()).context("cannot number this run: getrandom")?;
    // Open the log first: without it, nothing is attached.
    let log = args.log.as_deref().map(LogFile::open).transpose()?;
    let log = log.map(|log| log.with_limit(args.log_limit.0));
    let listener = args.metrics.map(MetricsListener::bind).transpose()?;
    let manager = ServiceManager::from_env().context("cannot reach the service manager at NOTIFY_SOCKET")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        memory::set_mmap_threshold();
        let mut host = KernelFeatures::probe(args.without_btf)?;
        host.uses_static_offsets &= !args.btf_offsets;
        // Before anything is attached, so that a remedy that cannot work is an immediate error.
        let remedy = args.remedy.prepare(&mut host)?;
        let self_test_socket = match SelfTestSocket::prepare() {
            Ok(test) => Some(test),
            Err(why) => {
                host.limitations.push(format!("the hooks are not tested while the daemon runs: {why}"));
                None
            }
        };
        let guard_rules = args.guard.rules(args.only_group.as_ref().map(|group| group.id))?;
        let self_test_cookie = self_test_socket.as_ref().map(SelfTestSocket::cookie);
        let options = TracerOptions {
            hooks: args.requested_hooks(),
            bind_method: args.bind_method,
            object: ObjectOptions {
                ring_bytes: args.ring_size,
                connect_table_size: args.connect_table,
                refused_table_size: args.refused_table,
                states: args.states,
                log: args.verbose > 1,
                guard: args.guard.options(&guard_rules, self_test_cookie),
                watched_cgroup: args.only_group.as_ref().map_or(0, |group| group.id),
            },
        };
        let mut tracer = Tracer::start(&host, options)?;
        let guard = args.guard.start(tracer.take_guard(), guard_rules)?;
        // Precondition: the hooks are attached, and no other thread is started yet.
        let plan = PrivilegePlan {
            log: args.log.as_deref(),
            destroys: args.remedy.destroys(),
            has_iterator: tracer.descriptors_refusal().is_none(),
            guards: args.guard.is_on(),
        };
        let kept = capabilities::drop_after_attach(plan, || tracer.counters().is_ok())?;
        logger::write_by_thread().context("cannot start the thread that writes to stderr")?;
        let metrics_requests =
            listener.map(MetricsListener::serve).transpose().context("cannot serve metrics")?;
        let supervision = Supervision::new(manager, metrics_requests);
        let outputs = Outputs::new(
            args.stdout_format(),
            log,
            Envelope::new(&identity),
            OutputLimits { rate: args.log_rate, cmdline: args.cmdline },
        )
        .context("cannot start a thread that writes events")?;
        let live = tracer.methods().live.iter().map(|(method, ())| *method).collect();
        let options = DaemonOptions {
            states: args.states,
            snapshot_interval: Duration::from_secs(args.reconcile),
            kept_cmdline: if args.remedy.needs_cmdline() { CmdlineLimit::Full } else { args.cmdline },
            remedy,
            only_group: args.only_group.clone(),
            guard_mode: args.guard.mode(),
            guard,
            self_test: SelfTest::new(self_test_socket, Duration::from_secs(args.self_test), live),
        };
        let daemon = Daemon::new(&host, tracer, supervision, outputs, options)?;
        kept.restrict_thread().context("cannot give up capabilities")?;
        drop(host);
        memory::trim_heap();
        let outcome = daemon.run().await;
        log::logger().flush();
        match outcome.context("cannot wait for events")? {
            None => Ok(ExitCode::SUCCESS),
            Some(hooks_dead) => bail!("{hooks_dead}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_limit_holds_more_than_a_line() {
        for (text, limit) in [
            ("none", Some(None)),
            ("16M", Some(Some(16 << 20))),
            ("16777216", Some(Some(16 << 20))),
            ("3g", Some(Some(3 << 30))),
            ("16383K", None),
            ("0", None),
            ("99999999999G", None),
            ("-1G", None),
            ("", None),
        ] {
            assert_eq!(log_limit(text).ok(), limit.map(LogLimit), "{text}");
        }
    }

    #[test]
    fn a_ring_size_is_a_power_of_two_that_the_kernel_accepts() {
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
