//! Load: four workers make self-connections at full speed, with each method and each pair of methods, under
//! conditions in which a kernel loses transitions. Losses are measured per kernel, and the socket table must
//! show what was lost. The default and every other pair whose programs cannot be blocked together lose
//! nothing. A wrong opener is never acceptable.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aya::{Ebpf, programs::TracePoint};
use serde_json::Value;
use socket2::Socket;

use crate::support::{
    client::connect_to_self,
    daemon::{
        HookVariant, TestDaemon, doctor, is_event, is_preemptible, may_be_missed_by, method_verdicts,
        options_forcing, scaled,
    },
    helper_process::HelperProcess,
    kernel_gaps::KernelGaps,
    machine,
    netns::TestNetns,
};

const WORKERS: u8 = 4;

/// Self-connections that each worker holds open at the same time. Few, so that a snapshot of the socket table
/// stays cheap.
const HELD_PER_WORKER: usize = 100;

static TEST_PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-test-programs"));

/// The connecting threads, by the address that each one connects to.
type ConnectingThreads = HashMap<String, i64>;

/// Each worker connects to a loopback address of its own, which identifies its self-connections.
fn run_workers(group: u8, each: usize, keep: bool) -> (ConnectingThreads, Vec<Socket>) {
    let worker = |number: u8| {
        move || {
            let address = Ipv4Addr::new(127, 0, group, number);
            let connect = || {
                let (socket, _) = connect_to_self(address.into());
                // No TIME_WAIT, which would exhaust the ports.
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                keep.then_some(socket)
            };
            let sockets: Vec<Socket> = (0..each).filter_map(|_| connect()).collect();
            let tid = i64::from(rustix::thread::gettid().as_raw_nonzero().get());
            ((address.to_string(), tid), sockets)
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (1..=WORKERS).map(|number| scope.spawn(worker(number))).collect();
        let done = workers.into_iter().map(|worker| worker.join().unwrap());
        let (threads, sockets): (ConnectingThreads, Vec<_>) = done.unzip();
        (threads, sockets.into_iter().flatten().collect())
    })
}

/// Matches events of one kind about the self-connections of one group of workers.
fn is_group_event(group: u8, kind: &'static str, net: TestNetns) -> impl Fn(&Value) -> bool {
    let prefix = format!("127.0.{group}.");
    move |event| {
        is_event(kind, net.inode)(event)
            && event["addr"].as_str().is_some_and(|addr| addr.starts_with(&prefix))
    }
}

/// Numbers of events whose opener is right, wrong or unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OpenerCounts {
    right: usize,
    wrong: usize,
    unknown: usize,
}

impl OpenerCounts {
    fn count<'a>(established: impl Iterator<Item = &'a Value>, threads: &ConnectingThreads) -> Self {
        let mut openers = Self::default();
        for event in established {
            let right = threads.get(event["addr"].as_str().unwrap()).copied();
            let is_us = event["pid"].is_null() || event["pid"] == std::process::id();
            match event["tid"].as_i64() {
                None if is_us => openers.unknown += 1,
                tid if is_us && tid == right => openers.right += 1,
                _ => openers.wrong += 1,
            }
        }
        openers
    }
}

/// True if there is more than one CPU for RPS.
fn has_many_cpus() -> bool {
    thread::available_parallelism().unwrap().get() > 1
}

/// A condition in which a kernel loses transitions.
struct Condition {
    name: &'static str,
    net: TestNetns,
    /// Holds a self-connection from before any daemon, so that a test can wait for a daemon's first snapshot
    /// of the socket table.
    netns_process: HelperProcess,
    /// True if programs of another agent run on every system call.
    has_other_agent: bool,
}

impl Condition {
    /// Prepares a namespace on a thread of its own. `None` where this kernel or machine does not support the
    /// condition.
    fn new(name: &'static str, has_other_agent: bool, prepare: fn(TestNetns) -> bool) -> Option<Self> {
        let make = move || {
            let net = TestNetns::enter_new();
            prepare(net).then(|| {
                let mut netns_process = HelperProcess::start("connect");
                netns_process.read_output();
                Self { name, net, netns_process, has_other_agent }
            })
        };
        thread::spawn(make).join().unwrap()
    }

