//! The measurements, a function for each group of rows. Measurements that are compared alternate, and differ
//! in nothing else.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
};
use serde_json::Value;

use crate::{
    generate::{TrafficMade, pin, self_connection},
    guard,
    log::{self, LogCounts},
    net::{NetNamespace, finish, output},
    proc,
    programs::{self, ProgramStats},
    report::{INSIDE, OUTSIDE, Samples},
    socket_crowd::SocketHelpers,
    tracer::{Peer, TracerProcess},
};

type Group = fn(&mut Measurement) -> Result<()>;

/// The groups of rows, in the order in which they are measured.
pub(crate) const GROUPS: [(&str, Group); 9] = [
    ("idle", Measurement::idle),
    ("transition", Measurement::transition),
    ("bind", Measurement::bind),
    ("churn", Measurement::churn),
    ("latency", Measurement::latency),
    ("scan", Measurement::scan),
    ("flood", Measurement::flood),
    ("exec", Measurement::exec),
    ("guard", guard::measure),
];

/// The daemon to measure, and the samples so far.
pub(crate) struct Measurement {
    daemon: PathBuf,
    quick: bool,
    /// A directory for logs.
    scratch: PathBuf,
    pub(crate) samples: Samples,
}

impl Measurement {
    pub(crate) fn new(daemon: &Path, quick: bool, scratch: &Path) -> Self {
        let (daemon, scratch) = (daemon.to_owned(), scratch.to_owned());
        Self { daemon, quick, scratch, samples: Samples::default() }
    }

    /// Measures these groups, or all.
    pub(crate) fn run(&mut self, only: &[String]) -> Result<()> {
        for (name, group) in GROUPS {
            if only.is_empty() || only.iter().any(|only| only == name) {
                eprintln!("cost: measuring {name}");
                group(self).with_context(|| format!("measure {name}"))?;
            }
        }
        Ok(())
    }

    pub(crate) fn rounds(&self, full: usize) -> usize {
        if self.quick { full.div_ceil(5) } else { full }
    }

    pub(crate) fn sample(&mut self, name: &str, value: f64) {
        self.samples.add(name, value);
    }

    pub(crate) fn start(&self, options: &[&str]) -> Result<TracerProcess> {
        TracerProcess::daemon(&self.daemon, options)
    }

    /// The methods that the daemon chooses on this kernel.
    fn methods(&self) -> Result<Vec<String>> {
        let started = self.started()?;
        let hooks = started["hooks"].as_array().context("no hooks in `started`")?;
        Ok(hooks.iter().filter_map(|hook| hook["method"].as_str()).map(str::to_owned).collect())
    }

    /// The first event of the daemon.
    fn started(&self) -> Result<Value> {
        let tracer = self.start(&[])?;
        let started = serde_json::from_str(&tracer.first)?;
        tracer.stop()?;
        Ok(started)
    }

    /// Run time of the programs, measured by the kernel: compared with empty ones, and for self-addressed
    /// connects.
    fn transition(&mut self) -> Result<()> {
        let net = NetNamespace::new()?;
        let methods = self.methods()?;
        self.samples.facts.insert("methods".to_owned(), methods.join(" and "));
        let _stats = enable_stats(Stats::RunTime).context("let the kernel measure BPF programs")?;
        for round in 0..self.rounds(25) {
            self.compare_with_empty(round, &net, &methods)?;
            self.self_addressed(&net, &methods)?;
        }
        Ok(())
    }

    /// Both run on the same transitions, so that whatever slows the host slows both. Each is attached first
    /// once.
    fn compare_with_empty(&mut self, round: usize, net: &NetNamespace, methods: &[String]) -> Result<()> {
        let mut each = BTreeMap::<_, Vec<f64>>::new();
        for first in [true, false] {
            let start = |ours: bool| if ours { self.start(&[]) } else { TracerProcess::empty(methods) };
            let tracers = [(first, start(first)?), (!first, start(!first)?)];
            let before = tracers.iter().map(|(_, tracer)| programs::of_process(tracer.pid()));
            let before = before.collect::<Result<Vec<_>>>()?;
            make(net, &PLAIN)?;
            for ((ours, tracer), before) in tracers.into_iter().zip(before) {
                for stats in programs::since(&before, programs::of_process(tracer.pid())?) {
                    let Some(method) = method_of(&stats.name, methods) else { continue };
                    each.entry((ours, method)).or_default().push(stats.ns as f64 / stats.runs as f64);
                    if round == 0 && ours && first {
                        let insns = stats.verified_insns.map_or("?".to_owned(), |count| count.to_string());
                        let text =
                            format!("{insns} insns verified, {} bytes of machine code", stats.jited_bytes);
                        self.samples.facts.insert(format!("program.{method}"), text);
                    }
                }
                tracer.stop()?;
            }
        }
        for ((ours, method), both) in each {
            let whose = if ours { "ours" } else { "empty" };
            self.sample(
                &format!("transition.{whose}.{method}"),
                both.iter().sum::<f64>() / both.len() as f64,
            );
        }
        Ok(())
    }

