//! Runs the commands of the documents word for word. Which of them can run depends on the programs that are
//! installed: a test VM has none.

use std::{
    fs,
    io::Read as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Output},
    time::Duration,
};

use socket2::Socket;

use super::audit::has_program;
use crate::support::{
    client::{assert_aborted, connect_to_self, connect_until_self, is_connected},
    daemon::{scaled, selfconn},
    helper_process::HelperProcess,
    netns::TestNetns,
};

const RUNBOOK: &str = include_str!("../../../../docs/runbook.md");
const REMEDIES: &str = include_str!("../../../../docs/remedies.md");

/// The lines of the first code block behind a heading, without comments.
fn code_block(page: &'static str, heading: &str) -> Vec<&'static str> {
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let mut lines = section.lines().map(str::trim).skip_while(|line| !line.starts_with("```")).skip(1);
    let lines = lines.by_ref().take_while(|line| !line.starts_with("```"));
    lines.map(|line| line.split("  #").next().unwrap().trim_end()).collect()
}

/// Runs a line in a shell that finds `selfconn`.
fn shell(line: &str) -> Output {
    let directory = selfconn().parent().unwrap().display().to_string();
    let path = format!("{directory}:{}", std::env::var("PATH").unwrap());
    Command::new("sh").args(["-c", line]).env("PATH", path).output().unwrap()
}

fn run(line: &str) {
    let output = shell(line);
    assert!(output.status.success(), "{line}: {output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("RTNETLINK"), "{line}: {output:?}");
}

/// True if the process has a connection of this port in its namespace.
fn has_connection(process: &HelperProcess, port: u16) -> bool {
    let table = fs::read_to_string(format!("/proc/{}/net/tcp", process.pid())).unwrap();
    let end = format!("0100007F:{port:04X}");
    table.lines().any(|line| line.contains(&format!(" {end} {end} ")))
}

/// Closes by an orderly close, which leaves a TIME_WAIT.
fn close_to_time_wait(socket: Socket, port: u16) {
    drop(socket);
    assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err(), "its TIME_WAIT has the port");
}

#[test]
fn each_line_of_the_runbook_frees_the_port_and_touches_nothing_else() {
    let net = TestNetns::enter_new();
    if !has_program("ss") || !has_program("nsenter") {
        return println!("skipped: ss or nsenter is not installed");
    }
    let lines = code_block(RUNBOOK, "SelfConnectionOpen");
    assert_eq!(lines.len(), 5, "{lines:?}");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (other, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    for line in lines {
        let addr: IpAddr =
            if line.contains("[ADDR]") { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let fill = |port: u16, pid: u32| {
            let line = line.replace("port=PORT", &format!("port={port} --only netns={}", net.inode));
            let line = line.replace("PORT", &port.to_string()).replace("ADDR", &addr.to_string());
            line.replace("PID", &pid.to_string())
        };
        if line.contains("PID") {
            let mut process = TestNetns::with_new_in_helper(|_| HelperProcess::start("connect"));
            let port = process.read_output().parse().unwrap();
            assert!(has_connection(&process, port));
            run(&fill(port, process.pid()));
            assert!(!has_connection(&process, port), "{line}");
            process.finish();
        } else if line.contains("time-wait") {
            let (socket, port) = connect_to_self(addr);
            close_to_time_wait(socket, port);
            run(&fill(port, 0));
            // Linux 5.10 can't destroy it.
            let bound = TcpListener::bind(SocketAddr::new(addr, port));
            assert!(bound.is_ok(), "{line}: {bound:?}");
        } else {
            let (socket, port) = connect_to_self(addr);
            run(&fill(port, 0));
            assert_aborted(&socket);
        }
        assert!(is_connected(&other), "{line}");
    }
    // The negative twin: where the self-connection is gone, a listener of that port stays.
    let port = listener.local_addr().unwrap().port();
    shell(&format!("ss -tK src 127.0.0.1:{port} dst 127.0.0.1:{port}"));
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
}

/// What `kill -9` leaves: TIME_WAIT, unless the socket had unread data.
#[test]
fn a_killed_process_leaves_time_wait_unless_it_had_unread_data() {
    let _net = TestNetns::enter_new();
    for has_unread_data in [false, true] {
        let (socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        if has_unread_data {
            socket.send(b"unread").unwrap();
        }
        let mut process = HelperProcess::start_with_fd("hold", &socket);
        process.read_output();
        drop(socket);
        process.kill();
        let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        assert_eq!(bound.is_ok(), has_unread_data, "{bound:?}");
    }
}

/// True if one of these attempts reaches its own socket, which then reads what it wrote.
fn reaches_itself(target: SocketAddr, attempts: usize) -> bool {
    (0..attempts).any(|_| {
        let socket = crate::support::client::socket(target.ip());
        // A SYN whose translation meets the one before it gets no answer.
        socket.connect_timeout(&target.into(), Duration::from_millis(200)).is_ok_and(|()| {
            socket.send(b"own").unwrap();
            let mut received = [0; 3];
            let read = (&socket).read(&mut received).unwrap();
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            &received[..read] == b"own"
        })
    })
}

fn has_iptables() -> bool {
    let has = has_program("iptables") && has_program("ip6tables") && has_program("ip");
    if !has {
        println!("skipped: iptables, ip6tables or ip is not installed");
    }
    has
}

#[test]
fn the_firewall_rule_of_the_remedies_refuses_a_self_connection_and_nothing_else() {
    let net = TestNetns::enter_new();
    if !has_iptables() {
        return;
    }
    net.set_sysctl("ip_local_port_range", "40000 40199");
    let targets = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
        .map(|ip: IpAddr| SocketAddr::new(ip, 40_100));
    // The negative twin: without the rule it is hit.
    for target in targets {
        assert!(connect_until_self(target, 2_000).is_some(), "{target}");
    }
    for rule in code_block(REMEDIES, "Refuse it by a firewall rule") {
        run(rule);
    }
    for target in targets.map(|target| SocketAddr::new(target.ip(), 40_102)) {
        assert!(connect_until_self(target, scaled(10_000)).is_none(), "{target}");
        let listener = TcpListener::bind(target).unwrap();
        TcpStream::connect(target).unwrap();
        drop(listener);
    }
}

#[test]
fn a_connection_that_is_translated_back_reaches_itself_only_if_its_source_is_translated_too() {
    let net = TestNetns::enter_new();
    if !has_iptables() {
        return;
    }
    net.set_sysctl("ip_local_port_range", "40000 40199");
    net.add_address(Ipv4Addr::new(10, 1, 1, 1));
    run("ip route add 10.96.0.9/32 dev lo src 10.1.1.1");
    let service = SocketAddr::from(([10, 96, 0, 9], 40_100));
    let dnat =
        "iptables -t nat -A OUTPUT -p tcp -d 10.96.0.9 --dport 40100 -j DNAT --to-destination 10.1.1.1:40100";
    let attempts = scaled(10_000);
    run("iptables -t nat -A OUTPUT -p tcp -d 127.0.0.1 --dport 80 -j REDIRECT --to-ports 40100");
    assert!(!reaches_itself(SocketAddr::from((Ipv4Addr::LOCALHOST, 80)), attempts), "REDIRECT");
    run(dnat);
    assert!(!reaches_itself(service, attempts), "DNAT");
    run("iptables -t nat -A POSTROUTING -j MASQUERADE");
    assert!(!reaches_itself(service, attempts), "DNAT and MASQUERADE");
    run("iptables -t nat -F POSTROUTING");
    run("iptables -t nat -A POSTROUTING -p tcp -d 10.1.1.1 --dport 40100 -j SNAT --to-source 10.96.0.9");
    assert!(reaches_itself(service, attempts), "DNAT and SNAT to the address of the service");
}
