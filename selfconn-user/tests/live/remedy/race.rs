//! The kernel's trap: where no connection fits a request without a cookie, the listener on that port does, and would be
//! destroyed. So a healthy listener stands on the port while self-connections of that very port end by themselves, just
//! as they are destroyed.

use std::{
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use selfconn::sockets::{self, Cookie, Target};
use socket2::Socket;

use super::{LOCALHOST, start};
use crate::{
    client::socket,
    daemon::{Variant, of, scaled},
    net::Net,
};

/// With SO_REUSEPORT a client can be connected to itself beside a listener on its port: its own SYN finds it first.
fn shared(address: SocketAddr) -> Socket {
    let socket = socket(address.ip());
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket
}

fn listener() -> (Socket, SocketAddr) {
    let listener = shared(SocketAddr::new(LOCALHOST, 0));
    listener.listen(16).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    (listener, address)
}

fn client(address: SocketAddr) -> Socket {
    let client = shared(address);
    match client.connect(&address.into()) {
        // The daemon was faster than the call's return.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => return client,
        outcome => outcome.unwrap(),
    }
    assert_eq!(client.local_addr().unwrap(), address.into(), "and so connected to itself");
    // Ends at once, and leaves nothing.
    client.set_linger(Some(Duration::ZERO)).unwrap();
    client
}

#[track_caller]
fn assert_healthy(listener: &Socket, address: SocketAddr) {
    assert!(listener.is_listener().unwrap(), "the listener is destroyed");
    TcpStream::connect(address).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_listener_survives_ten_thousand_races_of_destroying_against_the_end() {
    let net = Net::private();
    let (listener, address) = listener();
    let target = Target {
        netns: u32::try_from(net.inode).unwrap(),
        addr: address.ip(),
        port: address.port(),
        is_ipv6: false,
        ifindex: None,
    };
    let (hand_over, handed) = mpsc::channel::<Socket>();
    let closer = thread::spawn(move || handed.iter().for_each(drop));
    let (mut destroyed, mut gone) = (0, 0);
    for round in 0..scaled(10_000) {
        let client = client(address);
        let cookie = sockets::look_up(&target, &[]).unwrap().expect("it is there");
        assert_eq!(cookie.get(), client.cookie().unwrap());
        // By turns it may be gone for sure, and at any moment in between.
        match round % 4 {
            0 => drop(client),
            _ => hand_over.send(client).unwrap(),
        }
        // And now and then it is looked up when it may be gone already.
        let cookie = if round % 4 == 2 { sockets::look_up(&target, &[]).unwrap() } else { Some(cookie) };
        let was_there = cookie.is_some_and(|cookie| sockets::destroy(&target, cookie, &[]).unwrap());
        if was_there {
            destroyed += 1;
        } else {
            gone += 1;
        }
        assert!(listener.is_listener().unwrap(), "round {round}");
        // So that the port has one client at a time.
        while sockets::look_up(&target, &[]).unwrap().is_some() {
            thread::yield_now();
        }
    }
    drop(hand_over);
    closer.join().unwrap();
    println!("{destroyed} were destroyed, {gone} had gone");
    assert!(gone >= scaled(10_000) / 4, "those that were dropped");
    assert!(destroyed > 0);
    assert_healthy(&listener, address);
    // What makes this a test: a listener can be destroyed here, by its own cookie.
    let its = Cookie::new(listener.cookie().unwrap()).unwrap();
    assert_eq!(sockets::destroy(&target, its, &[]), Ok(false), "it is no self-connection");
    assert_healthy(&listener, address);
}

#[test]
fn a_listener_survives_the_daemon_while_thousands_on_its_port_end_by_themselves() {
    let net = Net::private();
    let (listener, address) = listener();
    let mut daemon = start(net, &Variant(vec![]), &["--remedy", "destroy", "--remedy-rate", "1000000"]);
    let count = scaled(2_000);
    for round in 0..count {
        let _client = client(address);
        // Some live a moment longer, so that some are destroyed, and some just not.
        if round % 8 == 0 {
            thread::sleep(Duration::from_micros(round as u64 % 1_500));
        }
    }
    // The last one stays, and has to be destroyed by us.
    let last = client(address);
    let closed = daemon.expect(count + 1, of("closed", net.inode));
    assert!(!super::is_connected(&last));
    assert_healthy(&listener, address);
    let (events, _) = daemon.stop();
    let results = |result: &'static str| {
        events.iter().filter(|event| of("remedied", net.inode)(event) && event["result"] == result).count()
    };
    println!("{} were destroyed, {} had gone", results("destroyed"), results("gone"));
    assert_eq!(results("failed"), 0);
    assert!(results("destroyed") > 0);
    let how = closed.iter().filter(|event| event["how"] == "destroyed").count();
    assert_eq!(how, results("destroyed"), "each that was told as destroyed ended so");
}
