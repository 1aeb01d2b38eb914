//! Receive packet steering: transitions run in softirqs on another CPU, where they interrupt each other, and where
//! `current` is anybody. What one witness loses there, the other must have.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use aya::{Ebpf, programs::TracePoint};

use crate::{
    client::{assert_opened_here, connect_to_self},
    daemon::{Daemon, Variant, of, scaled},
    net::Net,
    pool,
};

static OTHERS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-others"));

/// 3,000 self-connections with packets of `lo` steered to both CPUs; each must be told once, with its opener.
fn every_one_is_told_once() {
    pool::dismiss();
    let net = Net::private();
    net.steer();
    let count = scaled(3_000);
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    let mut ports = HashMap::new();
    for _ in 0..count {
        let (socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        *ports.entry(u64::from(port)).or_insert(0) += 1;
    }
    daemon.expect(count, of("closed", net.inode));
    let (events, _) = daemon.stop();
    let mut told = HashMap::new();
    for event in events.iter().filter(|event| of("established", net.inode)(event)) {
        assert_opened_here(event);
        *told.entry(event["port"].as_u64().unwrap()).or_insert(0) += 1;
    }
    assert_eq!(told.values().sum::<i32>(), i32::try_from(count).unwrap());
    assert_eq!(told, ports);
}

#[test]
fn steered_self_connections_are_told_once_with_the_right_opener() {
    every_one_is_told_once();
}

#[test]
fn another_agents_busy_tracepoint_program_hides_nothing() {
    let mut other = Ebpf::load(OTHERS).unwrap();
    let program: &mut TracePoint = other.program_mut("other_busy").unwrap().try_into().unwrap();
    selfconn::kernel::tracefs::with(|| {
        program.load().unwrap();
        program.attach("raw_syscalls", "sys_enter").unwrap();
    });
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Two clients of the other agent, which keep its program running on both CPUs.
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::black_box(rustix::process::getppid());
                }
            });
        }
        let outcome = scope.spawn(every_one_is_told_once).join();
        is_over.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}
