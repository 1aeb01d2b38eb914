//! How a self-connection is reported: once, with its addresses, its process and its counters.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
};

use serde_json::Value;

use crate::support::{
    client::{self, PAYLOAD, assert_opened_by_this_thread, connect_to_self, run_self_connection},
    daemon::{
        HookVariant, TestDaemon, is_event, is_name_or_unknown, lossless_variants, method_verdicts,
        options_forcing, scaled,
    },
    netns::TestNetns,
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

fn textbook_client(address: &str, shown: &str, family: &str) {
    let net = TestNetns::enter_new();
    net.add_address(Ipv4Addr::new(192, 0, 2, 1));
    for_each_variant_retrying(PREEMPTED, |variant| {
        let daemon = TestDaemon::shared(variant, &[]);
        let port = run_self_connection(address.parse().unwrap());
        let (established, closed) = daemon.only_pair(net.inode)?;
        // Known only at the transition to ESTABLISHED.
        Missed::if_null(&established, &["isn"])?;
        for event in [&established, &closed] {
            assert_opened_by_this_thread(event);
            assert_eq!(event["addr"], shown, "{variant:?}: {event}");
            assert_eq!(event["port"], port);
            assert_eq!(event["family"], family);
            assert_eq!(event["cause"], "bound");
            assert_eq!(event["source"], "live");
            assert_eq!(event["isn"], event["peer_isn"]);
            assert!(event["isn"].is_u64(), "{event}");
        }
        assert_eq!(established["id"], closed["id"]);
        assert_eq!(closed["how"], "fin", "{closed}");
        assert_eq!(closed["bytes_sent"], PAYLOAD.len(), "{closed}");
        assert_eq!(closed["bytes_received"], PAYLOAD.len(), "{closed}");
        assert!(closed["duration_ns"].as_u64().is_some_and(|ns| ns > 0), "{closed}");
        assert!(closed["port_blocked_until"].is_string(), "{closed}");
        Ok(())
    });
}

#[test]
fn an_ipv4_client_of_itself_is_reported() {
    textbook_client("127.0.0.1", "127.0.0.1", "ipv4");
}

#[test]
fn an_ipv6_client_of_itself_is_reported() {
    textbook_client("::1", "::1", "ipv6");
}

#[test]
fn a_v4_mapped_address_is_reported_as_ipv4_on_an_ipv6_socket() {
    textbook_client("::ffff:127.0.0.1", "127.0.0.1", "ipv6");
}

#[test]
fn a_local_address_that_is_not_loopback_is_reported() {
    textbook_client("192.0.2.1", "192.0.2.1", "ipv4");
}

#[test]
fn a_reset_is_distinguished_from_an_orderly_close() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let daemon = TestDaemon::shared(variant, &[]);
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(socket);
        let (_, closed) = daemon.only_pair(net.inode)?;
        assert_eq!(closed["how"], "rst", "{variant:?}: {closed}");
        assert_eq!(closed["port_blocked_until"], Value::Null);
        assert_eq!(closed["bytes_sent"], 0);
        Ok(())
    });
}

#[test]
fn a_thread_is_distinguished_from_its_process() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let daemon = TestDaemon::shared(variant, &[]);
        thread::Builder::new()
            .name("a-thread".to_owned())
            .spawn(|| {
                run_self_connection(Ipv4Addr::LOCALHOST.into());
            })
            .unwrap()
            .join()
            .unwrap();
        let (established, _) = daemon.only_pair(net.inode)?;
        assert_eq!(established["pid"], std::process::id(), "{established}");
        let comm = &established["comm"];
        assert!(is_name_or_unknown(comm, &client::own_comm()), "{variant:?}: {established}");
        assert_eq!(established["thread_comm"], "a-thread", "{established}");
        assert_ne!(established["tid"], established["pid"]);
        Ok(())
    });
}

