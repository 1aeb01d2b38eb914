//! The daemon under test: starts it and collects its events.

use std::{
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
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

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use super::{
    client::connect_to_self,
    daemon_pool::{self, PoolKey},
    machine,
    retries::Missed,
    schema::{assert_valid, parse_line},
};

/// Generous because emulated kernels are slow. A passing test never waits this long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Self-connections to an address with this prefix are the markers of the test harness.
const MARKER_PREFIX: &str = "127.254.";

/// A little more than the daemon waits for what it reads of a process.
const LOOKUP_DEADLINE: Duration = Duration::from_millis(230);

/// A marker is reported within milliseconds, unless its record is lost. With a single method that can happen.
const MARKER_TIMEOUT: Duration = Duration::from_secs(5);

/// The path of the binary under test. The test that asks for it has the machine for itself from now on.
pub(crate) fn selfconn() -> PathBuf {
    machine::occupy();
    daemon_pool::begin_test();
    std::env::var_os("SELFCONN_BIN").map_or_else(|| env!("CARGO_BIN_EXE_selfconn").into(), PathBuf::from)
}

/// Divides a count by `SELFCONN_SCALE`, because emulated kernels are slow.
pub(crate) fn scaled(count: usize) -> usize {
    let scale = std::env::var("SELFCONN_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1);
    (count / scale).max(1)
}

/// Options that force one way to attach that this kernel supports. No options: the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HookVariant(pub(crate) Vec<&'static str>);

impl HookVariant {
    /// True unless this is a single method that [may miss a transition](may_be_missed_by) on this kernel. The module
    /// `load` measures what that loses.
    pub(crate) fn is_lossless(&self) -> bool {
        self.0.last().is_none_or(|method| !may_be_missed_by(method))
    }

    /// True if all of its programs can be preempted, so that a transition may be missed by each of them. The default
    /// is [lossless](Self::is_lossless) all the same: its two programs miss the same transition seldom, and a snapshot
    /// finds the connection.
    pub(crate) fn may_lose_both(&self) -> bool {
        let default = || doctor()["would_attach"].as_array().unwrap().iter().filter_map(Value::as_str);
        if self.0.is_empty() { default().all(is_preemptible) } else { !self.is_lossless() }
    }

    /// The forced method, or `default`.
    pub(crate) fn method(&self) -> &'static str {
        self.0.last().copied().unwrap_or("default")
    }
}

/// The report of `doctor` about this kernel.
pub(crate) fn doctor() -> &'static Value {
    static REPORT: OnceLock<Value> = OnceLock::new();
    REPORT.get_or_init(|| {
        let mut doctor = Command::new(selfconn());
        // The first test that asks may have mounted another sysfs, below which there is no securityfs.
        let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", std::process::id())).unwrap();
        let enter = move || Ok(move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))?);
        // SAFETY: a system call only, between fork and exec.
        unsafe { doctor.pre_exec(enter) };
        let doctor = doctor.args(["doctor", "--json"]).output().unwrap();
        let report = serde_json::from_slice(&doctor.stdout).unwrap();
        assert_valid("doctor", &report);
        report
    })
}

/// True if this kernel has the iterator over descriptors.
pub(crate) fn reads_descriptors() -> bool {
    doctor()["descriptors"][0]["verdict"] == "ok"
}

/// Each method with its verdict by `doctor` and the reason.
pub(crate) fn method_verdicts() -> Vec<(&'static str, &'static str, &'static str)> {
    let hooks = doctor()["hooks"].as_array().unwrap().iter();
    hooks.flat_map(|hook| hook["methods"].as_array().unwrap()).map(verdict_of).collect()
}

/// The same for the methods that observe failed binds.
pub(crate) fn bind_verdicts() -> Vec<(&'static str, &'static str, &'static str)> {
    doctor()["binds"].as_array().unwrap().iter().map(verdict_of).collect()
}

fn verdict_of(method: &'static Value) -> (&'static str, &'static str, &'static str) {
    let text = |key: &str| method[key].as_str().unwrap_or_default();
    (text("method"), text("verdict"), text("why"))
}