    /// True if transitions run in softirqs, which interrupt programs.
    fn runs_in_softirqs(&self) -> bool {
        self.name != "plain" && (self.name == "delayed" || has_many_cpus())
    }

    fn all() -> Vec<Self> {
        let with_rps = |net: TestNetns| {
            if has_many_cpus() {
                net.enable_rps();
            }
            has_many_cpus()
        };
        let with_netem = |net: TestNetns| match net.add_netem_delay() {
            Ok(()) => true,
            Err(error) => {
                assert!(std::env::var_os("SELFCONN_KERNEL").is_none(), "netem: {error}");
                println!("this kernel has no netem: {error}");
                false
            }
        };
        let with_agent = |net: TestNetns| {
            if has_many_cpus() {
                net.enable_rps();
            }
            true
        };
        let all = [
            Self::new("plain", false, |_| true),
            Self::new("steered", false, with_rps),
            Self::new("delayed", false, with_netem),
            Self::new("beside", true, with_agent),
        ];
        all.into_iter().flatten().collect()
    }
}

/// Another agent: a busy program on every system call, and threads that keep it running on two CPUs.
struct OtherAgent {
    is_over: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<()>>,
    _programs: Ebpf,
}

impl OtherAgent {
    fn start() -> Self {
        let mut programs = Ebpf::load(TEST_PROGRAMS).unwrap();
        let program: &mut TracePoint = programs.program_mut("busy_sys_enter").unwrap().try_into().unwrap();
        selfconn::bpf::tracefs::with(|| {
            program.load().unwrap();
            program.attach("raw_syscalls", "sys_enter").unwrap();
        });
        let is_over = Arc::new(AtomicBool::new(false));
        let client = || {
            let is_over = Arc::clone(&is_over);
            thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::black_box(rustix::process::getppid());
                }
            })
        };
        let clients = (0..2).map(|_| client()).collect();
        Self { is_over, clients, _programs: programs }
    }
}

impl Drop for OtherAgent {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

/// Methods that run together, and the options that select them.
struct MethodSet {
    methods: Vec<&'static str>,
    options: Vec<&'static str>,
}

impl MethodSet {
    /// Each method alone and each pair of methods, as far as this kernel supports them.
    fn all() -> Vec<Self> {
        let has: Vec<_> =
            method_verdicts().into_iter().filter(|method| method.1 == "ok").map(|method| method.0).collect();
        let alone =
            has.iter().map(|method| Self { methods: vec![*method], options: options_forcing(method) });
        let pairs = [
            (["tp_btf", "kprobe"], &["--tracepoint-method", "tp_btf", "--function-method", "kprobe"][..]),
            (["perf", "fentry"], &["--tracepoint-method", "perf", "--function-method", "fentry"]),
            (["tp_btf", "perf"], &["--hooks", "tracepoint"]),
            (["fentry", "kprobe"], &["--hooks", "function"]),
            (["tp_btf", "fentry"], &["--tracepoint-method", "tp_btf", "--function-method", "fentry"]),
            (["perf", "kprobe"], &["--tracepoint-method", "perf", "--function-method", "kprobe"]),
        ];
        let pairs = pairs.into_iter().filter(|(pair, _)| pair.iter().all(|method| has.contains(method)));
        let together =
            pairs.map(|(pair, options)| Self { methods: pair.to_vec(), options: options.to_vec() });
        alone.chain(together).collect()
    }

    fn name(&self) -> String {
        self.methods.join("+")
    }

    /// True for a pair of one method whose recursion guard is its own (tp_btf, fentry) and one method that shares its
    /// guard with other programs and cannot be preempted (perf, kprobe).
    fn is_guarded_pair(&self) -> bool {
        let share = |method: &&&str| ["perf", "kprobe"].contains(*method);
        self.methods.len() == 2 && self.methods.iter().filter(share).count() == 1
    }

