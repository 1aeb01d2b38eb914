//! Failed binds for which the kernel runs no program, because another task was preempted within a call of bpf() on that
//! CPU. The kernel counts them, and the daemon reports the count.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use crate::support::{
    bind_methods::{bind_methods, start},
    client::{connect_to_self, socket},
    daemon::{is_kernel_at_least, is_real_time},
    netns::TestNetns,
    preempted_calls::preempting_calls_of_bpf,
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Number of failed binds. The programs report at most fifty of a user in a second.
const FAILURES: usize = 100;
const FAILURE_INTERVAL: Duration = Duration::from_millis(25);

#[test]
fn a_failed_bind_that_the_kernel_runs_no_program_for_is_counted() {
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        let daemon = start(method, &[]);
        let held: Vec<_> = (0..FAILURES).map(|_| connect_to_self(LOCALHOST)).collect();
        let ((), is_real_time_thread) = preempting_calls_of_bpf(|| {
            for (_, port) in &held {
                thread::sleep(FAILURE_INTERVAL);
                let error = socket(LOCALHOST).bind(&SocketAddr::new(LOCALHOST, *port).into()).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            }
        });

        let (events, _) = daemon.stop();
        let is_blocked =
            |event: &&serde_json::Value| event["event"] == "blocked" && event["netns"] == net.inode;
        let blocked: BTreeSet<u64> =
            events.iter().filter(is_blocked).filter_map(|event| event["port"].as_u64()).collect();
        let missing = held.iter().filter(|(_, port)| !blocked.contains(&u64::from(*port))).count();
        let counted = events.last().unwrap()["binds_not_examined"].as_u64();
        println!(
            "FACT bind_preemption method={method} real_time_thread={is_real_time_thread} \
             missing={missing} counted={counted:?} lost={}",
            events.last().unwrap()["lost"]["binds"]
        );
        assert_eq!(counted.is_some(), is_kernel_at_least((5, 12)));
        let is_counted = method != "perf" || is_kernel_at_least((6, 7));
        if is_counted {
            assert!(
                missing as u64 <= counted.unwrap_or(0),
                "{method}: {missing} missing, {counted:?} counted"
            );
        }
        // From 7.2 on a call of bpf() keeps no program of a system call from running (`trace_call_bpf_faultable`,
        // kernel/trace/bpf_trace.c). 7.0 and 7.1 were not tried.
        if is_counted && is_real_time() && method == "perf" && !is_kernel_at_least((7, 0)) {
            assert!(missing > 0, "{method}: no bind was begun within a call of bpf()");
        }
    }
}
