//! The daemon under test: starts it, and collects its events.

use std::{
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    panic::AssertUnwindSafe,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU16, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    client::{self, connect_to_self},
    pool::{self, Place},
};

/// Generous, for emulated kernels; a passing test never waits for it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Self-connections to an address that begins so are the harness's own.
const MARKS: &str = "127.254.";

/// A mark is told within milliseconds, unless it is lost, as anything can be that one method alone is to see.
const MARK_TAKES: Duration = Duration::from_secs(5);

/// The binary under test.
pub(crate) fn selfconn() -> PathBuf {
    std::env::var_os("SELFCONN_BIN").map_or_else(|| env!("CARGO_BIN_EXE_selfconn").into(), PathBuf::from)
}

/// How many of something to make: fewer where the kernel is emulated.
pub(crate) fn scaled(count: usize) -> usize {
    let scale = std::env::var("SELFCONN_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1);
    (count / scale).max(1)
}

/// A way to run the daemon that this kernel supports, as the options that force it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Variant(pub(crate) Vec<&'static str>);

impl Variant {
    /// Whether it is not one method alone of a kernel that preempts programs: `load` has what is lost by that.
    fn is_steady(&self) -> bool {
        self.0.last().is_none_or(|method| !is_preemptible("tp_btf") && !is_preemptible(method))
    }
}

/// What `doctor` says of this kernel.
pub(crate) fn doctor() -> &'static Value {
    static REPORT: OnceLock<Value> = OnceLock::new();
    REPORT.get_or_init(|| {
        let doctor = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
        serde_json::from_slice(&doctor.stdout).unwrap()
    })
}

/// Each method's verdict by `doctor`, with the reason.
pub(crate) fn verdicts() -> Vec<(&'static str, &'static str, &'static str)> {
    let hooks = doctor()["hooks"].as_array().unwrap().iter();
    let methods = hooks.flat_map(|hook| hook["methods"].as_array().unwrap());
    let verdict = |method: &'static Value| {
        let text = |key: &str| method[key].as_str().unwrap_or_default();
        (text("method"), text("verdict"), text("why"))
    };
    methods.map(verdict).collect()
}

/// The options that force a method, and nothing beside it.
pub(crate) fn forced(method: &str) -> Vec<&'static str> {
    match method {
        "tp_btf" => vec!["--hooks", "tracepoint", "--tracepoint-method", "tp_btf"],
        "perf" => vec!["--hooks", "tracepoint", "--tracepoint-method", "perf"],
        "fentry" => vec!["--hooks", "function", "--function-method", "fentry"],
        "kprobe" => vec!["--hooks", "function", "--function-method", "kprobe"],
        other => panic!("no method {other}"),
    }
}

/// Whether this kernel is of this version or a later one.
fn is_since(version: (u32, u32)) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(version.0), Some(version.1))
}

/// Whether this method's program can be preempted on this kernel. Tracepoints keep preemption off until v7.1; a trampoline
/// does not, which showed on kernels that preempt lazily (kernel/Kconfig.preempt at v6.13).
pub(crate) fn is_preemptible(method: &str) -> bool {
    match method {
        "tp_btf" => is_since((7, 1)),
        "fentry" => is_since((6, 13)),
        _ => false,
    }
}

/// The name of a process of which only one thread was seen, and which isn't looked up: where the programs can get from a
/// thread to its process's first one, by `bpf_get_current_task_btf` (v5.11) or by reading memory.
pub(crate) fn by_thread(name: &str) -> Value {
    let checks = doctor()["checks"].as_array().unwrap();
    let reads_memory = checks.iter().any(|check| check["name"] == "probe_read" && check["ok"] == true);
    if reads_memory || is_since((5, 11)) { name.into() } else { Value::Null }
}

/// The default, and each method alone that `doctor` says can be attached here.
pub(crate) fn variants() -> Vec<Variant> {
    let attachable = verdicts().into_iter().filter(|(_, verdict, _)| *verdict == "ok");
    let alone: Vec<_> = attachable.map(|(method, ..)| Variant(forced(method))).collect();
    assert!(!alone.is_empty(), "nothing can be attached here: {}", doctor());
    [Variant(vec![])].into_iter().chain(alone).collect()
}

