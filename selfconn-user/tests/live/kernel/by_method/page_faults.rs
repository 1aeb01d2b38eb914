//! No program takes a page fault, by any method: the kernel fixes it up, and may wait for the process in which the
//! program runs (docs/internals.md, "What a transition calls for").

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use selfconn::bpf::tracefs::{self, Tracefs};
use serde_json::Value;

use crate::support::{
    client::run_self_connection,
    daemon::{TestDaemon, lossless_variants},
    netns::TestNetns,
    nobody::Nobody,
};

/// True for `closed` of a connection that this process opened. Without BTF the namespace is unknown, so it is not
/// compared.
fn is_end_of(pid: u32) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == "closed" && event["pid"] == pid
}

/// Counts the reads of BPF programs that faulted, by a kprobe of ftrace on the kernel's handler for them, until it is
/// dropped.
struct FaultedReads {
    name: String,
}

/// The handler on x86-64 and arm64, and its earlier name on arm64 (arch/arm64/mm/extable.c at v5.10).
const HANDLERS: [&str; 2] = ["ex_handler_bpf", "arm64_bpf_fixup_exception"];

/// Runs `work` where tracefs is. `None`: the kernel has none.
fn in_tracefs<T: Send>(work: impl FnOnce(&Path) -> T + Send) -> Option<T> {
    tracefs::with(|| match tracefs::find() {
        Tracefs::At(at) => Some(work(Path::new(at))),
        Tracefs::Denied | Tracefs::NotMounted | Tracefs::Empty | Tracefs::Absent => None,
    })
}

fn write_event(tracing: &Path, event: &str) -> io::Result<()> {
    OpenOptions::new().append(true).open(tracing.join("kprobe_events"))?.write_all(event.as_bytes())
}

impl FaultedReads {
    /// `None`: the kernel has no kprobes, or no such handler.
    fn count() -> Option<Self> {
        let name = format!("selfconn_{}", std::process::id());
        in_tracefs(|tracing| {
            let is_set = |handler| write_event(tracing, &format!("p:{name} {handler}\n")).is_ok();
            HANDLERS.into_iter().any(is_set).then(|| fs::write(enable(tracing, &name), "1").unwrap())
        })??;
        Some(Self { name })
    }

    /// The number so far, with those within another kprobe, which count as misses.
    fn hits(&self) -> u64 {
        let profile = in_tracefs(|at| fs::read_to_string(at.join("kprobe_profile")).unwrap()).unwrap();
        let of_this = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [name, hits, misses] if name == self.name => {
                Some(hits.parse::<u64>().unwrap() + misses.parse::<u64>().unwrap())
            }
            _ => None,
        };
        profile.lines().find_map(of_this).unwrap()
    }
}

fn enable(tracing: &Path, name: &str) -> PathBuf {
    tracing.join("events/kprobes").join(name).join("enable")
}

impl Drop for FaultedReads {
    fn drop(&mut self) {
        in_tracefs(|tracing| {
            fs::write(enable(tracing, &self.name), "0").unwrap();
            write_event(tracing, &format!("-:{}\n", self.name)).unwrap();
        });
    }
}

#[test]
fn no_program_reads_through_a_null_pointer() {
    let Some(faulted) = FaultedReads::count() else {
        println!("skipped: the reads that fault can't be counted on this kernel");
        return;
    };
    let _net = TestNetns::enter_new();
    for variant in lossless_variants() {
        let mut daemon = TestDaemon::start(&variant, &[]);
        // The program closes its socket, which loses its file before it enters CLOSE.
        for _ in 0..20 {
            let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
            // Its TIME_WAIT has the port.
            assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err());
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let closed = listener.local_addr().unwrap();
            drop(listener);
            assert!(TcpStream::connect(closed).is_err());
        }
        daemon.expect(20, is_end_of(std::process::id()));
        assert_eq!(faulted.hits(), 0, "{variant:?}");
    }
}

/// A program that reads through a null pointer takes a page fault, and where the kernel doesn't count preemption, its
/// handler waits for the lock of the process in which the program runs. While it waits, that CPU runs the program for
/// nobody.
#[test]
fn a_process_that_closes_its_socket_while_its_memory_map_is_locked_blinds_no_probe() {
    let _net = TestNetns::enter_new();
    for variant in lossless_variants() {
        let mut daemon = TestDaemon::start(&variant, &[]);
        let Some(mut hung) = Nobody::hung_closing() else { return };
        hung.wait();
        daemon.expect(1, is_end_of(hung.pid()));
        let allowed = sched_getaffinity(None).unwrap();
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        thread::scope(|scope| {
            for cpu in &cpus {
                scope.spawn(|| {
                    let mut only = CpuSet::new();
                    only.set(*cpu);
                    sched_setaffinity(None, &only).unwrap();
                    run_self_connection(Ipv4Addr::LOCALHOST.into());
                });
            }
        });
        daemon.expect(cpus.len(), is_end_of(std::process::id()));
        daemon.stop();
    }
}
