//! What processes hold, in one pass of the iterator over descriptors: self-connections from before the daemon,
//! in namespaces that no process leads to, and of processes that `/proc/PID/fd` does not show. The holders run
//! as uid 65534. Kernels before v5.11 have no such iterator.

use std::{
    collections::HashSet,
    fs::{self, File},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets, set_capabilities},
};
use selfconn::{
    bpf::{
        descriptors::{self, DescriptorIter},
        features::KernelFeatures,
    },
    sockets::{self, HolderSearch, SnapshotOptions, SocketRef},
    system::process,
};
use selfconn_ebpf::{SocketDescriptor, family, state};
use socket2::Socket;

use super::namespaces::lists_namespaces;
use crate::support::{
    client::{connect_to_self, own_comm, socket},
    daemon::{
        DEADLINE, HookVariant, TestDaemon, is_event, is_kernel_at_least, is_preemptible, reads_descriptors,
        scaled,
    },
    dedicated::is_dedicated_machine,
    helper_process::HelperProcess,
    netns::TestNetns,
    nobody::Nobody,
    privileges::{start_as_user, thread_capabilities},
};

/// The iterator, if this kernel has it.
pub(crate) fn open_descriptor_iter() -> Option<DescriptorIter> {
    let iter = descriptors::open(&KernelFeatures::probe(false).unwrap());
    assert_eq!(iter.is_ok(), reads_descriptors(), "{iter:?}");
    println!("FACT reads_descriptors={}", iter.is_ok());
    iter.ok()
}

/// Where a self-connection is found only by its descriptor, and the name of the process.
const HIDDEN: [(&str, &str); 5] = [
    ("hold in a namespace that only the sockets keep", "only-sockets"),
    ("hold in a namespace that a descriptor keeps", "a-descriptor"),
    ("hold in a namespace that a thread is in", "a-thread"),
    ("hold without a first thread", "no-leader"),
    ("hold in a descriptor table of a thread", "own-table"),
];

#[test]
fn a_self_connection_is_found_with_its_process_wherever_a_descriptor_of_it_is() {
    let _net = TestNetns::enter_new();
    let helpers: Vec<_> = HIDDEN
        .iter()
        .map(|(task, name)| {
            let mut helper = HelperProcess::start(task);
            let netns: u64 = helper.read_output().parse().unwrap();
            (helper, netns, *name)
        })
        .collect();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["-vv", "--reconcile", "1"]);
    if reads_descriptors() {
        for (helper, netns, name) in &helpers {
            let found = daemon.expect(1, is_event("established", *netns)).remove(0);
            assert_eq!((&found["source"], &found["owner"]), (&"scan".into(), &"holder".into()), "{found}");
            assert_eq!((&found["pid"], &found["comm"]), (&helper.pid().into(), &(*name).into()), "{found}");
            assert_eq!(found["holders"].as_array().unwrap().len(), 1, "{found}");
            assert_eq!(found["uid"], 0, "the socket is from before setuid: {found}");
            assert!(found["cookie"].is_u64(), "{found}");
            // Of another thread, if the first one has ended.
            let own = std::env::current_exe().unwrap();
            assert_eq!(found["exe"], own.to_str().unwrap(), "{found}");
            assert_eq!(found["cmdline"][1], "--exact", "{found}");
        }
    }
    // A later pass lists no other socket of these namespaces, and takes none of them for closed.
    daemon.run_until_snapshots(3, || sleep(Duration::from_millis(20)));
    let (events, _) = daemon.stop();
    for (helper, netns, name) in helpers {
        let of_netns = |kind| events.iter().filter(|event| is_event(kind, netns)(event)).count();
        // Without the iterator, the namespace must be entered: the list says that it exists, and something leads to it.
        let is_found = reads_descriptors() || (lists_namespaces() && name != "only-sockets");
        let expected = usize::from(is_found);
        assert_eq!(of_netns("established"), expected, "{name}: {events:?}");
        assert_eq!(of_netns("closed"), 0, "{name}: {events:?}");
        helper.finish();
    }
}

