//! Receive packet steering (RPS): transitions run in softirqs on another CPU, where they interrupt each other
//! and where `current` is an arbitrary task. A transition that one probe misses there must be seen by the
//! other.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use aya::{Ebpf, programs::TracePoint};

use crate::support::{
    client::{assert_opened_by_this_thread, connect_to_self},
    daemon::{HookVariant, TestDaemon, is_event, scaled},
    machine,
    netns::TestNetns,
};

static TEST_PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-test-programs"));

/// Makes 3,000 self-connections with RPS to all CPUs. Each must be reported once, with its opener.
fn assert_each_is_reported_once_under_rps() {
    let net = TestNetns::enter_new();
    net.enable_rps();
    let count = scaled(3_000);
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let mut ports = HashMap::new();
    for _ in 0..count {
        let (socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        *ports.entry(u64::from(port)).or_insert(0) += 1;
    }
    daemon.expect(count, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    let mut reported = HashMap::new();
    for event in events.iter().filter(|event| is_event("established", net.inode)(event)) {
        assert_opened_by_this_thread(event);
        *reported.entry(event["port"].as_u64().unwrap()).or_insert(0) += 1;
    }
    assert_eq!(reported.values().sum::<i32>(), i32::try_from(count).unwrap());
    assert_eq!(reported, ports);
}

#[test]
fn self_connections_under_rps_are_reported_once_with_the_right_opener() {
    assert_each_is_reported_once_under_rps();
}

#[test]
fn a_busy_tracepoint_program_of_another_agent_hides_nothing() {
    machine::occupy();
    let mut agent = Ebpf::load(TEST_PROGRAMS).unwrap();
    let program: &mut TracePoint = agent.program_mut("busy_sys_enter").unwrap().try_into().unwrap();
    selfconn::bpf::tracefs::with(|| {
        program.load().unwrap();
        program.attach("raw_syscalls", "sys_enter").unwrap();
    });
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Two threads keep the program of the other agent running on both CPUs.
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::black_box(rustix::process::getppid());
                }
            });
        }
        let outcome = scope.spawn(assert_each_is_reported_once_under_rps).join();
        is_over.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}
