//! `selfconn run`: the daemon. One loop on one thread owns the tracer, the connections and the sinks; nothing is
//! shared, so nothing is locked.

use std::{collections::HashMap, io, path::PathBuf, process::ExitCode, rc::Rc, time::Duration};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use jiff::Timestamp;
use selfconn_ebpf::state;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};

use crate::{
    clock::{self, Offset},
    connection::{Connections, Happening},
    event::{Ended, Event, HookStatus, Losses, Lost, Moved, Refused, Started, Stopped, Subject, What},
    kernel::{
        attach::{Choice, Hook, Hooks, Method, Wanted},
        host::Host,
        tracer::{Counters, Options, Tracer},
    },
    logger,
    process::{Facts, Processes},
    sink::{Format, Stdout, file::LogFile, json_line},
};

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn run                                   watch, and tell people on this terminal
  selfconn run --log /var/log/selfconn/events.jsonl
  selfconn run --json | jq 'select(.event == \"established\") | .comm'";

/// So many records are taken before signals get a turn.
const BATCH: usize = 1024;

/// How soon after some activity the programs' counters are looked at, and a refused log is tried again.
const SOON: Duration = Duration::from_secs(1);

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
    /// Size of the ring buffer: a power of two, from 4K to 1G
    #[arg(long, value_name = "BYTES", default_value = "4M", value_parser = ring_bytes)]
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
    /// Say more on stderr; twice: let the eBPF programs speak, too
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say nothing on stdout, and only errors on stderr
    #[arg(short, long, conflicts_with_all = ["verbose", "json", "text"])]
    quiet: bool,
    /// How many dials in flight and self-connections to remember
    #[arg(long, hide = true, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    dials: u32,
    /// Work as if the kernel had no BTF
    #[arg(long, hide = true)]
    without_btf: bool,
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

    fn format(&self) -> Option<Format> {
        if self.quiet {
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

/// Runs until SIGINT or SIGTERM.
///
/// # Errors
/// When the log can't be opened, or the hooks can't be attached.
pub fn run(args: &Args) -> Result<ExitCode> {
    logger::init(args.verbose, args.quiet);
    // The log first: what can't be written must not be traced.
    let log = args.log.as_deref().map(LogFile::open).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let host = Host::look(args.without_btf)?;
        let options = Options {
            wanted: args.wanted(),
            ring_bytes: args.ring_size,
            dials: args.dials,
            log: args.verbose > 1,
        };
        let tracer = Tracer::start(&host, options)?;
        let mut daemon = Daemon {
            run: clock::boot_ns(),
            connections: Connections::new(u8::try_from(tracer.methods().live.len()).unwrap_or(u8::MAX)),
            processes: Processes::new(host.is_initial_pid_ns),
            openers: HashMap::new(),
            states: args.states,
            out: Sinks { stdout: Stdout::new(args.format()), log, made: 0, line: Vec::new() },
            counted: Counters::default(),
            lost_told: Losses::default(),
        };
        daemon.out.emit(What::Started(started(&host, tracer.methods())));
        drop(host);
        match daemon.watch(tracer).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            outcome => outcome.map(|()| ExitCode::SUCCESS).context("cannot write to stdout"),
        }
    })
}

/// All that the loop owns beside the tracer.
struct Daemon {
    /// The mark of this run in every `id`: when it began.
    run: u64,
    connections: Connections,
    processes: Processes,
    /// What was learnt of the opener of each open connection, by its number.
    openers: HashMap<u64, Rc<Facts>>,
    states: bool,
    out: Sinks,
    counted: Counters,
    lost_told: Losses,
}

impl Daemon {
    async fn watch(&mut self, mut tracer: Tracer) -> io::Result<()> {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        self.out.flush()?;
        let mut has_more = false;
        let mut look_at: Option<Instant> = None;
        loop {
            tokio::select! {
                biased;
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                () = std::future::ready(()), if has_more => {}
                readable = tracer.readable() => readable?,
                () = sleep_until(look_at.unwrap_or_else(Instant::now)), if look_at.is_some() => {
                    self.tell_losses(&tracer);
                    look_at = self.out.is_behind().then(|| Instant::now() + SOON);
                }
            }
            let taken = self.take(&mut tracer);
            has_more = taken == BATCH;
            self.out.flush()?;
            if taken > 0 && look_at.is_none() {
                look_at = Some(Instant::now() + SOON);
            }
        }
        // What happened before the signal is told; what happens from here on isn't seen.
        tracer.detach();
        while self.take(&mut tracer) > 0 {}
        self.tell_losses(&tracer);
        self.out.stop(self.losses(), self.connections.open() as u64)
    }