    /// True if no transition may be lost. A single method whose program no preempted task keeps from running is blocked
    /// only by an interrupt, either of its own program or of a program of another agent with the same recursion guard.
    /// In a guarded pair one method always sees the transition, unless one method is preempted and the other
    /// interrupted at the same moment.
    fn is_lossless(&self, condition: &Condition) -> bool {
        match self.methods.as_slice() {
            [method @ ("perf" | "kprobe")] => {
                !may_be_missed_by(method) && !condition.runs_in_softirqs() && !condition.has_other_agent
            }
            methods => {
                let may_be_both =
                    condition.runs_in_softirqs() && methods.iter().any(|one| is_preemptible(one));
                self.is_guarded_pair() && !may_be_both
            }
        }
    }
}

/// Number of these connections whose transition to ESTABLISHED no program saw. Both sequence numbers are
/// known only at that transition.
fn established_unseen(established: &[Value]) -> usize {
    established.iter().filter(|event| event["isn"].is_null()).count()
}

/// The `lost` events of the daemon, which it emits within a second or two.
fn reported_losses(daemon: &mut TestDaemon) -> Vec<Value> {
    let until = Instant::now() + Duration::from_secs(3);
    daemon.wait_until(until, 1, |event| event["event"] == "lost").unwrap_or_default()
}

/// Makes short connections (churn), then holds connections open, and checks the reports. Returns how many
/// connections the socket table must have shown first, and how many more it may have shown first.
fn run_round(daemon: &mut TestDaemon, method_set: &MethodSet, condition: &Condition) -> [usize; 2] {
    const CHURN: u8 = 1;
    const HOLD: u8 = 2;
    let (net, label) = (condition.net, format!("{} {}", method_set.name(), condition.name));
    let gaps = KernelGaps::record();
    let agent = condition.has_other_agent.then(OtherAgent::start);
    // The other agent's program takes many times as long as a self-connection.
    let each = scaled(if condition.has_other_agent { 100 } else { 300 });
    let (mut threads, _) = run_workers(CHURN, each, false);
    let (hold, sockets) = run_workers(HOLD, HELD_PER_WORKER, true);
    threads.extend(hold);
    drop(agent);
    let (churned, held) = (each * usize::from(WORKERS), sockets.len());
    // Reported live, or by the next snapshot of the socket table if no method saw it.
    daemon.expect(held, is_group_event(HOLD, "established", net));
    drop(sockets);
    daemon.expect(held, is_group_event(HOLD, "closed", net));
    daemon.wait_for_pending_events();
    let received = |matches: &dyn Fn(&Value) -> bool| {
        daemon.received().iter().filter(|event| matches(event)).cloned().collect::<Vec<_>>()
    };
    // A short connection that no method saw cannot be reported by anything.
    let reported = received(&is_group_event(CHURN, "established", net));
    let transitions = received(&is_group_event(CHURN, "state", net)).len();
    daemon.expect(reported.len(), is_group_event(CHURN, "closed", net));
    let established = daemon.expect(held, is_group_event(HOLD, "established", net));
    let found = established_unseen(&established);
    let openers = OpenerCounts::count(reported.iter().chain(&established), &threads);
    // Four transitions each: CLOSE to SYN_SENT, to SYN_RECV, to ESTABLISHED, and by a reset to CLOSE.
    let made = churned * 4;
    // Transitions for which the kernel ran no program.
    let hidden =
        |group: u8, state| gaps.as_ref().map_or(0, |gaps| gaps.count(&format!("127.0.{group}."), state));
    let (hidden, hidden_open) = (hidden(CHURN, ""), hidden(HOLD, "ESTABLISHED"));
    println!(
        "FACT loss.{label}={} lost of {made}, {} of {churned} reported, {found} of {held} found, owners {} right {} wrong \
         {} unknown, {hidden} and {hidden_open} not shown to any program by the kernel",
        made - transitions,
        reported.len(),
        openers.right,
        openers.wrong,
        openers.unknown
    );
    assert_eq!(openers.wrong, 0, "{label}: a wrong opener");
    assert!(transitions <= made && reported.len() <= churned, "{label}: duplicate reports");
    assert_eq!(established.len(), held, "{label}: duplicate reports");
    if method_set.is_lossless(condition) {
        let lost = ((made - transitions).saturating_sub(hidden), found.saturating_sub(hidden_open));
        let counts = (lost, reported.len(), openers.right);
        let expected = ((0, 0), churned, churned + held);
        assert_eq!(counts, expected, "{label}: the daemon reported: {:?}", reported_losses(daemon));
    } else if method_set.is_guarded_pair() {
        // A single transition may be lost now and then, but no connection and no opener, because each
        // connection has several transitions.
        assert_eq!((reported.len(), openers.right), (churned, churned + held), "{label}: lost");
        assert!((made - transitions) * 100 < made, "{label}: lost more than a transition now and then");
    }
    // It cannot be known whether a short connection was found by a snapshot or reported at its end.
    [found, established_unseen(&reported)]
}

#[test]
fn losses_of_a_method_are_found_and_counted_and_a_guarded_pair_loses_nothing() {
    machine::occupy();
    let conditions = Condition::all();
    for method_set in MethodSet::all() {
        let options = ["--states", "--ring-size", "32M", "--reconcile", "1", "--log-rate", "4294967295"];
        let mut daemon = TestDaemon::start(&HookVariant(method_set.options.clone()), &options);
        let hooks = daemon.received()[0]["hooks"].as_array().unwrap();
        let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
        assert_eq!(live, method_set.methods, "{hooks:?}");
        let mut found = 0..=0;
        for condition in &conditions {
            // Connections in the first snapshot existed before the daemon and do not count as missed.
            daemon.expect(1, is_event("established", condition.net.inode));
            let [certain, possible] = thread::scope(|scope| {
                let enter = || {
                    TestNetns::enter_of_process(condition.netns_process.pid());
                    run_round(&mut daemon, &method_set, condition)
                };
                scope.spawn(enter).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            found = found.start() + certain..=found.end() + certain + possible;
        }
        let (events, _) = daemon.stop();
        let is_missed = |event: &&Value| event["event"] == "lost" && event["where"] == "missed";
        let missed = events.iter().filter(is_missed).map(|event| event["count"].as_u64().unwrap());
        let missed = usize::try_from(missed.sum::<u64>()).unwrap();
        assert!(found.contains(&missed), "{}: {missed} were missed, found {found:?}", method_set.name());
        let lost = &events.last().unwrap()["lost"];
        assert_eq!((&lost["missed"], &lost["ring"]), (&missed.into(), &0.into()), "{}", method_set.name());
    }
    for condition in conditions {
        condition.netns_process.finish();
    }
}

/// As many connections as in the worst minute of a busy host, and only the events without `--states`.
fn assert_default_loses_nothing(net: TestNetns, condition: &str) {
    const GROUP: u8 = 1;
    let each = scaled(1_800);
    let made = each * usize::from(WORKERS);
    let mut daemon =
        TestDaemon::start(&HookVariant(vec![]), &["--ring-size", "32M", "--log-rate", "4294967295"]);
    let (threads, _) = run_workers(GROUP, each, false);
    daemon.wait_for_pending_events();
    let (events, _) = daemon.stop();
    let all =
        |kind| events.iter().filter(|event| is_group_event(GROUP, kind, net)(event)).collect::<Vec<_>>();
    let (established, closed) = (all("established"), all("closed"));
    let openers = OpenerCounts::count(established.iter().copied(), &threads);
    let methods = format!("{}: {}", doctor()["would_attach"], events.last().unwrap());
    println!(
        "FACT default.{condition}={} established and {} closed of {made}, owners {} right {} wrong {} unknown",
        established.len(),
        closed.len(),
        openers.right,
        openers.wrong,
        openers.unknown
    );
    assert_eq!((established.len(), closed.len()), (made, made), "{methods}");
    assert_eq!(openers, OpenerCounts { right: made, ..OpenerCounts::default() }, "{methods}");
}

#[test]
fn four_workers_lose_nothing_by_default() {
    assert_default_loses_nothing(TestNetns::enter_new(), "plain");
}

#[test]
fn four_workers_with_rps_lose_nothing_by_default() {
    let net = TestNetns::enter_new();
    net.enable_rps();
    assert_default_loses_nothing(net, "steered");
}
