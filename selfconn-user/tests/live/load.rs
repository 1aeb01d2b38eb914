//! Many at once: self-connections that four workers make as fast as they can, by each method and each pair of methods,
//! under what makes a kernel lose transitions. What is lost is told as a fact of this kernel and must be found by the
//! socket table; the default and every other pair that can't be stopped together lose nothing; and nothing may ever
//! name a wrong opener.

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

use crate::{
    client::connect_to_self,
    daemon::{Daemon, Variant, doctor, forced, is_preemptible, of, scaled, verdicts},
    net::Net,
    pool,
    role::Role,
    withheld::Withheld,
};

const WORKERS: u8 = 4;

/// How many each worker holds open at once: few enough for the table's readings to stay cheap.
const HELD: usize = 100;

static OTHERS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-others"));

/// The threads that dialled, by the address that each has dialled.
type Diallers = HashMap<String, i64>;

/// Each worker dials a loopback address of its own, by which its self-connections are told from the others'.
fn work(group: u8, each: usize, keep: bool) -> (Diallers, Vec<Socket>) {
    let worker = |number: u8| {
        move || {
            let own = Ipv4Addr::new(127, 0, group, number);
            let connect = || {
                let (socket, _) = connect_to_self(own.into());
                // No TIME_WAIT, which would use up the ports.
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                keep.then_some(socket)
            };
            let sockets: Vec<Socket> = (0..each).filter_map(|_| connect()).collect();
            let tid = i64::from(rustix::thread::gettid().as_raw_nonzero().get());
            ((own.to_string(), tid), sockets)
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (1..=WORKERS).map(|number| scope.spawn(worker(number))).collect();
        let done = workers.into_iter().map(|worker| worker.join().unwrap());
        let (diallers, sockets): (Diallers, Vec<_>) = done.unzip();
        (diallers, sockets.into_iter().flatten().collect())
    })
}

/// Events of one kind about what a group of workers did.
fn by(group: u8, kind: &'static str, net: Net) -> impl Fn(&Value) -> bool {
    let prefix = format!("127.0.{group}.");
    move |event| {
        of(kind, net.inode)(event) && event["addr"].as_str().is_some_and(|addr| addr.starts_with(&prefix))
    }
}

/// Openers that were named rightly, wrongly and not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owners {
    right: usize,
    wrong: usize,
    unknown: usize,
}

impl Owners {
    fn count<'a>(established: impl Iterator<Item = &'a Value>, diallers: &Diallers) -> Self {
        let mut owners = Self::default();
        for event in established {
            let right = diallers.get(event["addr"].as_str().unwrap()).copied();
            let is_us = event["pid"].is_null() || event["pid"] == std::process::id();
            match event["tid"].as_i64() {
                None if is_us => owners.unknown += 1,
                tid if is_us && tid == right => owners.right += 1,
                _ => owners.wrong += 1,
            }
        }
        owners
    }
}

/// Whether there is more than one CPU to steer packets to.
fn has_cpus() -> bool {
    thread::available_parallelism().unwrap().get() > 1
}

/// What makes a kernel lose transitions.
struct Condition {
    name: &'static str,
    net: Net,
    /// Has a self-connection from before any daemon, so that a daemon's first reading of the table can be waited for.
    inhabitant: Role,
    /// Whether another agent's programs run on every system call.
    is_beside: bool,
}

impl Condition {
    /// A namespace, prepared on a thread of its own; none where this kernel or machine can't have it.
    fn new(name: &'static str, is_beside: bool, prepare: fn(Net) -> bool) -> Option<Self> {
        let make = move || {
            let net = Net::private();
            prepare(net).then(|| {
                let mut inhabitant = Role::start("connect");
                inhabitant.says();
                Self { name, net, inhabitant, is_beside }
            })
        };
        thread::spawn(make).join().unwrap()
    }

    /// Whether transitions run in softirqs, which interrupt programs.
    fn is_interrupted(&self) -> bool {
        self.name != "plain" && (self.name == "delayed" || has_cpus())
    }

    fn all() -> Vec<Self> {
        let steered = |net: Net| {
            if has_cpus() {
                net.steer();
            }
            has_cpus()
        };
        let delayed = |net: Net| match net.delay() {
            Ok(()) => true,
            Err(error) => {
                assert!(std::env::var_os("SELFCONN_KERNEL").is_none(), "netem: {error}");
                println!("this kernel has no netem: {error}");
                false
            }
        };
        let beside = |net: Net| {
            if has_cpus() {
                net.steer();
            }
            true
        };
        let all = [
            Self::new("plain", false, |_| true),
            Self::new("steered", false, steered),
            Self::new("delayed", false, delayed),
            Self::new("beside", true, beside),
        ];
        all.into_iter().flatten().collect()
    }
}

