//! Early warning by every method: the twentieth refused connect to a port is reported, with its process and the
//! expected time until an attempt becomes a self-connection.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use serde_json::Value;

use crate::support::{
    client::{own_comm, set_own_port_range, socket},
    daemon::{HookVariant, TestDaemon, comm_by_thread, is_event, is_kernel_at_least, lossless_variants},
    netns::TestNetns,
    refused_connects::{at, connect_refused, connect_refused_from, enter_wide_range_netns, is_at_risk},
    retries::until_looked_up,
};

#[test]
fn the_twentieth_refused_connect_and_each_tenfold_are_reported_by_every_method() {
    let net = enter_wide_range_netns();
    for variant in lossless_variants() {
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            until_looked_up(|| Ok(expect_warnings(&variant, net, address))).unwrap();
        }
    }
}

/// True if the process was looked up in time.
fn expect_warnings(variant: &HookVariant, net: TestNetns, address: IpAddr) -> bool {
    let mut daemon = TestDaemon::start(variant, &[]);
    let (few, often) = (SocketAddr::new(address, 40_000), SocketAddr::new(address, 40_002));
    connect_refused(few, 19);
    connect_refused(often, 20);
    let connected_at = SystemTime::now();
    let event = daemon.expect(1, is_event("at_risk", net.inode)).remove(0);
    assert_eq!(event["port"], 40_002, "{variant:?}: nineteen are not reported: {event}");
    assert_eq!(event["addr"], address.to_string());
    // Each connect counts once, although two programs see it.
    assert_eq!((&event["refused"], &event["dialers"]), (&20.into(), &1.into()), "{event}");
    assert_eq!(event["pid"], std::process::id(), "{event}");
    assert_eq!(event["comm"], comm_by_thread(&own_comm()), "{event}");
    assert_eq!(event["expected_dials"], 14_116, "{event}");
    assert_eq!(event["range_unknown"], Value::Null, "{event}");
    let expected = event["window_ns"].as_u64().unwrap() as f64 / 19.0 * 14_116.0 / 1e9;
    let eta = event["eta_seconds"].as_u64().unwrap() as f64;
    assert!((expected..=expected + 1.0).contains(&eta), "{eta} for {expected}: {event}");
    let reported_at: jiff::Timestamp = event["time"].as_str().unwrap().parse().unwrap();
    let delay = SystemTime::from(reported_at).duration_since(connected_at).unwrap_or_default();
    println!("FACT risk method={:?} reported_after_ms={}", variant.0.last(), delay.as_millis());

    connect_refused(often, 179);
    // The event of the other port is emitted after every event of these connects.
    connect_refused(few, 1);
    daemon.expect(1, is_at_risk(40_000, net));
    connect_refused(often, 1);
    let events = daemon.expect(2, is_at_risk(40_002, net));
    assert_eq!(events[1]["refused"], 200, "{}", events[1]);
    let (events, _) = daemon.stop();
    assert_eq!(events.iter().filter(|event| is_at_risk(40_002, net)(event)).count(), 2);
    let lost = &events.last().unwrap()["lost"];
    assert_eq!(lost["refused_table"], 0);
    // A process whose start time is unknown is not looked up.
    let exe = comm_by_thread(std::env::current_exe().unwrap().to_str().unwrap());
    if event["exe"] != exe {
        assert!(event["exe"].is_null() && lost["lookups"] != 0, "{lost}, {event}");
        return false;
    }
    true
}

#[test]
fn a_range_of_the_sockets_own_decides_whether_its_port_is_at_risk() {
    const OWN_RANGE: (u16, u16) = (40_002, 40_201);
    if !is_kernel_at_least((6, 8)) {
        println!("this kernel has no IP_LOCAL_PORT_RANGE that reaches both parities");
        return;
    }
    let net = enter_wide_range_netns();
    for variant in lossless_variants() {
        let mut daemon = TestDaemon::start(&variant, &[]);
        // An odd port, without a range of its own, and an even one that is outside of it.
        connect_refused(at(40_103), 20);
        connect_refused_from(at(40_100), 20, Some((40_102, 40_201)));
        connect_refused_from(at(40_101), 20, Some(OWN_RANGE));
        connect_refused(at(40_300), 20);
        // The last one is reported with the first check, or after it.
        let shared = daemon.expect(1, is_at_risk(40_300, net)).remove(0);
        assert_eq!(
            (&shared["own_range"], &shared["expected_dials"]),
            (&Value::Null, &14_116.into()),
            "{shared}"
        );
        let own = daemon.expect(1, is_at_risk(40_101, net)).remove(0);
        assert_eq!(
            (&own["own_range"], &own["expected_dials"]),
            (&"40002-40201".into(), &200.into()),
            "{own}"
        );

        // What was predicted happens.
        let hit = (0..20_000).find_map(|_| {
            let client = socket(Ipv4Addr::LOCALHOST.into());
            assert!(set_own_port_range(&client, OWN_RANGE));
            client.connect(&at(40_101).into()).ok().map(|()| client)
        });
        // No TIME_WAIT, because the next method needs the same port.
        hit.expect("a connect hits port 40101").set_linger(Some(Duration::ZERO)).unwrap();
        let is_hit = |event: &Value| is_event("established", net.inode)(event) && event["port"] == 40_101;
        assert_eq!(daemon.expect(1, is_hit)[0]["cause"], "ephemeral");
        let (events, _) = daemon.stop();
        let at_risk = events.iter().filter(|event| is_event("at_risk", net.inode)(event));
        let ports: BTreeSet<_> = at_risk.map(|event| event["port"].as_u64()).collect();
        assert_eq!(ports, BTreeSet::from([Some(40_101), Some(40_300)]), "{variant:?}");
    }
}