    /// The additional run time of our programs for connects of an address to itself, over connections of two
    /// addresses.
    fn self_addressed(&mut self, net: &NetNamespace, methods: &[String]) -> Result<()> {
        let tracer = self.start(&[])?;
        let cost = |arguments: &[&str]| -> Result<(TrafficMade, Vec<ProgramStats>)> {
            let before = programs::of_process(tracer.pid())?;
            let made = make(net, arguments)?;
            Ok((made, programs::since(&before, programs::of_process(tracer.pid())?)))
        };
        let options = ["--to", "127.0.0.1", "--count", COUNT, "--cpu", "1"];
        for (what, kind) in [
            ("outside", &["churn", "--outside"][..]),
            ("connect", &["churn"]),
            ("refused", &["refused"]),
            ("self", &["selves"]),
        ] {
            let (_, plain) = cost(&PLAIN)?;
            let (made, stats) = cost(&[kind, &options].concat())?;
            let beyond = stats.iter().filter_map(|stats| {
                method_of(&stats.name, methods)?;
                let plain = plain.iter().find(|plain| plain.name == stats.name)?;
                Some(stats.ns as f64 - stats.runs as f64 * plain.ns as f64 / plain.runs as f64)
            });
            self.sample(&format!("self_addressed.{what}"), beyond.sum::<f64>() / made.count as f64);
        }
        tracer.stop()
    }

    /// Run time of the programs of bind(), measured by the kernel, and of empty ones. Both run on the same binds, and
    /// each is attached first in turns.
    fn bind(&mut self) -> Result<()> {
        let net = NetNamespace::new()?;
        let started = self.started()?;
        let Some(method) = started["binds"]["method"].as_str() else {
            self.samples.skipped.insert("bind.bind()".to_owned(), "no method can be attached".to_owned());
            return Ok(());
        };
        self.samples.facts.insert("bind.method".to_owned(), method.to_owned());
        let empty = [bind_method(method)];
        let _stats = enable_stats(Stats::RunTime).context("let the kernel measure BPF programs")?;
        for round in 0..self.rounds(40) {
            let ours_first = round % 2 == 0;
            let start = |ours: bool| if ours { self.start(&[]) } else { TracerProcess::empty(&empty) };
            let tracers = [(ours_first, start(ours_first)?), (!ours_first, start(!ours_first)?)];
            let before = tracers.iter().map(|(_, tracer)| programs::of_process(tracer.pid()));
            let before = before.collect::<Result<Vec<_>>>()?;
            let made = make(&net, &["bind", "--count", COUNT, "--cpu", "1"])?;
            for ((ours, tracer), before) in tracers.into_iter().zip(before) {
                let stats = programs::since(&before, programs::of_process(tracer.pid())?);
                // The kernel cuts the name after 15 bytes.
                let ns = stats.iter().filter(|stats| stats.name.contains("_bind_")).map(|stats| stats.ns);
                let name = if ours { "bind.ours" } else { "bind.empty" };
                self.sample(name, ns.sum::<u64>() as f64 / made.count as f64);
                tracer.stop()?;
            }
        }
        Ok(())
    }

    /// Connections a second, untraced and with each tool, to each destination.
    fn churn(&mut self) -> Result<()> {
        ChurnDestination::ALL.into_iter().try_for_each(|destination| self.churn_to(destination))
    }

