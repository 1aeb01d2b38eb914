//! The end of a run while connections wait for the remedy.

use std::collections::BTreeSet;

use super::{HookVariant, LOCALHOST, TestNetns, connect_to_self, is_connected, is_event, start};

#[test]
fn at_the_end_of_a_run_each_destroyed_connection_is_reported_and_no_other() {
    const CONNECTIONS: usize = 100;
    // The end comes at another moment each time.
    for remedied_before in 1..=5 {
        let net = TestNetns::enter_new();
        let options = ["--remedy", "destroy", "--remedy-grace", "0s", "--remedy-rate", "20"];
        let mut daemon = start(net, &HookVariant(vec![]), &options);
        let sockets: Vec<_> = (0..CONNECTIONS).map(|_| connect_to_self(LOCALHOST)).collect();
        daemon.expect(remedied_before, is_event("remedied", net.inode));
        let (events, _) = daemon.stop();
        let remedied = events.iter().filter(|event| is_event("remedied", net.inode)(event));
        // On a slow machine the burst of 20 is over before the end: the others are reported as waiting. There a request
        // may also have no result in time.
        let (destroyed_events, others): (Vec<_>, Vec<_>) =
            remedied.partition(|event| event["result"] == "destroyed");
        let mut unknown = BTreeSet::new();
        for event in others {
            match (event["result"].as_str().unwrap(), event["why"].as_str()) {
                ("rate_limited", _) | ("failed", Some("the run ended before its socket was destroyed")) => {}
                ("failed", Some(why)) if why.ends_with("whether its socket is destroyed is unknown") => {
                    unknown.insert(event["port"].as_u64().unwrap());
                }
                _ => panic!("{event}"),
            }
        }
        let reported: BTreeSet<_> =
            destroyed_events.iter().map(|event| event["port"].as_u64().unwrap()).collect();
        assert_eq!(reported.len(), destroyed_events.len(), "reported twice");
        let is_destroyed = |(socket, _): &&(_, _)| !is_connected(socket);
        let destroyed: BTreeSet<_> =
            sockets.iter().filter(is_destroyed).map(|(_, port)| u64::from(*port)).collect();
        println!("FACT destroyed={} of={CONNECTIONS} unknown={}", destroyed.len(), unknown.len());
        assert_eq!(reported, &destroyed - &unknown);
        assert!(destroyed.len() < CONNECTIONS, "the run did not end before");
    }
}