/// A pass holds the file of each descriptor for a moment. If the process closes it in that moment, the kernel closes it
/// in the thread that makes the pass.
#[test]
fn a_pass_can_close_what_a_process_closes_meanwhile() {
    let net = TestNetns::enter_new();
    let Some(iter) = open_descriptor_iter() else { return };
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let count = scaled(3_000);
    let mut client = HelperProcess::start(&format!("connect storm {count}"));
    let pid = client.pid();
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                let _ = iter.pass_of_process(pid, Instant::now() + DEADLINE, |_| {});
            }
        });
        client.read_output();
        is_done.store(true, Ordering::Relaxed);
    });
    let closed = daemon.expect(count, is_event("closed", net.inode));
    let by = |pid: u32| closed.iter().filter(|event| event["closer"]["pid"] == pid).count();
    let (by_client, by_pass) = (by(pid), by(std::process::id()));
    let unseen = closed.iter().filter(|event| event["closer"].is_null()).count();
    println!("FACT closed_by_the_process={by_client} by_the_pass={by_pass} unseen={unseen}");
    assert_eq!(by_client + by_pass + unseen, count);
    assert!(unseen == 0 || is_preemptible("tp_btf"), "{unseen} closes were seen by no program");
    client.finish();
    daemon.stop();
}

/// A pass that closes a socket in the place of its process waits as that would: here for an hour.
#[test]
fn sockets_that_linger_delay_a_pass_for_a_moment_only() {
    /// A pass that is interrupted takes longer than this.
    const INTERRUPTED: Duration = Duration::from_millis(450);
    let _net = TestNetns::enter_new();
    let Some(iter) = open_descriptor_iter() else { return };
    let daemon = TestDaemon::start(&HookVariant(vec![]), &["-vv", "--reconcile", "1"]);
    // The queue of a listener has no room for more.
    let mut client = Nobody::closing_lingering(scaled(4_000));
    let pid = client.pid();
    let is_done = Arc::new(AtomicBool::new(false));
    let (passed, passes) = mpsc::channel();
    let ends = Arc::clone(&is_done);
    // No scope, so that the test ends, too, if a pass does not.
    thread::spawn(move || {
        let mut passes = Vec::new();
        while !ends.load(Ordering::Relaxed) {
            let began = Instant::now();
            let of_process = iter.pass_of_process(pid, began + DEADLINE, |_| {});
            // Before Linux 6.1 only a pass over all can be made.
            of_process.or_else(|_| iter.pass(DEADLINE, |_| {})).unwrap();
            passes.push(began.elapsed());
        }
        passed.send(passes).unwrap();
    });
    client.wait();
    is_done.store(true, Ordering::Relaxed);
    let passes = passes.recv_timeout(DEADLINE).expect("a pass waits for a socket that lingers");
    let interrupted = passes.iter().filter(|took| **took > INTERRUPTED).count();
    println!("FACT passes={} interrupted={interrupted} longest={:?}", passes.len(), passes.iter().max());
    daemon.run_until_snapshots(3, || sleep(Duration::from_millis(20)));
    daemon.stop();
}

/// A socket option of eight bytes. `None`: this kernel does not have it.
fn number_option(socket: &Socket, option: libc::c_int) -> Option<u64> {
    let mut value = 0_u64;
    let mut len = libc::socklen_t::try_from(size_of_val(&value)).unwrap();
    // SAFETY: the kernel writes at most `len` bytes to `value`.
    let outcome = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    (outcome == 0).then_some(value)
}

