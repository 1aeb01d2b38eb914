//! The measurements, one function for each group of rows. What is compared is interleaved, and differs in nothing else.

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
    crowd::Crowd,
    generate::{Made, pin, self_connection},
    net::{Net, finish, output},
    proc,
    programs::{self, Account},
    sample::{fact, sample, skipped, step},
    told::{self, Tally},
    tracer::{Peer, Tracer},
};

/// What is measured, and how thoroughly.
pub(crate) struct Bench {
    pub(crate) daemon: PathBuf,
    pub(crate) quick: bool,
    /// For logs: in memory, so that no disk is measured.
    pub(crate) scratch: PathBuf,
}

impl Bench {
    fn rounds(&self, full: usize) -> usize {
        if self.quick { full.div_ceil(5) } else { full }
    }

    /// Everything, or the groups that are named.
    pub(crate) fn run(&self, only: &[String]) -> Result<()> {
        type Group = (&'static str, fn(&Bench) -> Result<()>);
        let groups: [Group; 6] = [
            ("idle", Self::idle),
            ("transition", Self::transition),
            ("churn", Self::churn),
            ("latency", Self::latency),
            ("scan", Self::scan),
            ("flood", Self::flood),
        ];
        for (name, group) in groups {
            if only.is_empty() || only.iter().any(|only| only == name) {
                step(name);
                group(self).with_context(|| format!("measure {name}"))?;
            }
        }
        Ok(())
    }

    fn start(&self, options: &[&str]) -> Result<Tracer> {
        Tracer::daemon(&self.daemon, options)
    }

    /// The methods that the daemon chooses on this kernel.
    fn methods(&self) -> Result<Vec<String>> {
        let tracer = self.start(&[])?;
        let started: Value = serde_json::from_str(&tracer.first)?;
        tracer.stop()?;
        let hooks = started["hooks"].as_array().context("no hooks in `started`")?;
        Ok(hooks.iter().filter_map(|hook| hook["method"].as_str()).map(str::to_owned).collect())
    }

    /// Run time of the programs, by the kernel's own account: beside that of empty ones, and for an opener's memory.
    fn transition(&self) -> Result<()> {
        let net = Net::new()?;
        let methods = self.methods()?;
        fact("methods", &methods.join(" and "));
        let _account = enable_stats(Stats::RunTime).context("have the kernel account for BPF programs")?;
        for round in 0..self.rounds(25) {
            self.beside_empty(round, &net, &methods)?;
            self.memory(round, &net, &methods)?;
        }
        Ok(())
    }

    /// Both at once, on the same transitions, so that whatever slows the host slows both; each comes first once.
    fn beside_empty(&self, round: usize, net: &Net, methods: &[String]) -> Result<()> {
        let mut each = BTreeMap::<_, Vec<f64>>::new();
        for first in [true, false] {
            let start = |ours: bool| if ours { self.start(&[]) } else { Tracer::empty(methods) };
            let tracers = [(first, start(first)?), (!first, start(!first)?)];
            let before = tracers.iter().map(|(_, tracer)| programs::of_process(tracer.pid()));
            let before = before.collect::<Result<Vec<_>>>()?;
            make(net, &PLAIN)?;
            for ((ours, tracer), before) in tracers.into_iter().zip(before) {
                for account in programs::since(&before, programs::of_process(tracer.pid())?) {
                    let Some(method) = method_of(&account.name, methods) else { continue };
                    each.entry((ours, method)).or_default().push(account.ns as f64 / account.runs as f64);
                    if round == 0 && ours && first {
                        let insns = account.verified_insns.map_or("?".to_owned(), |count| count.to_string());
                        fact(
                            &format!("program.{method}"),
                            &format!("{insns} insns verified, {} bytes of machine code", account.jited_bytes),
                        );
                    }
                }
                tracer.stop()?;
            }
        }
        for ((ours, method), both) in each {
            let whose = if ours { "ours" } else { "empty" };
            sample(
                &format!("transition.{whose}.{method}"),
                round,
                both.iter().sum::<f64>() / both.len() as f64,
            );
        }
        Ok(())
    }

    /// What our programs alone take beyond a connection of two addresses, for what goes from an address to itself.
    fn memory(&self, round: usize, net: &Net, methods: &[String]) -> Result<()> {
        let tracer = self.start(&[])?;
        let cost = |arguments: &[&str]| -> Result<(Made, Vec<Account>)> {
            let before = programs::of_process(tracer.pid())?;
            let made = make(net, arguments)?;
            Ok((made, programs::since(&before, programs::of_process(tracer.pid())?)))
        };
        for (what, kind) in [("opener", "churn"), ("refused", "refused"), ("self", "selves")] {
            let (_, plain) = cost(&PLAIN)?;
            let (made, accounts) = cost(&[kind, "--to", "127.0.0.1", "--count", COUNT, "--cpu", "1"])?;
            let beyond = accounts.iter().filter_map(|account| {
                method_of(&account.name, methods)?;
                let plain = plain.iter().find(|plain| plain.name == account.name)?;
                Some(account.ns as f64 - account.runs as f64 * plain.ns as f64 / plain.runs as f64)
            });
            sample(&format!("memory.{what}"), round, beyond.sum::<f64>() / made.count as f64);
        }
        tracer.stop()
    }

    /// Connections a second, untraced and traced by each. No account is kept meanwhile.
    fn churn(&self) -> Result<()> {
        let net = Net::new()?;
        let methods = self.methods()?;
        let churn = |count: u64| -> Result<f64> {
            Ok(make(&net, &["churn", "--to", "127.0.0.2", "--count", &count.to_string(), "--cpu", "1"])?
                .rate())
        };
        // Whatever else happens on the host only slows.
        let best =
            || (0..5).map(|_| churn(2_000)).try_fold(0.0, |best, rate| rate.map(|rate| rate.max(best)));
        churn(2_000)?;
        let probe = || churn(20).map(drop);
        // The pair that is close together, in turns: what drifts hits both.
        for round in 0..self.rounds(40) {
            let order = if round % 2 == 0 { [true, false] } else { [false, true] };
            for ours in order {
                let tracer = if ours { self.start(&[])? } else { Tracer::empty(&methods)? };
                let name = if ours { "churn.close.ours" } else { "churn.close.empty" };
                sample(name, round, best()?);
                tracer.stop()?;
            }
        }
        let mut peers = Vec::new();
        for peer in Peer::ALL {
            match Tracer::peer(peer, probe).and_then(Tracer::stop) {
                Ok(()) => peers.push(peer),
                Err(why) => skipped(&format!("churn.{}", peer.name()), &format!("{why:#}")),
            }
        }
        for round in 0..self.rounds(10) {
            sample("churn.none", round, churn(5_000)?);
            let tracer = Tracer::empty(&methods)?;
            sample("churn.empty", round, churn(5_000)?);
            tracer.stop()?;
            let tracer = self.start(&[])?;
            sample("churn.ours", round, churn(5_000)?);
            tracer.stop()?;
            for peer in &peers {
                let tracer = Tracer::peer(*peer, probe)?;
                sample(&format!("churn.{}", peer.name()), round, churn(5_000)?);
                tracer.stop()?;
            }
        }
        Ok(())
    }

    /// From before `connect()` to the line readable in the log.
    fn latency(&self) -> Result<()> {
        let net = Net::new()?;
        let log = self.scratch.join("latency.jsonl");
        let tracer = self.start(&["--log", text(&log)?])?;
        let count = if self.quick { 300 } else { 2_000 };
        const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
        net.inside(|| {
            pin(1)?;
            let mut file = fs::File::open(&log)?;
            file.seek(SeekFrom::End(0))?;
            // As `tail -f` waits; one that asks again and again would keep the daemon from its CPU.
            let written = inotify::init(inotify::CreateFlags::CLOEXEC)?;
            inotify::add_watch(&written, &log, inotify::WatchFlags::MODIFY)?;
            let mut notices = [0; 4 << 10];
            let mut seen = Vec::new();
            for round in 0..count {
                // The host is idle: nothing of the last one is under way.
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
                    ensure!(poll(&mut waits, Some(&PATIENCE))? > 0, "an event does not come");
                    rustix::io::read(&written, &mut notices)?;
                }
                sample("latency", round, began.elapsed().as_secs_f64() * 1e6);
                drop(socket);
            }
            Ok(())
        })?;
        tracer.stop()?;
        fs::remove_file(&log)?;
        Ok(())
    }