/// Whether this is the name of a process whose thread, or itself, may be gone by now: always, where the programs see it
/// themselves.
pub(crate) fn is_or_unknown(comm: &Value, name: &str) -> bool {
    comm == name || *comm == by_thread(name)
}

/// Those of them that nothing is lost by where hundreds follow each other.
pub(crate) fn steady_variants() -> impl Iterator<Item = Variant> {
    variants().into_iter().filter(Variant::is_steady)
}

/// Tests the default, and each method alone. Where that can be preempted it may miss a step of the one connection that a
/// test makes, and gets three tries for that; none for a wrong opener.
pub(crate) fn for_each_variant(test: impl Fn(&Variant)) {
    for variant in variants() {
        let tries = if variant.is_steady() { 1 } else { 3 };
        for left in (0..tries).rev() {
            match std::panic::catch_unwind(AssertUnwindSafe(|| test(&variant))) {
                Ok(()) => break,
                Err(panic) if left == 0 || client::was_misnamed() => std::panic::resume_unwind(panic),
                Err(_) => println!("{variant:?}: again, for it can be preempted"),
            }
        }
    }
}

/// `selfconn run`, and what it has said so far.
pub(crate) struct Daemon {
    child: Child,
    lines: Receiver<String>,
    stderr: Option<thread::JoinHandle<()>>,
    said: Arc<Mutex<String>>,
    seen: Vec<Value>,
    /// Where it is given back to, if it serves other tests, too.
    lent: Option<Place>,
}

impl Daemon {
    /// One that serves other tests before and after this one. What it said before is not seen here. Not for tests of
    /// how a daemon starts, ends or is disturbed.
    pub(crate) fn shared(variant: &Variant, options: &[&str]) -> Self {
        let place = Place::of(variant, options);
        let mut daemon = pool::take(&place).unwrap_or_else(|| Self::start_by(variant, options, pool::spawn));
        // The number of a namespace is used again: what is still to be told of the last one must be over.
        daemon.settle();
        daemon.seen.retain(|event| event["event"] == "started");
        daemon.lent = Some(place);
        daemon
    }

    /// Starts it and waits until its hooks are live.
    pub(crate) fn start(variant: &Variant, options: &[&str]) -> Self {
        Self::start_by(variant, options, |command| command.spawn().unwrap())
    }