/// The options that force this method and attach no other.
pub(crate) fn options_forcing(method: &str) -> Vec<&'static str> {
    let methods_of =
        |hook: &'static Value| hook["methods"].as_array().unwrap().iter().map(move |m| (hook, m));
    let (hook, method) = doctor()["hooks"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(methods_of)
        .find(|(_, known)| known["method"] == method)
        .unwrap_or_else(|| panic!("no method {method}"));
    let [hook, method_option] = match hook["hook"].as_str() {
        Some("tcp_set_state") => ["function", "--function-method"],
        _ => ["tracepoint", "--tracepoint-method"],
    };
    vec!["--hooks", hook, method_option, method["method"].as_str().unwrap()]
}

/// True if the kernel has this version or a later one.
pub(crate) fn is_kernel_at_least(version: (u32, u32)) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(version.0), Some(version.1))
}

/// True if the kernel is a real-time one, which preempts nearly everything.
pub(crate) fn is_real_time() -> bool {
    rustix::system::uname().version().to_string_lossy().contains("PREEMPT_RT")
}

/// True if the program of this method can be preempted on this kernel. Tracepoints run with preemption off
/// until v7.1. A trampoline does not; that showed on kernels with lazy preemption (kernel/Kconfig.preempt at
/// v6.13).
pub(crate) fn is_preemptible(method: &str) -> bool {
    match method {
        "tp_btf" => is_kernel_at_least((7, 1)),
        "fentry" => is_kernel_at_least((6, 13)),
        _ => false,
    }
}

/// True if the program of this method may not run, because a task was preempted on that CPU: in the program itself, or,
/// for `perf` and `kprobe`, within a call of `bpf()` about a map, such as the daemon's own. Until 6.12 only real-time
/// kernels preempt a task within such a call.
pub(crate) fn may_be_missed_by(method: &str) -> bool {
    let is_guarded_by_cpu = ["perf", "kprobe"].contains(&method);
    is_real_time() || is_preemptible(method) || (is_guarded_by_cpu && is_kernel_at_least((6, 13)))
}

/// The expected name of a process whose name the programs must find through one of its threads, without a
/// look-up in /proc. The programs can get from a thread to the thread group leader with
/// `bpf_get_current_task_btf` (v5.11) or by reading kernel memory. Elsewhere the name is null.
pub(crate) fn comm_by_thread(name: &str) -> Value {
    let checks = doctor()["checks"].as_array().unwrap();
    let reads_memory = checks.iter().any(|check| check["name"] == "probe_read" && check["ok"] == true);
    if reads_memory || is_kernel_at_least((5, 11)) { name.into() } else { Value::Null }
}

/// The default, and each method alone that `doctor` says can be attached here.
pub(crate) fn hook_variants() -> Vec<HookVariant> {
    let attachable = method_verdicts().into_iter().filter(|(_, verdict, _)| *verdict == "ok");
    let alone: Vec<_> = attachable.map(|(method, ..)| HookVariant(options_forcing(method))).collect();
    assert!(!alone.is_empty(), "no method can be attached here: {}", doctor());
    [HookVariant(vec![])].into_iter().chain(alone).collect()
}

/// True if `comm` is this name. Null is accepted where the programs cannot read the name themselves, because
/// the process or its thread may be gone by now.
pub(crate) fn is_name_or_unknown(comm: &Value, name: &str) -> bool {
    comm == name || *comm == comm_by_thread(name)
}

/// The variants that lose nothing when hundreds of connections follow each other.
pub(crate) fn lossless_variants() -> impl Iterator<Item = HookVariant> {
    hook_variants().into_iter().filter(HookVariant::is_lossless)
}

/// A `selfconn run` process and its output so far.
pub(crate) struct TestDaemon {
    child: Child,
    lines: Receiver<String>,
    stderr_reader: Option<thread::JoinHandle<()>>,
    stderr_text: Arc<Mutex<String>>,
    events: Vec<Value>,
    /// The key under which it is returned to the pool, if other tests use it, too.
    pool_key: Option<PoolKey>,
}

