//! Real servers and clients of the distribution: whom a self-connection keeps from its port, and which refused
//! connects are a risk. `cargo xtask suites` installs them, and runs these tests.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    bind_methods::{bind_methods, start},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event},
    netns::TestNetns,
    refused_connects::{WIDE_PORT_RANGE, connect_refused, enter_wide_range_netns, is_at_risk},
};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Servers by the words of their command lines; ADDR and PORT are replaced.
const SERVERS: [(&str, &[&str]); 4] = [
    ("python3", &["-m", "http.server", "PORT", "--bind", "ADDR"]),
    ("node", &["-e", "require('http').createServer().listen(PORT, 'ADDR')"]),
    ("redis-check-rdb", &["--port", "PORT", "--bind", "ADDR", "--save", "", "--daemonize", "no"]),
    ("ruby", &["-rsocket", "-e", "TCPServer.new('ADDR', PORT); sleep"]),
];

fn start_server((program, arguments): (&str, &[&str]), addr: Ipv4Addr, port: u16) -> Child {
    let (addr, port) = (addr.to_string(), port.to_string());
    // The one of the distribution, not one that a version manager puts before it.
    let mut command = Command::new(format!("/usr/bin/{program}"));
    if program == "redis-check-rdb" {
        // The same file is the server by that name. Its package starts no service.
        command.arg0("redis-server");
    }
    command
        .args(arguments.iter().map(|word| word.replace("ADDR", &addr).replace("PORT", &port)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}: `cargo xtask suites` installs it"))
}

fn wait_until_listening(server: &mut Child, address: SocketAddr) {
    let until = Instant::now() + DEADLINE;
    while TcpStream::connect(address).is_err() {
        assert!(server.try_wait().unwrap().is_none(), "the server at {address} has ended");
        assert!(Instant::now() < until, "{address}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Ends a server that is in the way of nobody any more.
fn end(mut server: Child) {
    server.kill().unwrap();
    server.wait().unwrap();
}

/// A self-connection whose port connect() chose: the range has one port.
fn hit(net: TestNetns, port: u16) -> TcpStream {
    net.set_sysctl("ip_local_port_range", &format!("{port} {port}"));
    let hit = TcpStream::connect((LOCALHOST, port)).unwrap();
    assert_eq!(hit.local_addr().unwrap(), hit.peer_addr().unwrap());
    // Other clients need other ports.
    net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
    hit
}

#[test]
#[ignore = "needs servers that `cargo xtask suites` installs"]
fn each_server_that_a_self_connection_keeps_from_its_port_is_reported_and_no_other() {
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        let mut daemon = start(method, &[]);
        for (port, server) in (42_000..).zip(SERVERS) {
            let _hit = hit(net, port);
            // It binds 127.0.0.2. The next one there can't, and that is no self-connection's doing.
            let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
            let mut first = start_server(server, elsewhere, port);
            wait_until_listening(&mut first, (elsewhere, port).into());
            assert!(!start_server(server, elsewhere, port).wait().unwrap().success(), "{server:?}");
            end(first);

            for addr in [LOCALHOST, Ipv4Addr::UNSPECIFIED] {
                let mut blocked = start_server(server, addr, port);
                let pid = blocked.id();
                assert!(!blocked.wait().unwrap().success(), "{server:?}");
                let is_this =
                    |event: &serde_json::Value| is_event("blocked", net.inode)(event) && event["pid"] == pid;
                let event = daemon.expect(1, is_this).remove(0);
                assert_eq!(
                    (&event["addr"], &event["port"]),
                    (&addr.to_string().into(), &port.into()),
                    "{event}"
                );
                assert_eq!(event["holder"]["pid"], std::process::id(), "{event}");
            }
        }
        let (events, _) = daemon.stop();
        let blocked: Vec<_> = events.iter().filter(|event| is_event("blocked", net.inode)(event)).collect();
        assert!(blocked.iter().all(|event| event["addr"] != "127.0.0.2"), "{method}: {blocked:#?}");
    }
}

#[test]
#[ignore = "needs servers that `cargo xtask suites` installs"]
fn clients_of_localhost_are_at_risk_only_when_each_server_is_gone() {
    let net = enter_wide_range_netns();
    // ::1 first, as getaddrinfo() sorts the addresses of localhost.
    const CLIENT: &str = "
import socket, sys, time
for i in range(400):
    # http.server takes one connection after another, and has room for five.
    time.sleep(0.005)
    for family, addr in ((socket.AF_INET6, '::1'), (socket.AF_INET, '127.0.0.1')):
        with socket.socket(family) as client:
            if client.connect_ex((addr, int(sys.argv[1]))) == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
                break
";
    for (port, server) in (42_010..).step_by(2).zip(SERVERS) {
        let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
        let mut running = start_server(server, Ipv4Addr::UNSPECIFIED, port);
        wait_until_listening(&mut running, (LOCALHOST, port).into());
        let client = Command::new("/usr/bin/python3").args(["-c", CLIENT, &port.to_string()]).status();
        assert!(client.unwrap().success());
        // The marker's event comes after everything before it.
        connect_refused((LOCALHOST, 42_900).into(), 20);
        daemon.expect(1, is_at_risk(42_900, net));
        assert!(!daemon.received().iter().any(is_at_risk(port, net)), "{server:?}: {:#?}", daemon.received());
        end(running);
        // Nothing of the server is left: its connections were reset.
        let until = Instant::now() + DEADLINE;
        let is_reported = is_at_risk(port, net);
        while daemon.wait_until(Instant::now() + Duration::from_millis(20), 1, &is_reported).is_err() {
            connect_refused((std::net::Ipv6Addr::LOCALHOST, port).into(), 1);
            assert!(Instant::now() < until, "{server:?}: {:#?}", daemon.received());
        }
        daemon.stop();
    }
    // The port is free.
    drop(TcpListener::bind((LOCALHOST, 42_010)).unwrap());
}

#[test]
#[ignore = "needs servers that `cargo xtask suites` installs"]
fn a_child_that_inherited_the_connection_is_the_holder_and_the_program_that_connected_the_opener() {
    let net = TestNetns::enter_new();
    // The child lives on, and the program that connected ends.
    const OPENER: &str = "
import socket, subprocess
client = socket.socket()
client.bind(('127.0.0.1', 0))
client.connect(client.getsockname())
client.set_inheritable(True)
child = subprocess.Popen(['sleep', '600'], close_fds=False, stdout=subprocess.DEVNULL)
print(client.getsockname()[1], child.pid, flush=True)
";
    for method in bind_methods() {
        let mut daemon = start(method, &[]);
        // The child would keep a pipe open.
        let mut python = Command::new("/usr/bin/python3");
        let output = python.args(["-c", OPENER]).stderr(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let numbers: Vec<u32> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let [port, child] = numbers[..] else { panic!("{text}") };
        daemon.expect(1, is_event("established", net.inode));
        assert!(!start_server(SERVERS[0], LOCALHOST, port.try_into().unwrap()).wait().unwrap().success());
        let event = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        kill_process(Pid::from_raw(child.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
        assert_eq!(
            (&event["holder"]["pid"], &event["holder"]["comm"]),
            (&child.into(), &"sleep".into()),
            "{event}"
        );
        let opener = event["opener"]["comm"].as_str().unwrap();
        assert!(opener.starts_with("python3"), "{event}");
        daemon.stop();
    }
}
