//! The port range of a namespace decides which connects are stored: only those whose destination port `connect()`
//! can choose as the source port.

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use selfconn::bpf::attach::{Hook, Hooks, Method, RequestedHooks};
use selfconn_ebpf::Endpoint;

use crate::support::{
    client::{
        assert_opened_by_this_thread, connect_until_self, set_own_port_range, socket, unanswered_connects_to,
    },
    daemon::{TestDaemon, is_event, method_verdicts},
    direct_tracer::{with_tracer, with_tracer_on},
    netns::TestNetns,
    refused_connects::{at, connect_refused},
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Requests that attach only one method, for each method that can be attached here.
fn single_methods() -> Vec<RequestedHooks> {
    let is_attachable = |method: &Method| {
        method_verdicts().iter().any(|(name, verdict, _)| (*name, *verdict) == (method.name(), "ok"))
    };
    let only = |method: Method| match method.hook() {
        Hook::InetSockSetState => {
            RequestedHooks { hooks: Hooks::Tracepoint, tracepoint: Some(method), ..RequestedHooks::default() }
        }
        Hook::TcpSetState => {
            RequestedHooks { hooks: Hooks::Function, function: Some(method), ..RequestedHooks::default() }
        }
    };
    Method::ALL.into_iter().filter(is_attachable).map(only).collect()
}

#[test]
fn only_connects_to_ports_in_the_range_of_their_namespace_are_stored() {
    let methods = single_methods();
    for (low, high) in [(40_000, 40_199), (20_000, 20_099)] {
        let net = TestNetns::enter_new();
        net.set_sysctl("ip_local_port_range", &format!("{low} {high}"));
        for hooks in &methods {
            // Loading takes seconds on an emulated processor, so the ports share the programs.
            with_tracer_on(*hooks, |tracer| {
                for (port, is_stored) in [(low - 1, false), (low, true), (high, true), (high + 1, false)] {
                    let waiting = unanswered_connects_to(at(port), 4);
                    let entries = tracer.connect_entries().unwrap();
                    let is_match =
                        |endpoint: &Endpoint| u64::from(endpoint.netns) == net.inode && endpoint.port == port;
                    let count = entries.iter().filter(|(_, entry)| is_match(&entry.endpoint)).count();
                    // The backlog accepts one or two of the four.
                    assert_eq!(
                        count >= 2,
                        is_stored,
                        "{count} entries for port {port} of {low}-{high}: {hooks:?}"
                    );
                    drop(waiting);
                }
            });
        }
    }
}

#[test]
fn refused_connects_are_counted_only_for_ports_in_the_range() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    with_tracer(|tracer| {
        // An odd port is never hit.
        for (port, count) in [(40_101, Some(30)), (40_201, None), (443, None)] {
            connect_refused(at(port), 30);
            let entry = tracer.connect_entries().unwrap();
            assert!(entry.iter().all(|(_, entry)| u64::from(entry.endpoint.netns) != net.inode));
            let is_match = |(destination, _): &(Endpoint, _)| {
                u64::from(destination.netns) == net.inode && destination.port == port
            };
            let refused = tracer.refused_counts().entries().find(is_match);
            assert_eq!(refused.map(|(_, refused)| refused.total), count, "port {port}");
        }
    });
}

#[test]
fn a_socket_with_a_port_range_of_its_own_is_reported_with_its_process() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    for_each_variant_retrying(PREEMPTED, |variant| {
        let daemon = TestDaemon::shared(variant, &[]);
        let client = socket(LOCALHOST.into());
        if !set_own_port_range(&client, (40_107, 40_107)) {
            println!("this kernel has no IP_LOCAL_PORT_RANGE");
            return Ok(());
        }
        client.connect(&at(40_107).into()).unwrap();
        // No TIME_WAIT, because the next method needs the same port.
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let (established, _) = daemon.only_pair(net.inode)?;
        assert_opened_by_this_thread(&established);
        assert_eq!((&established["port"], &established["cause"]), (&40_107.into(), &"ephemeral".into()));
        Ok(())
    });
}

#[test]
fn a_range_that_changes_during_a_connect_never_yields_a_wrong_process() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::shared(variant, &[]);
        net.set_sysctl("ip_local_port_range", "40000 40199");
        let target: SocketAddr = at(40_100);
        // Another thread's connects are stored, and end while their port is outside the range. So their entries
        // stay, and the kernel soon uses the addresses of their sockets again.
        thread::scope(|scope| {
            let (server, waiting) =
                scope.spawn(|| unanswered_connects_to(target, 64)).join().expect("the connects are made");
            net.set_sysctl("ip_local_port_range", "20000 20199");
            drop((server, waiting));
        });
        // A connect that begins before the change ends as a self-connection after it: its opener is known.
        net.set_sysctl("ip_local_port_range", "40000 40199");
        let client = connect_until_self(target, 100_000).expect("a hit within the range");
        // No TIME_WAIT, because the next attempt needs the same port.
        client.set_linger(Some(Duration::ZERO)).unwrap();
        let established = daemon.try_expect(1, is_event("established", net.inode))?.pop().unwrap();
        Missed::if_opener_unseen(&established)?;
        assert_opened_by_this_thread(&established);
        drop(client);
        daemon.only_pair(net.inode).map(drop)
    });
}
