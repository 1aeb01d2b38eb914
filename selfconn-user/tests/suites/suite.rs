//! Four mistakes of real test suites. Each case passes unless a connect hits its own port. `cargo xtask suites`
//! compiles this with `rustc --test`, and runs it in a network namespace with a small port range.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

const ATTEMPTS: usize = 4_000;
const OTHER_CASES: [u16; 3] = [42_010, 42_020, 42_040];

fn attempt(port: u16) -> Option<TcpStream> {
    TcpStream::connect(("127.0.0.1", port)).ok()
}

fn first_of_many(port: u16) -> Option<TcpStream> {
    (0..ATTEMPTS).find_map(|_| attempt(port))
}

/// Greets one client.
fn serve(port: u16) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let _ = client.read(&mut [0; 16]);
        let _ = client.write_all(b"welcome");
    });
    port
}

#[test]
fn a_client_waits_for_its_server() {
    let mut client = first_of_many(42_010).unwrap_or_else(|| {
        serve(42_010);
        attempt(42_010).unwrap()
    });
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 16];
    let length = client.read(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"welcome");
}

#[test]
fn a_server_comes_back() {
    let _client = first_of_many(42_020);
    serve(42_020);
}

/// The port of a client that has ended.
fn port_given_back() -> u16 {
    let mut client = attempt(serve(0)).unwrap();
    let port = client.local_addr().unwrap().port();
    // The server closes first, so that the client's port is in no TIME_WAIT.
    client.write_all(b"hello").unwrap();
    client.read_to_end(&mut Vec::new()).unwrap();
    port
}

#[test]
fn a_port_that_was_given_back_is_dead() {
    let mut ports = std::iter::repeat_with(port_given_back);
    let dead = ports.find(|port| !OTHER_CASES.contains(port)).unwrap();
    assert!(first_of_many(dead).is_none(), "nobody listens on {dead}");
}

#[test]
fn a_probe_finds_no_listener() {
    assert!(first_of_many(42_040).is_none(), "nobody listens on 42040");
}