#[test]
fn a_pass_over_one_process_sees_no_other_and_needs_no_capability() {
    let net = TestNetns::enter_new();
    let Some(iter) = open_descriptor_iter() else { return };
    let mut other = HelperProcess::start("connect");
    let other_port: u16 = other.read_output().parse().unwrap();
    let (_held, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let pass = |pid| {
        let mut seen = Vec::new();
        let until = Instant::now() + DEADLINE;
        let is_ours = |record: &SocketDescriptor| u64::from(record.endpoint.netns) == net.inode;
        iter.pass_of_process(pid, until, |record| {
            seen.extend(is_ours(record).then_some((record.pid, record.endpoint.port)));
        })?;
        println!("FACT seen={seen:?}");
        // 6.1 visits a process with several threads twice.
        seen.dedup();
        Ok::<_, std::io::Error>(seen)
    };
    let passes_of = |pids: [u32; 2]| {
        // Before 5.19, every bpf(2) may need CAP_BPF.
        if is_kernel_at_least((5, 19)) {
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
            set_capabilities(None, sets).unwrap();
        }
        pids.map(pass)
    };
    // The capabilities are a thread's.
    let passes_of = |pids| thread::scope(|scope| scope.spawn(|| passes_of(pids)).join().unwrap());
    let (own, pid) = (std::process::id(), other.pid());
    let [of_own, of_other] = passes_of([own, pid]);
    if is_kernel_at_least((6, 1)) {
        assert_eq!((of_own.unwrap(), of_other.unwrap()), (vec![(own, port)], vec![(pid, other_port)]));
        other.finish();
        let [of_own, of_nobody] = passes_of([own, pid]);
        assert_eq!((of_own.unwrap(), of_nobody.unwrap()), (vec![(own, port)], vec![]));
    } else {
        assert_eq!(of_own.unwrap_err().raw_os_error(), Some(libc::E2BIG));
    }
}

#[test]
fn a_record_says_what_the_process_itself_sees() {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let net = TestNetns::enter_new();
    let Some(iter) = open_descriptor_iter() else { return };
    let (plain, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let again = plain.try_clone().unwrap();
    let bound = socket(Ipv6Addr::LOCALHOST.into());
    bound.bind_device(Some(b"lo")).unwrap();
    bound.bind(&SocketAddr::from((Ipv6Addr::LOCALHOST, 0)).into()).unwrap();
    bound.connect(&bound.local_addr().unwrap()).unwrap();
    let mut records = Vec::new();
    iter.pass(DEADLINE, |record| {
        records.extend((u64::from(record.endpoint.netns) == net.inode).then_some(*record));
    })
    .unwrap();
    assert_eq!(records.len(), 3, "{records:?}");
    let record = |socket: &Socket| {
        *records.iter().find(|record| record.fd == socket.as_raw_fd().cast_unsigned()).unwrap()
    };
    for (socket, is_ipv6, ifindex) in [(&plain, false, 0), (&again, false, 0), (&bound, true, 1)] {
        let record = record(socket);
        // By the pass, or by this request: it is made once.
        assert_eq!(number_option(socket, libc::SO_COOKIE), Some(record.cookie));
        if let Some(cookie) = number_option(socket, SO_NETNS_COOKIE) {
            assert_eq!(record.endpoint.netns_cookie, cookie);
        }
        assert_eq!(record.inode, rustix::fs::fstat(socket).unwrap().st_ino);
        assert_eq!(
            (record.endpoint.family == u16::from(family::INET6), record.endpoint.ifindex),
            (is_ipv6, ifindex)
        );
        assert_eq!((record.endpoint.port, record.state), (record.destination_port, state::ESTABLISHED));
        // This thread shares its descriptors with the first one.
        assert_eq!((record.pid, record.tid), (std::process::id(), std::process::id()));
        assert_eq!(record.uid, 0);
        assert_eq!(String::from_utf8_lossy(&record.comm).trim_end_matches('\0'), own_comm());
        // /proc rounds down to a tick.
        let started_ns = process::start_time_ns(record.pid).unwrap();
        assert!((started_ns..started_ns + 10_000_000).contains(&record.start_ns), "{record:?}");
    }
    assert_eq!(record(&plain).endpoint.port, port);
    assert_eq!(record(&plain).sock, record(&again).sock);
    assert_ne!(record(&plain).sock, record(&bound).sock);
    assert_ne!(record(&plain).cookie, record(&bound).cookie);
}

#[test]
fn a_snapshot_by_descriptors_and_one_by_tables_list_the_same() {
    let net = TestNetns::enter_new();
    let Some(iter) = open_descriptor_iter() else { return };
    let netns = u32::try_from(net.inode).unwrap();
    let (_held, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let (_v6, v6_port) = connect_to_self(Ipv6Addr::LOCALHOST.into());
    // Its addresses are equal, its ports are not.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    // A socket without a descriptor.
    let (closed, closed_port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    drop(closed);
    let list = |descriptors| {
        let holders = Some(HolderSearch::Complete);
        let options = SnapshotOptions { holders, descriptors, ..SnapshotOptions::default() };
        let snapshot = sockets::snapshot(options, &[]).unwrap();
        let mut own: Vec<_> = snapshot
            .entries
            .iter()
            .filter(|entry| entry.endpoint.netns == netns)
            .map(|entry| {
                let holders = snapshot.holders_of(entry.socket_ref()).map(<[_]>::to_vec);
                // The time left differs.
                (entry.endpoint, entry.state, entry.cookie, entry.inode, entry.uid, holders)
            })
            .collect();
        own.sort_unstable_by_key(|(endpoint, ..)| endpoint.port);
        own
    };
    let by_tables = list(None);
    assert_eq!(list(Some(&iter)), by_tables);
    let ports: HashSet<u16> = by_tables.iter().map(|(endpoint, ..)| endpoint.port).collect();
    assert_eq!(ports, HashSet::from([port, v6_port, closed_port]));
}

#[test]
fn a_pass_over_many_descriptors_is_faster_than_a_walk_of_proc() {
    let net = TestNetns::enter_new();
    let Some(iter) = open_descriptor_iter() else { return };
    // Where the limit is lower, as many as it allows.
    let before = getrlimit(Resource::Nofile);
    let limit = before.maximum.unwrap_or(u64::MAX);
    let count = scaled(100_000).min(usize::try_from(limit - 1_000).unwrap());
    setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum }).unwrap();
    let (held, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let null = File::open("/dev/null").unwrap();
    let many: Vec<File> = (0..count).map(|_| null.try_clone().unwrap()).collect();
    let mut records = Vec::new();
    let mut by_iterator: Vec<_> = (0..5)
        .map(|_| {
            records.clear();
            let began = Instant::now();
            iter.pass(DEADLINE, |record| records.push(*record)).unwrap();
            began.elapsed()
        })
        .collect();
    let own = records.iter().find(|record| u64::from(record.endpoint.netns) == net.inode).unwrap();
    assert_eq!(
        (own.endpoint.port, own.pid, own.fd),
        (port, std::process::id(), held.as_raw_fd().cast_unsigned())
    );
    let inodes = HashSet::from([own.inode]);
    let mut by_proc: Vec<_> = (0..3)
        .map(|_| {
            let began = Instant::now();
            let holders = sockets::find_holders(&inodes, HolderSearch::Complete, usize::MAX);
            assert!(holders.of(&SocketRef::of_inode(own.inode)).is_some());
            began.elapsed()
        })
        .collect();
    drop(many);
    setrlimit(Resource::Nofile, before).unwrap();
    by_iterator.sort_unstable();
    by_proc.sort_unstable();
    println!("FACT descriptors={count} iterator={:?} proc={:?}", by_iterator[2], by_proc[1]);
    assert!(by_iterator[2] < by_proc[1], "{by_iterator:?} {by_proc:?}");
}

#[test]
fn a_pass_over_descriptors_needs_no_capability() {
    pass_without_capabilities("as_it_is");
    // 1 can't be taken back, so it is last, and only in a machine that is made for such tests.
    if !is_dedicated_machine() {
        return;
    }
    for setting in ["0", "2", "1"] {
        if fs::write("/proc/sys/kernel/unprivileged_bpf_disabled", setting).is_ok() {
            pass_without_capabilities(setting);
        }
    }
}

fn pass_without_capabilities(setting: &str) {
    let _net = TestNetns::enter_new();
    let mut holder = HelperProcess::start("hold in a namespace that only the sockets keep");
    let netns: u64 = holder.read_output().parse().unwrap();
    let (mut daemon, _dir) = start_as_user(
        CapabilitySet::BPF | CapabilitySet::PERFMON,
        &["--hooks", "tracepoint", "--tracepoint-method", "tp_btf", "--reconcile", "1", "-vv"],
    );
    if reads_descriptors() {
        // By a thread that has dropped everything, except where the kernel wants CAP_BPF for every bpf(2).
        let found = daemon.expect(1, is_event("established", netns)).remove(0);
        assert_eq!((&found["source"], &found["pid"]), (&"scan".into(), &holder.pid().into()), "{found}");
        assert_eq!(found["comm"], "only-sockets", "{found}");
        let threads = thread_capabilities(daemon.pid());
        let reader = threads.iter().find(|thread| thread.name == "reader").unwrap();
        let has = reader.permitted | reader.effective;
        println!("FACT pass_needs_{setting}={has:?}");
        // Before 5.19, every bpf(2) needs it unless the setting is 0.
        let needs_none = setting == "0" || is_kernel_at_least((5, 19));
        let may_keep = if needs_none { CapabilitySet::empty() } else { CapabilitySet::BPF };
        assert!(may_keep.contains(has), "{setting}: {reader:?}");
        // The next pass, too.
        daemon.run_until_snapshots(2, || sleep(Duration::from_millis(20)));
    }
    let (events, stderr) = daemon.stop();
    assert!(!stderr.contains("the iterator over descriptors"), "{stderr}");
    let count = events.iter().filter(|event| is_event("established", netns)(event)).count();
    assert_eq!(count, usize::from(reads_descriptors()), "the ordinary connection is none: {events:?}");
    holder.finish();
}