#[test]
fn a_thousand_self_connections_yield_a_thousand_event_pairs() {
    let net = TestNetns::enter_new();
    let count = scaled(1_000);
    for variant in lossless_variants() {
        let mut daemon = TestDaemon::shared(&variant, &[]);
        // Closed by a reset, so that no port stays in TIME_WAIT.
        for _ in 0..count {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        }
        daemon.expect(count, is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        let established: Vec<_> =
            events.iter().filter(|event| is_event("established", net.inode)(event)).collect();
        let closed: Vec<_> = events.iter().filter(|event| is_event("closed", net.inode)(event)).collect();
        assert_eq!((established.len(), closed.len()), (count, count), "{variant:?}");
        for (opened, closed) in established.iter().zip(&closed) {
            assert_opened_by_this_thread(opened);
            assert_eq!(opened["id"], closed["id"]);
        }
        let ids: std::collections::HashSet<_> =
            established.iter().map(|event| event["id"].to_string()).collect();
        assert_eq!(ids.len(), count, "every id is unique");
    }
}

#[test]
fn states_are_reported_in_kernel_order_when_requested() {
    let net = TestNetns::enter_new();
    for variant in lossless_variants() {
        let mut daemon = TestDaemon::shared(&variant, &["--states"]);
        run_self_connection(Ipv4Addr::LOCALHOST.into());
        daemon.expect(1, is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        let states: Vec<_> = events
            .iter()
            .filter(|event| is_event("state", net.inode)(event))
            .map(|event| (event["from"].as_str().unwrap(), event["to"].as_str().unwrap()))
            .collect();
        let expected = [
            ("CLOSE", "SYN_SENT"),
            ("SYN_SENT", "SYN_RECV"),
            ("SYN_RECV", "ESTABLISHED"),
            ("ESTABLISHED", "FIN_WAIT1"),
            ("FIN_WAIT1", "CLOSING"),
            ("CLOSING", "CLOSE"),
        ];
        assert_eq!(states, expected, "{variant:?}");
    }
}

#[test]
fn the_log_equals_stdout_and_the_stopped_event_has_the_counts() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--log", log.to_str().unwrap()]);
    for _ in 0..3 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    daemon.expect(3, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    let text = std::fs::read_to_string(&log).unwrap();
    let logged: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(logged, events);
    let stopped = events.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    assert_eq!(stopped["made"], events.len());
    assert_eq!(stopped["written"], events.len());
    assert_eq!(stopped["lost"]["ring"], 0);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&log).unwrap().permissions().mode();
    assert_eq!(mode & 0o137, 0, "the log is for its owner and group: {mode:o}");
}

#[test]
fn two_concurrent_daemons_both_see_everything() {
    let net = TestNetns::enter_new();
    let mut daemons: Vec<_> = (0..2).map(|_| TestDaemon::shared(&HookVariant(vec![]), &[])).collect();
    assert_ne!(daemons[0].pid(), daemons[1].pid());
    let address: IpAddr = Ipv4Addr::LOCALHOST.into();
    run_self_connection(address);
    for daemon in &mut daemons {
        daemon.expect(1, is_event("closed", net.inode));
    }
    for daemon in daemons {
        let (events, _) = daemon.stop();
        assert_eq!(events.iter().filter(|event| is_event("established", net.inode)(event)).count(), 1);
    }
}

#[test]
fn socket_field_offsets_can_be_read_from_btf() {
    let net = TestNetns::enter_new();
    // The tracepoint record of the method perf contains the addresses.
    let is_applicable = |(method, verdict, _): &(&str, &str, &str)| *method != "perf" && *verdict == "ok";
    for (method, ..) in method_verdicts().into_iter().filter(is_applicable) {
        let variant = HookVariant([options_forcing(method), vec!["--btf-offsets"]].concat());
        let mut daemon = TestDaemon::start(&variant, &[]);
        let reported = |event: &Value| is_event("closed", net.inode)(event);
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            run_self_connection(address);
        }
        daemon.expect(2, reported);
        let (events, _) = daemon.stop();
        let addresses: Vec<_> =
            events.iter().filter(|event| reported(event)).map(|event| &event["addr"]).collect();
        assert_eq!(addresses, ["127.0.0.1", "::1"], "{method}");
    }
}

#[test]
fn without_btf_self_connections_are_reported_and_unknown_fields_are_null() {
    let net = TestNetns::enter_new();
    // The strictest lockdown refuses perf, the only method that needs no BTF.
    if !method_verdicts().iter().any(|(method, verdict, _)| (*method, *verdict) == ("perf", "ok")) {
        println!("perf can't be attached here");
        return;
    }
    let without = HookVariant(vec!["--without-btf"]);
    let mut daemon = TestDaemon::start(&without, &[]);
    let mut closed_connection = || {
        let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
        let is_match = |event: &Value| event["event"] == "closed" && event["port"] == port;
        daemon.expect(1, is_match).remove(0)
    };
    // A look-up has a deadline, which an emulated processor may miss.
    let mut closed = closed_connection();
    for _ in 0..9 {
        if !closed["comm"].is_null() && !closed["cmdline"].is_null() {
            break;
        }
        closed = closed_connection();
    }
    assert_eq!(closed["pid"], std::process::id(), "{closed}");
    assert_eq!(closed["thread_comm"], client::own_thread_comm(), "{closed}");
    // A process that started before the connect and still has the pid is the opener.
    assert_eq!(closed["comm"], client::own_comm(), "{closed}");
    assert!(closed["exe"].is_string() && closed["cmdline"].is_array(), "{closed}");
    for unknown in ["netns", "cookie", "isn", "peer_isn", "bytes_sent", "bytes_received", "how", "cause"] {
        assert_eq!(closed[unknown], Value::Null, "{unknown} in {closed}");
    }
    let (events, _) = daemon.stop();
    let started = events.iter().find(|event| event["event"] == "started").unwrap();
    assert!(started["limits"].to_string().contains("BTF"), "{started}");
    let _ = net;
}