    /// What it costs to have it, where nothing happens.
    fn idle(&self) -> Result<()> {
        sample("binary", 0, fs::metadata(&self.daemon)?.len() as f64);
        for round in 0..self.rounds(20) {
            let began = Instant::now();
            let tracer = self.start(&[])?;
            sample("start", round, began.elapsed().as_secs_f64() * 1e3);
            tracer.stop()?;
        }
        let tracer = self.start(&[])?;
        // The socket table is read at once, and then once a minute.
        thread::sleep(Duration::from_secs(3));
        let seconds = if self.quick { 6 } else { 50 };
        let before = (proc::sleeps(tracer.pid())?, proc::on_cpu(tracer.pid())?);
        thread::sleep(Duration::from_secs(seconds));
        let after = (proc::sleeps(tracer.pid())?, proc::on_cpu(tracer.pid())?);
        let minutes = seconds as f64 / 60.0;
        sample("idle.wakeups", 0, (after.0 - before.0) as f64 / minutes);
        sample("idle.cpu_us", 0, (after.1 - before.1).as_secs_f64() * 1e6 / minutes);
        let memory = proc::memory(tracer.pid())?;
        sample("idle.rss", 0, memory.own as f64);
        sample("idle.rss_with_ring", 0, memory.all as f64);
        tracer.stop()
    }