    /// The kernel does not measure programs meanwhile.
    fn churn_to(&mut self, destination: ChurnDestination) -> Result<()> {
        let net = NetNamespace::new()?;
        let methods = self.methods()?;
        let name = |what: &str| format!("{}.{what}", destination.group());
        let churn = |count: u64| -> Result<f64> {
            let options = ["--count", &count.to_string(), "--cpu", "1"];
            Ok(make(&net, &[&["churn"], destination.options(), &options].concat())?.rate())
        };
        // Other work on the host can only make it slower, so the best of five is taken.
        let best =
            || (0..5).map(|_| churn(2_000)).try_fold(0.0, |best, rate| rate.map(|rate| rate.max(best)));
        churn(2_000)?;
        let probe = || churn(20).map(drop);
        // These two are close to each other, so they alternate: a drift affects both.
        for round in 0..self.rounds(40) {
            let order = if round % 2 == 0 { [true, false] } else { [false, true] };
            for ours in order {
                let tracer = if ours { self.start(&[])? } else { TracerProcess::empty(&methods)? };
                self.sample(&name(if ours { "close.ours" } else { "close.empty" }), best()?);
                tracer.stop()?;
            }
        }
        let mut peers = Vec::new();
        for peer in Peer::ALL {
            match TracerProcess::peer(peer, probe).and_then(TracerProcess::stop) {
                Ok(()) => peers.push(peer),
                Err(why) => {
                    self.samples.skipped.insert(name(peer.name()), format!("{why:#}"));
                }
            }
        }
        for _ in 0..self.rounds(10) {
            self.sample(&name("none"), churn(5_000)?);
            let tracer = TracerProcess::empty(&methods)?;
            self.sample(&name("empty"), churn(5_000)?);
            tracer.stop()?;
            let tracer = self.start(&[])?;
            self.sample(&name("ours"), churn(5_000)?);
            tracer.stop()?;
            for peer in &peers {
                let tracer = TracerProcess::peer(*peer, probe)?;
                self.sample(&name(peer.name()), churn(5_000)?);
                tracer.stop()?;
            }
        }
        Ok(())
    }

    /// From before `connect()` until the line is in the log.
    fn latency(&mut self) -> Result<()> {
        let net = NetNamespace::new()?;
        let log = self.scratch.join("latency.jsonl");
        let tracer = self.start(&["--log", text(&log)?])?;
        let count = if self.quick { 300 } else { 2_000 };
        const EVENT_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
        let latencies = net.inside(|| {
            pin(1)?;
            let mut latencies = Vec::new();
            let mut file = fs::File::open(&log)?;
            file.seek(SeekFrom::End(0))?;
            // Polling the file would take the daemon's CPU, so inotify waits, as in `tail -f`.
            let written = inotify::init(inotify::CreateFlags::CLOEXEC)?;
            inotify::add_watch(&written, &log, inotify::WatchFlags::MODIFY)?;
            let mut notices = [0; 4 << 10];
            let mut seen = Vec::new();
            for _ in 0..count {
                // The daemon finishes its work on the last connection.
                thread::sleep(Duration::from_millis(5));
                seen.clear();
                let began = Instant::now();
                let (socket, port) = self_connection([127, 0, 0, 1].into())?;
                let wanted = format!("\"port\":{port},");
                loop {
                    file.read_to_end(&mut seen)?;
                    let lines = String::from_utf8_lossy(&seen);
                    if lines.lines().any(|line| line.contains("\"established\"") && line.contains(&wanted)) {
                        break;
                    }
                    let mut waits = [PollFd::new(&written, PollFlags::IN)];
                    ensure!(poll(&mut waits, Some(&EVENT_TIMEOUT))? > 0, "an event does not come");
                    rustix::io::read(&written, &mut notices)?;
                }
                latencies.push(began.elapsed().as_secs_f64() * 1e6);
                drop(socket);
            }
            Ok(latencies)
        })?;
        latencies.into_iter().for_each(|latency| self.sample("latency", latency));
        tracer.stop()?;
        Ok(fs::remove_file(&log)?)
    }

    /// Costs while nothing happens.
    fn idle(&mut self) -> Result<()> {
        self.sample("binary", fs::metadata(&self.daemon)?.len() as f64);
        for _ in 0..self.rounds(20) {
            let began = Instant::now();
            let tracer = self.start(&[])?;
            self.sample("start", began.elapsed().as_secs_f64() * 1e3);
            tracer.stop()?;
        }
        let tracer = self.start(&[])?;
        // The daemon reads the socket table at its start, and then once a minute.
        thread::sleep(Duration::from_secs(3));
        let seconds = if self.quick { 6 } else { 50 };
        let before = (proc::sleeps(tracer.pid())?, proc::on_cpu(tracer.pid())?);
        thread::sleep(Duration::from_secs(seconds));
        let after = (proc::sleeps(tracer.pid())?, proc::on_cpu(tracer.pid())?);
        let minutes = seconds as f64 / 60.0;
        self.sample("idle.wakeups", (after.0 - before.0) as f64 / minutes);
        self.sample("idle.cpu_us", (after.1 - before.1).as_secs_f64() * 1e6 / minutes);
        let memory = proc::memory(tracer.pid())?;
        self.sample("idle.rss", memory.own as f64);
        self.sample("idle.rss_with_ring", memory.all as f64);
        tracer.stop()
    }

