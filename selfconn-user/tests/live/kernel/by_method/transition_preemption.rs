//! Self-connections made while another task is preempted within a call of `bpf()` on that CPU: `perf` and `kprobe` see
//! nothing of them, and the pair that the daemon attaches by default sees all.

use std::{net::Ipv4Addr, thread, time::Duration};

use serde_json::Value;

use crate::support::{
    client::connect_to_self,
    daemon::{TestDaemon, hook_variants, is_event, is_real_time},
    netns::TestNetns,
    preempted_calls::preempting_calls_of_bpf,
};

const CONNECTIONS: usize = 50;
const INTERVAL: Duration = Duration::from_millis(20);

#[test]
fn self_connections_beside_a_preempted_call_of_bpf_are_all_reported_by_default() {
    let net = TestNetns::enter_new();
    for variant in hook_variants() {
        let mut daemon = TestDaemon::shared(&variant, &[]);
        let ((), is_real_time_thread) = preempting_calls_of_bpf(|| {
            for _ in 0..CONNECTIONS {
                thread::sleep(INTERVAL);
                let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
        });
        daemon.wait_for_pending_events();
        let count = |kind, is_complete: fn(&Value) -> bool| {
            let events = daemon.received().iter().filter(|event| is_event(kind, net.inode)(event));
            events.filter(|event| is_complete(event)).count()
        };
        let opened = count("established", |event| !event["isn"].is_null() && event["owner"] == "witnessed");
        let closed = count("closed", |event| !event["pid"].is_null());
        let method = variant.method();
        println!(
            "FACT transition_preemption method={method} real_time_thread={is_real_time_thread} \
             opened={opened} closed={closed} of {CONNECTIONS}"
        );
        if variant.is_lossless() && !variant.may_lose_both() {
            assert_eq!((opened, closed), (CONNECTIONS, CONNECTIONS), "{variant:?}: {:#?}", daemon.received());
        }
        // Otherwise this shows nothing.
        if method == "perf" && is_real_time() {
            assert!(opened < CONNECTIONS, "no self-connection was made within a call of bpf()");
        }
    }
}