impl TestDaemon {
    /// A daemon that is shared with other tests, one test after another. Its earlier events are not visible
    /// here. Not for tests of how a daemon starts, ends or is disturbed.
    pub(crate) fn shared(variant: &HookVariant, options: &[&str]) -> Self {
        let key = PoolKey::of(variant, options);
        // It reports everything that the tests of a module do, and that may be more than an owner's burst.
        let unlimited = || [options, &["--log-rate", "4294967295"]].concat();
        let mut daemon = daemon_pool::take_idle(&key)
            .unwrap_or_else(|| Self::start_with(variant, &unlimited(), daemon_pool::spawn));
        // Inode numbers of namespaces are reused, so pending events of the previous namespace must be drained
        // first.
        daemon.wait_for_pending_events();
        daemon.events.retain(|event| event["event"] == "started");
        daemon.pool_key = Some(key);
        daemon
    }

    /// Starts a daemon and waits until its hooks are live.
    pub(crate) fn start(variant: &HookVariant, options: &[&str]) -> Self {
        Self::start_with(variant, options, |command| command.spawn().unwrap())
    }

    /// As [`Self::start`]; `spawn` starts the process.
    pub(crate) fn start_with(
        variant: &HookVariant,
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
            // Lines are parsed later, because a daemon whose stdout is not read in time drops events.
            for line in stdout.lines() {
                if send.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        let stderr_text = Arc::new(Mutex::new(String::new()));
        let captured = Arc::clone(&stderr_text);
        let stderr = thread::spawn(move || {
            for line in stderr.lines() {
                captured.lock().unwrap().push_str(&(line.unwrap() + "\n"));
            }
        });
        let mut daemon = Self {
            child,
            lines,
            stderr_reader: Some(stderr),
            stderr_text,
            events: Vec::new(),
            pool_key: None,
        };
        if daemon.wait_for(1, |event| event["event"] == "started").is_err() {
            let _ = daemon.child.kill();
            daemon.stderr_reader.take().unwrap().join().unwrap();
            panic!("{variant:?} did not start: {}", daemon.stderr_text.lock().unwrap());
        }
        daemon
    }

    /// Waits until `count` events match.
    pub(crate) fn expect(&mut self, count: usize, matches: impl Fn(&Value) -> bool) -> Vec<Value> {
        self.try_expect(count, matches).unwrap_or_else(|Missed(what)| panic!("{what}"))
    }

    /// As [`Self::expect`]; too few events are not the end of the test. A daemon that has ended is.
    pub(crate) fn try_expect(
        &mut self,
        count: usize,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Vec<Value>, Missed> {
        self.wait_for(count, &matches).map_err(|why| {
            let got = self.events.iter().filter(|event| matches(event)).count();
            let last: Vec<_> = self.events.iter().rev().take(12).map(ToString::to_string).collect();
            let what = format!("{got} of {count} events ({why}); newest first:\n{}", last.join("\n"));
            assert_eq!(why, RecvTimeoutError::Timeout, "the daemon has ended: {what}");
            Missed(what)
        })
    }

    /// The only `established` and the only `closed` event of a namespace, after all pending events have
    /// arrived. A program saw the opener and the end.
    pub(crate) fn only_pair(mut self, netns: u64) -> Result<(Value, Value), Missed> {
        self.try_expect(1, is_event("closed", netns))?;
        let (events, _) = self.stop();
        let all =
            |kind| events.iter().filter(|event| is_event(kind, netns)(event)).cloned().collect::<Vec<_>>();
        let (mut established, mut closed) = (all("established"), all("closed"));
        assert_eq!((established.len(), closed.len()), (1, 1), "{events:#?}");
        Missed::if_opener_unseen(&established[0])?;
        Missed::if_null(&closed[0], &["pid", "how"])?;
        Ok((established.remove(0), closed.remove(0)))
    }

    fn wait_for(
        &mut self,
        count: usize,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Vec<Value>, RecvTimeoutError> {
        self.wait_until(Instant::now() + DEADLINE, count, matches)
    }

    /// Waits until `count` events match, at most until `until`.
    pub(crate) fn wait_until(
        &mut self,
        until: Instant,
        count: usize,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Vec<Value>, RecvTimeoutError> {
        let mut found = self.events.iter().filter(|event| matches(event)).count();
        while found < count {
            let event = parse(&self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))?);
            found += usize::from(matches(&event));
            self.events.push(event);
        }
        Ok(self.events.iter().filter(|event| matches(event)).cloned().collect())
    }

    /// Waits until everything that has happened so far is reported. The ring buffer is ordered, so the record of
    /// the end of a self-connection made now comes after everything before it. An event may then still wait for the
    /// look-up of its process, which has a deadline.
    pub(crate) fn wait_for_pending_events(&mut self) {
        // Each marker has an address of its own, because a daemon also sees the markers of other tests.
        static MARKER_COUNT: AtomicU16 = AtomicU16::new(0);
        let until = Instant::now() + DEADLINE;
        loop {
            let [high, low] = MARKER_COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
            let marker = Ipv4Addr::new(127, 254, high, low);
            let (socket, _) = connect_to_self(marker.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            drop(socket);
            let is_marker = |event: &Value| event["event"] == "closed" && event["addr"] == marker.to_string();
            if self.wait_until(Instant::now() + MARKER_TIMEOUT, 1, is_marker).is_ok() {
                break;
            }
            assert!(Instant::now() < until, "markers are not reported: {}", self.stderr_text.lock().unwrap());
        }
        let _ = self.wait_until(Instant::now() + LOOKUP_DEADLINE, usize::MAX, |_| true);
        self.events
            .retain(|event| !event["addr"].as_str().is_some_and(|addr| addr.starts_with(MARKER_PREFIX)));
    }

    /// Returns all events and the text of stderr. Everything that happened before this call is included. Ends
    /// the daemon by SIGTERM, unless it is shared.
    pub(crate) fn stop(mut self) -> (Vec<Value>, String) {
        if let Some(key) = self.pool_key.take() {
            self.wait_for_pending_events();
            let (events, stderr_text) = (self.events.clone(), self.stderr_text.lock().unwrap().clone());
            daemon_pool::put_idle(key, self);
            return (events, stderr_text);
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        self.stderr_reader.take().unwrap().join().unwrap();
        let stderr_text = self.stderr_text.lock().unwrap().clone();
        assert!(status.success(), "{status}: {stderr_text}");
        self.events.extend(self.lines.iter().map(|line| parse(&line)));
        (std::mem::take(&mut self.events), stderr_text)
    }

    /// The text of stderr so far.
    pub(crate) fn stderr_so_far(&self) -> String {
        self.stderr_text.lock().unwrap().clone()
    }

    /// Waits until the daemon ends by itself. Returns its exit code, all events and the text of stderr.
    pub(crate) fn wait_for_exit(mut self) -> (Option<i32>, Vec<Value>, String) {
        let until = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "the daemon does not end: {}", self.stderr_text.lock().unwrap());
            thread::sleep(Duration::from_millis(10));
        };
        self.stderr_reader.take().unwrap().join().unwrap();
        self.events.extend(self.lines.iter().map(|line| parse(&line)));
        (status.code(), std::mem::take(&mut self.events), self.stderr_so_far())
    }

    /// Number of snapshots of the socket table that it has taken. Needs `-vv`.
    pub(crate) fn snapshot_count(&self) -> usize {
        self.stderr_text.lock().unwrap().matches("read the socket table").count()
    }

    /// Repeats `work` until the daemon has taken `count` more snapshots of the socket table. Needs `-vv`.
    pub(crate) fn run_until_snapshots(&self, count: usize, mut work: impl FnMut()) {
        let (before, until) = (self.snapshot_count(), Instant::now() + DEADLINE);
        while self.snapshot_count() < before + count {
            assert!(Instant::now() < until, "{}", self.stderr_text.lock().unwrap());
            work();
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// The events received so far.
    pub(crate) fn received(&self) -> &[Value] {
        &self.events
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        // Needed only after a panic; `stop` has waited for the process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(line: &str) -> Value {
    parse_line("events", line)
}

/// Matches events of one kind in one network namespace.
pub(crate) fn is_event(kind: &'static str, netns: u64) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == kind && event["netns"] == netns
}