    /// The duration of a scan, compared with `ss`, and how it grows with the number of sockets.
    fn scan(&mut self) -> Result<()> {
        let time = |command: &mut Command| -> Result<f64> {
            let began = Instant::now();
            let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
            // 1: it found a self-connection of another program.
            ensure!(matches!(status.code(), Some(0 | 1)), "{status}");
            Ok(began.elapsed().as_secs_f64() * 1e3)
        };
        let daemon = self.daemon.clone();
        let scan = || time(Command::new(&daemon).arg("scan"));
        let net = NetNamespace::new()?;
        for sockets in [1_000, 10_000, 100_000] {
            let crowd = SocketHelpers::new(&net, sockets)?;
            for _ in 0..self.rounds(10) {
                self.sample(&format!("scan.sockets.{sockets}"), scan()?);
                let mut ss = Command::new("ss");
                net.enter(ss.arg("-tanH"));
                self.sample(&format!("scan.ss.{sockets}"), time(&mut ss)?);
            }
            self.snapshots(&format!("snapshot.sockets.{sockets}"))?;
            drop(crowd);
        }
        drop(net);
        let mut nets = Vec::new();
        for namespaces in [1, 10, 100] {
            while nets.len() < namespaces {
                let net = NetNamespace::new()?;
                let crowd = SocketHelpers::new(&net, 20)?;
                nets.push((crowd, net));
            }
            for _ in 0..self.rounds(20) {
                self.sample(&format!("scan.namespaces.{namespaces}"), scan()?);
            }
            self.snapshots(&format!("snapshot.namespaces.{namespaces}"))?;
        }
        Ok(())
    }

    /// What a command pays for `selfconn exec`: once, and for each of its connections.
    fn exec(&mut self) -> Result<()> {
        let net = NetNamespace::new()?;
        let this = std::env::current_exe()?;
        let watched = |command: &[&std::ffi::OsStr]| {
            let mut exec = Command::new(&self.daemon);
            net.enter(exec.args(["exec", "--"]).args(command).stderr(Stdio::null()));
            exec
        };
        let generator =
            [&["generate", "churn"], ChurnDestination::OwnAddressInside.options(), &PLAIN[3..]].concat();
        let command: Vec<_> =
            [this.as_os_str()].into_iter().chain(generator.iter().map(std::ffi::OsStr::new)).collect();
        let mut samples = Vec::new();
        for _ in 0..self.rounds(25) {
            let began = Instant::now();
            output(watched(&["true".as_ref()]))?;
            samples.push(("exec.true", began.elapsed().as_secs_f64() * 1e3));
            for (name, command) in
                [("exec.with", watched(&command)), ("exec.without", net.helper(&generator))]
            {
                let made: TrafficMade = serde_json::from_str(&output(command)?)?;
                samples.push((name, made.rate()));
            }
        }
        samples.into_iter().for_each(|(name, value)| self.sample(name, value));
        Ok(())
    }

    /// CPU time of a snapshot of the socket table by the daemon.
    fn snapshots(&mut self, name: &str) -> Result<()> {
        let tracer = self.start(&["--reconcile", "1", "-vv"])?;
        for _ in 0..self.rounds(5) {
            let time = tracer.cpu_time_of_snapshots(1)?;
            self.sample(name, time.as_secs_f64() * 1e3);
        }
        tracer.stop()
    }

    /// Self-connections and refused connects at a high rate.
    fn flood(&mut self) -> Result<()> {
        let seconds = if self.quick { 4 } else { 60 };
        self.flooded("one", &[&["selves", "--rate", "45000", "--cpu", "1"]], seconds)?;
        let seconds = if self.quick { 3 } else { 15 };
        self.flooded(
            "two",
            &[&["selves", "--cpu", "0"], &["selves", "--cpu", "1", "--to", "127.0.0.3"]],
            seconds,
        )?;
        self.flooded("refused", &[&["refused", "--rate", "60000", "--cpu", "1"]], seconds)
    }

