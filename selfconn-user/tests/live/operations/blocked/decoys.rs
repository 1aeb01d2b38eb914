//! A user's own self-connections at a victim's port hide neither the victim's self-connection nor its TIME_WAIT, when he
//! changes their options so that they hold the port no more.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    thread,
};

use serde_json::Value;
use socket2::Socket;

use super::{LOCALHOST, assert_in_use};
use crate::support::{
    bind_methods::{bind_methods, start},
    client::{NOBODY, become_user, socket},
    daemon::{TestDaemon, is_event, reads_descriptors},
    netns::TestNetns,
};

const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// More self-connections than the daemon looks at for one event.
const MANY: u8 = 20;

fn connect_to_self_at(address: IpAddr, port: u16) -> Socket {
    let client = socket(address);
    client.bind(&SocketAddr::new(address, port).into()).unwrap();
    client.connect(&client.local_addr().unwrap()).unwrap();
    client
}

/// Self-connections of a user without privileges, at a port that they keep servers of every address from. Returns them
/// and their port.
fn decoys(count: u8) -> (Vec<Socket>, u16) {
    let connect = move || {
        become_user(NOBODY);
        let address = |number| Ipv4Addr::new(127, 0, 1, number).into();
        let first = connect_to_self_at(address(1), 0);
        let port = first.local_addr().unwrap().as_socket().unwrap().port();
        let others = (2..=count).map(|number| connect_to_self_at(address(number), port));
        (std::iter::once(first).chain(others).collect(), port)
    };
    thread::spawn(connect).join().unwrap()
}

/// Lets servers that have SO_REUSEADDR, as those of Rust and nearly all others, share the port or not.
fn share_port(decoys: &[Socket], shares: bool) {
    decoys.iter().for_each(|decoy| decoy.set_reuse_address(shares).unwrap());
}

fn blocked_events(daemon: TestDaemon, netns: u64) -> Vec<Value> {
    let (events, _) = daemon.stop();
    events.into_iter().filter(|event| is_event("blocked", netns)(event)).collect()
}

#[test]
fn decoys_at_the_port_hide_no_self_connection_that_keeps_a_server_from_it() {
    if !reads_descriptors() {
        return;
    }
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        let (decoys, port) = decoys(MANY);
        let mut daemon = start(method, &[]);
        daemon.expect(usize::from(MANY), is_event("established", net.inode));
        let victim = connect_to_self_at(LOCALHOST, port);
        let established =
            daemon.expect(1 + usize::from(MANY), is_event("established", net.inode)).pop().unwrap();
        assert_eq!(established["addr"], LOCALHOST.to_string(), "{established}");
        assert_eq!(established["uid"], 0, "{established}");
        share_port(&decoys, true);
        assert_in_use(ANY, port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        assert_eq!(blocked["holder"]["id"], established["id"], "{method}: {blocked}");
        assert_eq!(blocked["holder"]["pid"], std::process::id(), "{method}: {blocked}");
        assert_eq!(blocked_events(daemon, net.inode).len(), 1);

        // Its TIME_WAIT, once more with decoys that are known to keep servers from the port.
        share_port(&decoys, false);
        let mut daemon = start(method, &[]);
        daemon.expect(1 + usize::from(MANY), is_event("established", net.inode));
        drop(victim);
        let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
        share_port(&decoys, true);
        assert_in_use(ANY, port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        assert_eq!(blocked["holder"]["id"], closed["id"], "{method}: {blocked}");
        assert_eq!(blocked["holder"]["state"], "TIME_WAIT", "{method}: {blocked}");
        assert_eq!(blocked["holder"]["holders"], serde_json::json!([]), "{method}: {blocked}");
        daemon.stop();
    }
}

/// By the record they do when the bind fails.
#[test]
fn decoys_that_keep_no_server_from_the_port_are_not_said_to_do_so() {
    if !reads_descriptors() {
        return;
    }
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        let mut daemon = start(method, &[]);
        let (decoys, port) = decoys(3);
        daemon.expect(3, is_event("established", net.inode));
        share_port(&decoys, true);
        let server = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        assert_in_use(ANY, port);
        // Whether they refused the bind is unknown, so it counts as lost.
        let is_lost =
            |event: &Value| event["event"] == "lost" && event["where"] == "binds" && event["uid"] == 0;
        assert_eq!(daemon.expect(1, is_lost)[0]["count"], 1);
        drop((server, decoys));
        assert_eq!(blocked_events(daemon, net.inode), Vec::<Value>::new(), "{method}");
    }
}
