//! No program takes a page fault, by any method: the kernel mends it, and may wait for the process in which the program
//! runs (docs/internals.md, "What a transition calls for").

use std::{
    fs::OpenOptions,
    io::Write as _,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    thread,
};

use rustix::thread::{CpuSet, sched_setaffinity};
use selfconn::bpf::tracefs::{self, Tracefs};
use serde_json::Value;

use crate::support::{
    client::run_self_connection,
    daemon::{TestDaemon, hook_variants},
    netns::TestNetns,
    nobody::Nobody,
};

/// True of the end of a connection of this process. Without BTF, the namespace is unknown.
fn is_end_of(pid: u32) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == "closed" && event["pid"] == pid
}

/// Counts the reads of BPF programs that faulted, by a kprobe of ftrace on the kernel's handler for them, until it is
/// dropped.
struct FaultedReads {
    name: String,
    tracing: PathBuf,
}

impl FaultedReads {
    /// `None`: the kernel has no kprobes, or no such handler.
    fn count() -> Option<Self> {
        let Tracefs::At(tracing) = tracefs::find() else { return None };
        let tracing = PathBuf::from(tracing);
        let name = format!("selfconn_{}", std::process::id());
        let mut events = OpenOptions::new().append(true).open(tracing.join("kprobe_events")).ok()?;
        events.write_all(format!("p:{name} ex_handler_bpf\n").as_bytes()).ok()?;
        let counter = Self { name, tracing };
        counter.enable("1");
        Some(counter)
    }

    fn enable(&self, value: &str) {
        std::fs::write(self.tracing.join("events/kprobes").join(&self.name).join("enable"), value).unwrap();
    }

    /// The number so far.
    fn hits(&self) -> u64 {
        let profile = std::fs::read_to_string(self.tracing.join("kprobe_profile")).unwrap();
        let of_this =
            |line: &str| Some(line.trim().strip_prefix(&self.name)?.split_whitespace().next()?.parse());
        profile.lines().find_map(of_this).unwrap().unwrap()
    }
}

impl Drop for FaultedReads {
    fn drop(&mut self) {
        self.enable("0");
        let mut events = OpenOptions::new().append(true).open(self.tracing.join("kprobe_events")).unwrap();
        events.write_all(format!("-:{}\n", self.name).as_bytes()).unwrap();
    }
}

#[test]
fn no_program_reads_through_a_null_pointer() {
    let Some(faulted) = FaultedReads::count() else {
        println!("skipped: the reads that fault can't be counted on this kernel");
        return;
    };
    let _net = TestNetns::enter_new();
    for variant in hook_variants() {
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
/// handler waits for the lock of the process in which the program runs. While it waits, that CPU runs the program no
/// more, whoever connects.
#[test]
fn a_process_that_closes_its_socket_while_its_memory_map_is_locked_blinds_no_probe() {
    let _net = TestNetns::enter_new();
    for variant in hook_variants() {
        let mut daemon = TestDaemon::start(&variant, &[]);
        let Some(mut hung) = Nobody::hung_closing() else { return };
        hung.wait();
        daemon.expect(1, is_end_of(hung.pid()));
        let cpus = thread::available_parallelism().unwrap().get();
        thread::scope(|scope| {
            for cpu in 0..cpus {
                scope.spawn(move || {
                    let mut set = CpuSet::new();
                    set.set(cpu);
                    sched_setaffinity(None, &set).unwrap();
                    run_self_connection(Ipv4Addr::LOCALHOST.into());
                });
            }
        });
        daemon.expect(cpus, is_end_of(std::process::id()));
        daemon.stop();
    }
}