    fn flooded(&mut self, name: &str, generators: &[&[&str]], seconds: u64) -> Result<()> {
        let net = NetNamespace::new()?;
        let file = self.scratch.join("flood.jsonl");
        let metrics = log::free_address()?;
        // In a minute it grows beyond the usual limit.
        let limits = ["--log-limit", "none"];
        let address = metrics.to_string();
        let options = [&["--log", text(&file)?, "--metrics", &address], &limits[..]].concat();
        let tracer = self.start(&options)?;
        let (began, cpu) = (Instant::now(), proc::on_cpu(tracer.pid())?);
        let mut children = Vec::new();
        for generator in generators {
            let duration = seconds.to_string();
            let arguments =
                [&["generate"], *generator, &["--count", "100000000", "--seconds", &duration]].concat();
            let mut command = net.helper(&arguments);
            children.push(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        }
        let pids: Vec<u32> = children.iter().map(std::process::Child::id).collect();
        thread::sleep(Duration::from_secs(seconds).mul_f64(0.3));
        let early = proc::memory(tracer.pid())?;
        thread::sleep(Duration::from_secs(seconds).mul_f64(0.6));
        let late = proc::memory(tracer.pid())?;
        let mut made = 0;
        for child in children {
            let made_by_one: TrafficMade = serde_json::from_str(&finish(child)?)?;
            self.sample(&format!("flood.{name}.rate"), made_by_one.rate());
            made += made_by_one.count;
        }
        let cores = (proc::on_cpu(tracer.pid())? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
        let refused = log::refused_connects(metrics, if name == "refused" { made } else { 0 })?;
        tracer.stop()?;
        let counts = LogCounts::read(&file, &pids)?;
        fs::remove_file(&file)?;
        let mut number = |what: &str, value: f64| self.sample(&format!("flood.{name}.{what}"), value);
        number("made", made as f64);
        number("established", counts.established as f64);
        number("closed", counts.closed as f64);
        number("wrong", counts.wrong as f64);
        number("unnamed", counts.unnamed as f64);
        number("refused", refused as f64);
        number("lost", counts.lost as f64);
        number("sum_error", counts.sum_error as f64);
        number("lines", counts.lines as f64);
        number("written", counts.written as f64);
        number("cores", cores);
        number("rss", late.own as f64);
        number("rss_growth", late.own as f64 / early.own as f64);
        Ok(())
    }
}

/// Where the connections of [`Measurement::churn`] lead.
#[derive(Clone, Copy)]
enum ChurnDestination {
    /// From 127.0.0.1 to 127.0.0.2.
    OtherAddress,
    /// From 127.0.0.1 to itself, to a port that connect() can't choose: the commonest connection of a host.
    OwnAddressOutside,
    /// The same, to a port that connect() can choose.
    OwnAddressInside,
}

impl ChurnDestination {
    const ALL: [Self; 3] = [Self::OtherAddress, Self::OwnAddressOutside, Self::OwnAddressInside];

    /// The group of its rows.
    fn group(self) -> &'static str {
        match self {
            Self::OtherAddress => "churn",
            Self::OwnAddressOutside => OUTSIDE,
            Self::OwnAddressInside => INSIDE,
        }
    }

    /// The options of the generator.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::OtherAddress => &["--to", "127.0.0.2"],
            Self::OwnAddressOutside => &["--to", "127.0.0.1", "--outside"],
            Self::OwnAddressInside => &["--to", "127.0.0.1"],
        }
    }
}

/// The name of an empty program for this method of bind(): see [`TracerProcess::empty`].
pub(crate) fn bind_method(name: &str) -> String {
    format!("bind-{name}")
}

/// The number of connects for which the kernel measures the programs.
const COUNT: &str = "3000";

/// Connections of two addresses, which selfconn ignores.
const PLAIN: [&str; 7] = ["churn", "--to", "127.0.0.2", "--count", COUNT, "--cpu", "1"];

/// The method of a program on a hook of transitions. The daemon has programs on other hooks, too.
fn method_of<'a>(name: &str, methods: &'a [String]) -> Option<&'a str> {
    let name = name.strip_prefix("selfconn_").or(name.strip_prefix("empty_"))?;
    methods.iter().map(String::as_str).find(|method| *method == name)
}

/// Runs a generator in this namespace.
pub(crate) fn make(net: &NetNamespace, arguments: &[&str]) -> Result<TrafficMade> {
    Ok(serde_json::from_str(&output(net.helper(&[&["generate"], arguments].concat()))?)?)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