    /// Listing, beside `ss`, and how it grows.
    fn scan(&self) -> Result<()> {
        let time = |command: &mut Command| -> Result<f64> {
            let began = Instant::now();
            let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
            // 1: something was found, which is somebody else's.
            ensure!(matches!(status.code(), Some(0 | 1)), "{status}");
            Ok(began.elapsed().as_secs_f64() * 1e3)
        };
        let scan = || time(Command::new(&self.daemon).arg("scan"));
        // What the daemon's own comparison with the table takes of a processor.
        let reading = |name: &str| -> Result<()> {
            let tracer = self.start(&["--reconcile", "1", "-vv"])?;
            for round in 0..self.rounds(5) {
                sample(name, round, tracer.time_of_readings(1)?.as_secs_f64() * 1e3);
            }
            tracer.stop()
        };
        let net = Net::new()?;
        for sockets in [1_000, 10_000, 100_000] {
            let crowd = Crowd::new(&net, sockets)?;
            for round in 0..self.rounds(10) {
                sample(&format!("scan.sockets.{sockets}"), round, scan()?);
                let mut ss = Command::new("ss");
                net.enter(ss.arg("-tanH"));
                sample(&format!("scan.ss.{sockets}"), round, time(&mut ss)?);
            }
            reading(&format!("reading.sockets.{sockets}"))?;
            drop(crowd);
        }
        drop(net);
        let mut nets = Vec::new();
        for namespaces in [1, 10, 100] {
            while nets.len() < namespaces {
                let net = Net::new()?;
                let crowd = Crowd::new(&net, 20)?;
                nets.push((crowd, net));
            }
            for round in 0..self.rounds(20) {
                sample(&format!("scan.namespaces.{namespaces}"), round, scan()?);
            }
            reading(&format!("reading.namespaces.{namespaces}"))?;
        }
        Ok(())
    }

    /// As fast as generators go.
    fn flood(&self) -> Result<()> {
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

    fn flooded(&self, name: &str, generators: &[&[&str]], seconds: u64) -> Result<()> {
        let net = Net::new()?;
        let log = self.scratch.join("flood.jsonl");
        let at = told::free_port()?;
        let tracer = self.start(&["--log", text(&log)?, "--metrics", &at.to_string()])?;
        let (began, cpu) = (Instant::now(), proc::on_cpu(tracer.pid())?);
        let mut children = Vec::new();
        for generator in generators {
            let duration = seconds.to_string();
            let arguments =
                [&["generate"], *generator, &["--count", "100000000", "--seconds", &duration]].concat();
            let mut command = net.own(&arguments);
            children.push(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        }
        let pids: Vec<u32> = children.iter().map(std::process::Child::id).collect();
        thread::sleep(Duration::from_secs(seconds).mul_f64(0.3));
        let early = proc::memory(tracer.pid())?;
        thread::sleep(Duration::from_secs(seconds).mul_f64(0.6));
        let late = proc::memory(tracer.pid())?;
        let mut made = 0;
        for child in children {
            let one: Made = serde_json::from_str(&finish(child)?)?;
            sample(&format!("flood.{name}.rate"), made as usize, one.rate());
            made += one.count;
        }
        let cores = (proc::on_cpu(tracer.pid())? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
        let refused = told::refused(at, if name == "refused" { made } else { 0 })?;
        tracer.stop()?;
        let tally = Tally::of(&log, &pids)?;
        fs::remove_file(&log)?;
        let number = |what: &str, value: f64| sample(&format!("flood.{name}.{what}"), 0, value);
        number("made", made as f64);
        number("established", tally.established as f64);
        number("closed", tally.closed as f64);
        number("wrong", tally.wrong as f64);
        number("unnamed", tally.unnamed as f64);
        number("refused", refused as f64);
        number("lost", tally.lost as f64);
        number("uneven", tally.uneven as f64);
        number("lines", tally.lines as f64);
        number("written", tally.written as f64);
        number("cores", cores);
        number("rss", late.own as f64);
        number("rss_grown", late.own as f64 / early.own as f64);
        Ok(())
    }
}

/// So many of a kind, where the kernel keeps account.
const COUNT: &str = "3000";

/// What is none of ours: connections of two addresses.
const PLAIN: [&str; 7] = ["churn", "--to", "127.0.0.2", "--count", COUNT, "--cpu", "1"];

/// By which of these methods a program is attached to a hook. The daemon has some on other hooks, which see no transitions.
fn method_of<'a>(name: &str, methods: &'a [String]) -> Option<&'a str> {
    let name = name.strip_prefix("selfconn_").or(name.strip_prefix("empty_"))?;
    methods.iter().map(String::as_str).find(|method| *method == name)
}

/// Has a generator make something in this namespace.
fn make(net: &Net, arguments: &[&str]) -> Result<Made> {
    Ok(serde_json::from_str(&output(net.own(&[&["generate"], arguments].concat()))?)?)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}