/// Another agent: a busy program on every system call, and clients that keep it busy on two CPUs.
struct Other {
    is_over: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<()>>,
    _programs: Ebpf,
}

impl Other {
    fn start() -> Self {
        let mut programs = Ebpf::load(OTHERS).unwrap();
        let program: &mut TracePoint = programs.program_mut("other_busy").unwrap().try_into().unwrap();
        selfconn::kernel::tracefs::with(|| {
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

impl Drop for Other {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

/// Methods that run together, and the options that bring that about.
struct Mode {
    methods: Vec<&'static str>,
    options: Vec<&'static str>,
}

impl Mode {
    /// Each method alone and each two together, as far as this kernel has them.
    fn all() -> Vec<Self> {
        let has: Vec<_> =
            verdicts().into_iter().filter(|method| method.1 == "ok").map(|method| method.0).collect();
        let alone = has.iter().map(|method| Self { methods: vec![*method], options: forced(method) });
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

    /// Whether one of two witnesses has its guard for itself and the other can't be preempted.
    fn is_pair_of_guards(&self) -> bool {
        let share = |method: &&&str| ["perf", "kprobe"].contains(*method);
        self.methods.len() == 2 && self.methods.iter().filter(share).count() == 1
    }

    /// Whether no transition may be lost. One method that can't be preempted is stopped by an interrupt only, of its own
    /// program or of another agent's with the same guard; of a pair of guards something always sees, unless the one is
    /// preempted and the other interrupted at that moment.
    fn is_lossless(&self, condition: &Condition) -> bool {
        match self.methods.as_slice() {
            ["perf" | "kprobe"] => !condition.is_interrupted() && !condition.is_beside,
            methods => {
                let may_be_both = condition.is_interrupted() && methods.iter().any(|one| is_preemptible(one));
                self.is_pair_of_guards() && !may_be_both
            }
        }
    }
}

/// How many of these became ESTABLISHED unseen: both sequence numbers are known at that step only.
fn unseen(established: &[Value]) -> usize {
    established.iter().filter(|event| event["isn"].is_null()).count()
}

/// What the daemon says that it lost, which it does within a second or two.
fn losses_told(daemon: &mut Daemon) -> Vec<Value> {
    let until = Instant::now() + Duration::from_secs(3);
    daemon.wait_until(until, 1, |event| event["event"] == "lost").unwrap_or_default()
}

/// Churns, then holds, and checks what came of it. How many the socket table must have found, and how many it may have
/// found beside those.
fn round(daemon: &mut Daemon, mode: &Mode, condition: &Condition) -> [usize; 2] {
    const CHURN: u8 = 1;
    const HOLD: u8 = 2;
    let (net, what) = (condition.net, format!("{} {}", mode.name(), condition.name));
    let withheld = Withheld::watch();
    let other = condition.is_beside.then(Other::start);
    // The other agent's program takes many times what a self-connection does.
    let each = scaled(if condition.is_beside { 100 } else { 300 });
    let (mut diallers, _) = work(CHURN, each, false);
    let (hold, sockets) = work(HOLD, HELD, true);
    diallers.extend(hold);
    drop(other);
    let (churned, held) = (each * usize::from(WORKERS), sockets.len());
    // Live, or where no method saw it, by the next reading of the table.
    daemon.expect(held, by(HOLD, "established", net));
    drop(sockets);
    daemon.expect(held, by(HOLD, "closed", net));
    daemon.settle();
    let seen = |wanted: &dyn Fn(&Value) -> bool| {
        daemon.seen().iter().filter(|event| wanted(event)).cloned().collect::<Vec<_>>()
    };
    // Short lives: what no method saw of them, nobody can tell.
    let told = seen(&by(CHURN, "established", net));
    let transitions = seen(&by(CHURN, "state", net)).len();
    daemon.expect(told.len(), by(CHURN, "closed", net));
    let established = daemon.expect(held, by(HOLD, "established", net));
    let found = unseen(&established);
    let owners = Owners::count(told.iter().chain(&established), &diallers);
    // CLOSE to SYN_SENT, to SYN_RECV, to ESTABLISHED, and by a reset to CLOSE.
    let made = churned * 4;
    // What the kernel kept from every program.
    let kept = |group: u8, state| {
        withheld.as_ref().map_or(0, |withheld| withheld.count(&format!("127.0.{group}."), state))
    };
    let (kept, kept_open) = (kept(CHURN, ""), kept(HOLD, "ESTABLISHED"));
    println!(
        "FACT loss.{what}={} lost of {made}, {} of {churned} told, {found} of {held} found, owners {} right {} wrong \
         {} unknown, {kept} and {kept_open} withheld by the kernel",
        made - transitions,
        told.len(),
        owners.right,
        owners.wrong,
        owners.unknown
    );
    assert_eq!(owners.wrong, 0, "{what}: a wrong opener");
    assert!(transitions <= made && told.len() <= churned, "{what}: told twice");
    assert_eq!(established.len(), held, "{what}: told twice");
    if mode.is_lossless(condition) {
        let unseen = ((made - transitions).saturating_sub(kept), found.saturating_sub(kept_open));
        let came = (unseen, told.len(), owners.right);
        let nothing = ((0, 0), churned, churned + held);
        assert_eq!(came, nothing, "{what}: the daemon says: {:?}", losses_told(daemon));
    } else if mode.is_pair_of_guards() {
        // A transition now and then, but no connection and no opener: each has more than one.
        assert_eq!((told.len(), owners.right), (churned, churned + held), "{what}: lost");
        assert!((made - transitions) * 100 < made, "{what}: lost more than a transition now and then");
    }
    // Whether a short life was found by a reading or told at its end can't be known.
    [found, unseen(&told)]
}

#[test]
fn what_a_method_loses_is_found_and_counted_and_a_pair_of_guards_loses_nothing() {
    pool::dismiss();
    let conditions = Condition::all();
    for mode in Mode::all() {
        let options = ["--states", "--ring-size", "32M", "--reconcile", "1"];
        let mut daemon = Daemon::start(&Variant(mode.options.clone()), &options);
        let hooks = daemon.seen()[0]["hooks"].as_array().unwrap();
        let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
        assert_eq!(live, mode.methods, "{hooks:?}");
        let mut found = 0..=0;
        for condition in &conditions {
            // What the first reading finds was there before and is not missed.
            daemon.expect(1, of("established", condition.net.inode));
            let [surely, perhaps] = thread::scope(|scope| {
                let enter = || {
                    Net::of_process(condition.inhabitant.pid());
                    round(&mut daemon, &mode, condition)
                };
                scope.spawn(enter).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            found = found.start() + surely..=found.end() + surely + perhaps;
        }
        let (events, _) = daemon.stop();
        let is_missed = |event: &&Value| event["event"] == "lost" && event["where"] == "missed";
        let missed = events.iter().filter(is_missed).map(|event| event["count"].as_u64().unwrap());
        let missed = usize::try_from(missed.sum::<u64>()).unwrap();
        assert!(found.contains(&missed), "{}: {missed} were missed, found {found:?}", mode.name());
        let lost = &events.last().unwrap()["lost"];
        assert_eq!((&lost["missed"], &lost["ring"]), (&missed.into(), &0.into()), "{}", mode.name());
    }
    for condition in conditions {
        condition.inhabitant.end();
    }
}

/// As many as a busy host's worst minute has, and only what is told without `--states`.
fn the_default_loses_nothing(net: Net, condition: &str) {
    const GROUP: u8 = 1;
    pool::dismiss();
    let each = scaled(1_800);
    let made = each * usize::from(WORKERS);
    let mut daemon = Daemon::start(&Variant(vec![]), &["--ring-size", "32M"]);
    let (diallers, _) = work(GROUP, each, false);
    daemon.settle();
    let (events, _) = daemon.stop();
    let all = |kind| events.iter().filter(|event| by(GROUP, kind, net)(event)).collect::<Vec<_>>();
    let (established, closed) = (all("established"), all("closed"));
    let owners = Owners::count(established.iter().copied(), &diallers);
    let methods = format!("{}: {}", doctor()["would_attach"], events.last().unwrap());
    println!(
        "FACT default.{condition}={} established and {} closed of {made}, owners {} right {} wrong {} unknown",
        established.len(),
        closed.len(),
        owners.right,
        owners.wrong,
        owners.unknown
    );
    assert_eq!((established.len(), closed.len()), (made, made), "{methods}");
    assert_eq!(owners, Owners { right: made, ..Owners::default() }, "{methods}");
}

#[test]
fn four_workers_lose_nothing_by_default() {
    the_default_loses_nothing(Net::private(), "plain");
}

#[test]
fn four_workers_with_packet_steering_lose_nothing_by_default() {
    let net = Net::private();
    net.steer();
    the_default_loses_nothing(net, "steered");
}