    /// Likewise; `spawn` says where the process begins.
    pub(crate) fn start_by(
        variant: &Variant,
        options: &[&str],
        spawn: impl FnOnce(&mut Command) -> Child,
    ) -> Self {
        let mut command = Command::new(selfconn());
        command.args(["run", "--json"]).args(&variant.0).args(options);
        let mut child = spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()));
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = channel();
        thread::spawn(move || {
            // Unread, for a daemon whose stdout is behind drops events.
            for line in stdout.lines() {
                if send.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        let said = Arc::new(Mutex::new(String::new()));
        let hears = Arc::clone(&said);
        let stderr = thread::spawn(move || {
            for line in stderr.lines() {
                hears.lock().unwrap().push_str(&(line.unwrap() + "\n"));
            }
        });
        let mut daemon = Self { child, lines, stderr: Some(stderr), said, seen: Vec::new(), lent: None };
        if daemon.wait_for(1, |event| event["event"] == "started").is_err() {
            let _ = daemon.child.kill();
            daemon.stderr.take().unwrap().join().unwrap();
            panic!("{variant:?} did not start: {}", daemon.said.lock().unwrap());
        }
        daemon
    }

    /// Waits until `count` events match.
    pub(crate) fn expect(&mut self, count: usize, matches: impl Fn(&Value) -> bool) -> Vec<Value> {
        match self.wait_for(count, &matches) {
            Ok(events) => events,
            Err(why) => {
                let got = self.seen.iter().filter(|event| matches(event)).count();
                let last: Vec<_> = self.seen.iter().rev().take(12).map(ToString::to_string).collect();
                panic!("{got} of {count} events ({why}); the newest first:\n{}", last.join("\n"));
            }
        }
    }

    fn wait_for(
        &mut self,
        count: usize,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Vec<Value>, RecvTimeoutError> {
        self.wait_until(Instant::now() + DEADLINE, count, matches)
    }

    /// Waits until there are so many of these, but not longer than that.
    pub(crate) fn wait_until(
        &mut self,
        until: Instant,
        count: usize,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Vec<Value>, RecvTimeoutError> {
        let mut found = self.seen.iter().filter(|event| matches(event)).count();
        while found < count {
            let event = parse(&self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))?);
            found += usize::from(matches(&event));
            self.seen.push(event);
        }
        Ok(self.seen.iter().filter(|event| matches(event)).cloned().collect())
    }

    /// Waits until everything that has happened is told. The ring buffer is in order, so that the end of a
    /// self-connection made now is told after all else.
    pub(crate) fn settle(&mut self) {
        // Each has an address of its own, for a daemon also sees the marks that others are waited for by.
        static MADE: AtomicU16 = AtomicU16::new(0);
        let until = Instant::now() + DEADLINE;
        loop {
            let [high, low] = MADE.fetch_add(1, Ordering::Relaxed).to_be_bytes();
            let mark = Ipv4Addr::new(127, 254, high, low);
            let (socket, _) = connect_to_self(mark.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            drop(socket);
            let is_it = |event: &Value| event["event"] == "closed" && event["addr"] == mark.to_string();
            if self.wait_until(Instant::now() + MARK_TAKES, 1, is_it).is_ok() {
                break;
            }
            assert!(Instant::now() < until, "marks are not told: {}", self.said.lock().unwrap());
        }
        self.seen.retain(|event| !event["addr"].as_str().is_some_and(|addr| addr.starts_with(MARKS)));
    }

    /// All that it said on stdout and stderr; everything that happened before is in there. Ends it by SIGTERM, unless
    /// it is shared.
    pub(crate) fn stop(mut self) -> (Vec<Value>, String) {
        if let Some(place) = self.lent.take() {
            self.settle();
            let (events, said) = (self.seen.clone(), self.said.lock().unwrap().clone());
            pool::give_back(place, self);
            return (events, said);
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        self.stderr.take().unwrap().join().unwrap();
        let said = self.said.lock().unwrap().clone();
        assert!(status.success(), "{status}: {said}");
        self.seen.extend(self.lines.iter().map(|line| parse(&line)));
        (std::mem::take(&mut self.seen), said)
    }

    /// What it has said on stderr so far.
    pub(crate) fn said_so_far(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Waits until it ends by itself: its exit code, and all that it said on stdout and stderr.
    pub(crate) fn ends(mut self) -> (Option<i32>, Vec<Value>, String) {
        let until = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "it goes on: {}", self.said.lock().unwrap());
            thread::sleep(Duration::from_millis(10));
        };
        self.stderr.take().unwrap().join().unwrap();
        self.seen.extend(self.lines.iter().map(|line| parse(&line)));
        (status.code(), std::mem::take(&mut self.seen), self.said_so_far())
    }

    /// How often it has read the socket table; needs `-vv`.
    pub(crate) fn readings(&self) -> usize {
        self.said.lock().unwrap().matches("read the socket table").count()
    }

    /// Does `work` until it has read the socket table `count` times from now on.
    pub(crate) fn while_reading(&self, count: usize, mut work: impl FnMut()) {
        let (before, until) = (self.readings(), Instant::now() + DEADLINE);
        while self.readings() < before + count {
            assert!(Instant::now() < until, "{}", self.said.lock().unwrap());
            work();
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// What it has said so far, as far as it was waited for.
    pub(crate) fn seen(&self) -> &[Value] {
        &self.seen
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Only after a panic; `stop` has waited for it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// Events of one kind about one namespace.
pub(crate) fn of(kind: &'static str, netns: u64) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == kind && event["netns"] == netns
}