    /// Takes a batch of transitions; says how many.
    fn take(&mut self, tracer: &mut Tracer) -> usize {
        let Self { run, connections, states, out, processes, openers, .. } = self;
        let clock = Offset::now();
        let mut ended = Vec::new();
        tracer.drain(BATCH, |transition| {
            let at_ns = transition.at_ns;
            connections.apply(transition, |happening| {
                let (Happening::Established(connection)
                | Happening::State(connection, ..)
                | Happening::Closed(connection, _)) = happening;
                // At the first event, while the process is there; the last one tells the same.
                let facts = openers.entry(connection.number).or_insert_with(|| match connection.opener {
                    Some(opener) => processes.look_up(opener.task.pid, opener.start_ns, at_ns),
                    None => Rc::default(),
                });
                let subject = || Subject::new(connection, *run, facts);
                let what = match happening {
                    Happening::Established(_) => Some(What::Established(Box::new(subject()))),
                    Happening::State(_, from, to) => {
                        states.then(|| What::State(Box::new(Moved::new(subject(), from, to))))
                    }
                    Happening::Closed(connection, end) => {
                        let closer = connection.closer.as_ref();
                        Some(What::Closed(Box::new(Ended::new(subject(), closer, &end, clock))))
                    }
                };
                if let Some(what) = what {
                    out.emit_at(clock.wall(at_ns), what);
                }
                if matches!(happening, Happening::Closed(..) | Happening::State(_, _, state::CLOSE)) {
                    ended.push(connection.number);
                }
            });
            for number in ended.drain(..) {
                openers.remove(&number);
            }
        })
    }

    /// Looks at the programs' counters, and tells what was lost since the last time.
    fn tell_losses(&mut self, tracer: &Tracer) {
        match tracer.counters() {
            Ok(counters) => self.counted = counters,
            Err(error) => log::error!("the programs' counters can't be read: {error:#}"),
        }
        let now = self.losses();
        let told = self.lost_told;
        for (place, count) in [("ring", now.ring - told.ring), ("log", now.log - told.log)] {
            // What the log refused is told there once it takes lines again.
            if count > 0 && !(place == "log" && self.out.is_behind()) {
                self.out.emit(What::Lost(Lost { r#where: place, count }));
                if place == "ring" { self.lost_told.ring = now.ring } else { self.lost_told.log = now.log }
            }
        }
    }

    fn losses(&self) -> Losses {
        Losses { ring: self.counted.ring_full, log: self.out.log.as_ref().map_or(0, LogFile::lost) }
    }
}

/// Where events go.
struct Sinks {
    stdout: Stdout,
    log: Option<LogFile>,
    made: u64,
    line: Vec<u8>,
}

impl Sinks {
    fn emit(&mut self, what: What) {
        self.emit_at(Timestamp::now(), what);
    }

    fn emit_at(&mut self, time: Timestamp, what: What) {
        let event = Event { time, what };
        self.made += 1;
        if let Some(log) = &mut self.log {
            self.line.clear();
            json_line(&event, &mut self.line);
            log.push(&self.line);
        }
        self.stdout.push(&event);
    }

    fn flush(&mut self) -> io::Result<()> {
        // The log first: nobody who stops reading stdout keeps an event from it.
        if let Some(log) = &mut self.log {
            log.flush();
        }
        self.stdout.flush()
    }

    fn is_behind(&self) -> bool {
        self.log.as_ref().is_some_and(LogFile::is_behind)
    }

    /// The last event, whose numbers count it, too.
    fn stop(&mut self, lost: Losses, open: u64) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        let written = self.log.as_ref().map(|log| log.written() + 1);
        self.emit(What::Stopped(Stopped { made: self.made + 1, written, lost, open }));
        self.flush()
    }
}

fn started(host: &Host, methods: &Choice<()>) -> Started {
    let refused = |hook| {
        let told = |(method, why): &(Method, _)| Refused { method: method.name(), why: format!("{why}") };
        methods.refused_of(hook).map(told).collect::<Vec<_>>()
    };
    let mut hooks = Vec::new();
    for hook in Hook::ALL {
        let mut refused = refused(hook);
        for method in methods.live_of(hook) {
            let refused = std::mem::take(&mut refused);
            hooks.push(HookStatus { hook: hook.name(), method: Some(method.name()), refused });
        }
        if methods.live_of(hook).next().is_none() {
            hooks.push(HookStatus { hook: hook.name(), method: None, refused });
        }
    }
    Started {
        version: env!("CARGO_PKG_VERSION"),
        kernel: host.release.clone(),
        pid: std::process::id(),
        hooks,
        limits: host.limits(),
    }
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
