//! The guard, by each method that attaches it here: what a program sees of a refused connect, and what passes.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{
    client::{
        NOBODY, assert_opened_by_this_thread, become_user, connect_to_self, connect_until_self,
        enable_fastopen_connect, run_self_connection, socket,
    },
    daemon::{HookVariant, TestDaemon, is_event, scaled},
    guard::{
        ConnectOutcome, closed_port, connect, connect_itself, count_of, guard_methods, opened, outcome_of,
        refusing, tcp_counter, wait_until,
    },
    netns::TestNetns,
};

const ECONNREFUSED: i32 = 111;
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A kind of client: makes a socket, and connects it.
struct Client {
    name: &'static str,
    socket: fn(IpAddr) -> Socket,
    connect: fn(&Socket, SocketAddr) -> ConnectOutcome,
}

fn blocking(address: IpAddr) -> Socket {
    socket(address)
}

fn non_blocking(address: IpAddr) -> Socket {
    let socket = socket(address);
    socket.set_nonblocking(true).unwrap();
    socket
}

fn fastopen(address: IpAddr) -> Socket {
    let socket = socket(address);
    enable_fastopen_connect(&socket);
    socket
}

/// The SYN has the data.
fn connect_by_send(mut socket: &Socket, target: SocketAddr) -> ConnectOutcome {
    let connected = socket.connect(&target.into());
    let sent = connected.and_then(|()| socket.write(b"data").map(|_| ()));
    outcome_of(socket, sent.err().map_or(0, |error| error.raw_os_error().unwrap()))
}

fn mptcp(address: IpAddr) -> Socket {
    let domain = Domain::for_address(SocketAddr::new(address, 0));
    Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP)).unwrap()
}

/// Its packets have more than the plain header of IPv4, or extension headers of IPv6.
fn with_ip_options(address: IpAddr) -> Socket {
    let socket = socket(address);
    // IPv4: three times "no operation", and the end. IPv6: four bytes of padding.
    let (level, options): (_, &[(_, &[u8])]) = match address {
        IpAddr::V4(_) => (libc::IPPROTO_IP, &[(libc::IP_OPTIONS, &[1, 1, 1, 0])]),
        IpAddr::V6(_) => (
            libc::IPPROTO_IPV6,
            &[
                (libc::IPV6_HOPOPTS, &[0, 0, 1, 4, 0, 0, 0, 0]),
                (libc::IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0]),
            ],
        ),
    };
    for (option, value) in options {
        // SAFETY: the options take a pointer to bytes, and their number.
        let outcome = unsafe {
            let len = value.len() as libc::socklen_t;
            libc::setsockopt(socket.as_raw_fd(), level, *option, value.as_ptr().cast(), len)
        };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    }
    socket
}

/// Runs `work` in a thread of its own. The end of a ring interrupts the thread that made it, at some later time. A fast
/// open that is interrupted is restarted, and poll then has IN, for a closed port, too (`inet_wait_for_connect`,
/// net/ipv4/af_inet.c, and `io_ring_exit_work`, io_uring/io_uring.c at v6.12).
fn in_another_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// The connect is made by a worker thread of the kernel, as its caller.
fn connect_by_io_uring(socket: &Socket, target: SocketAddr) -> ConnectOutcome {
    let connect = || {
        let mut ring = io_uring::IoUring::new(2).unwrap();
        let target = socket2::SockAddr::from(target);
        let fd = io_uring::types::Fd(socket.as_raw_fd());
        let connect = io_uring::opcode::Connect::new(fd, target.as_ptr().cast(), target.len());
        let connect = connect.build().flags(io_uring::squeue::Flags::ASYNC);
        // SAFETY: the socket and the address outlive the wait below, after which the kernel no longer uses them.
        unsafe { ring.submission().push(&connect) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        outcome_of(socket, -ring.completion().next().unwrap().result())
    };
    in_another_thread(connect)
}

fn clients() -> Vec<Client> {
    let mut clients = vec![
        Client { name: "blocking", socket: blocking, connect },
        Client { name: "non-blocking", socket: non_blocking, connect },
        Client { name: "fast open", socket: fastopen, connect: connect_by_send },
        Client { name: "with IP options", socket: with_ip_options, connect },
    ];
    match in_another_thread(|| io_uring::IoUring::new(2).map(drop)) {
        Ok(()) => clients.push(Client { name: "io_uring", socket: blocking, connect: connect_by_io_uring }),
        Err(error) => println!("FACT no_io_uring={error}"),
    }
    if Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).is_ok() {
        clients.push(Client { name: "MPTCP", socket: mptcp, connect });
    }
    clients
}

#[test]
fn a_refused_connect_to_itself_looks_like_a_closed_port() {
    let net = TestNetns::enter_new();
    net.set_sysctl("tcp_fastopen", "5");
    net.add_address(Ipv4Addr::new(192, 0, 2, 1));
    let link_local: Ipv6Addr = "fe80::1".parse().unwrap();
    net.add_address_v6(link_local);
    let mapped: Ipv6Addr = "::ffff:127.0.0.1".parse().unwrap();
    let addresses = [
        SocketAddr::new(LOCALHOST, 0),
        SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0),
        SocketAddr::new(mapped.into(), 0),
        SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), 0),
        SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
        SocketAddrV6::new(link_local, 0, 0, 1).into(),
    ];
    for method in guard_methods() {
        let mut daemon = refusing(method, &[]);
        let mut refused = 0;
        for address in addresses {
            for Client { name, socket, connect } in clients() {
                let to_itself = socket(address.ip());
                to_itself.bind(&address.into()).unwrap();
                let mut own = to_itself.local_addr().unwrap().as_socket().unwrap();
                own.set_ip(address.ip());
                let (began, outcome) = (Instant::now(), connect(&to_itself, own));
                let took = began.elapsed();
                refused += 1;
                let closed = socket(address.ip());
                closed.bind(&address.into()).unwrap();
                let expected = connect(&closed, closed_port(address));
                assert_eq!(
                    outcome, expected,
                    "{method}, {name} to {address}: left refused, right closed port"
                );
                assert_eq!(if outcome.errno == 115 { outcome.error } else { outcome.errno }, ECONNREFUSED);
                assert!(took < Duration::from_secs(1), "{method}, {name} to {address}: {took:?}");
            }
        }
        // The port is free at once.
        let listener = TcpListener::bind((LOCALHOST, 0)).unwrap();
        drop(listener);
        daemon.expect(refused, is_event("prevented", net.inode));
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), refused as u64);
        assert!(!events.iter().any(is_event("established", net.inode)), "{method}");
        for event in opened(&events, net.inode) {
            match event["thread_comm"].as_str() {
                // The worker of io_uring is another thread of this process.
                Some(name) if name.starts_with("iou-wrk-") => assert_eq!(event["pid"], std::process::id()),
                _ => assert_opened_by_this_thread(event),
            }
            assert_eq!((&event["mode"], &event["cause"]), (&"refuse".into(), &"bound".into()));
            assert!(event["cookie"].is_u64(), "{event}");
        }
        assert_eq!(tcp_counter("InCsumErrors").unwrap(), 0, "{method}");
        // The unguarded twin.
        assert!(addresses[..4].iter().all(|address| connect_itself(address.ip()).is_connected), "{method}");
    }
}

#[test]
fn a_dry_run_reports_what_would_be_refused_and_refuses_nothing() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let options = ["--guard", "dry-run", "--guard-own-netns", "--guard-method", method];
        let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
        let port = run_self_connection(LOCALHOST);
        let prevented = daemon.expect(1, is_event("prevented", net.inode)).remove(0);
        assert_eq!(
            (&prevented["mode"], &prevented["port"]),
            (&"dry-run".into(), &port.into()),
            "{prevented}"
        );
        assert_opened_by_this_thread(&prevented);
        daemon.expect(1, is_event("established", net.inode));
        daemon.stop();
    }
}

#[test]
fn without_the_guard_nothing_is_refused_and_nothing_reported() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    assert!(connect_itself(LOCALHOST).is_connected);
    daemon.expect(1, is_event("established", net.inode));
    let (events, _) = daemon.stop();
    assert_eq!(count_of(&events), 0);
    assert_eq!(events[0]["guard"]["mode"], "off");
}

#[test]
fn a_connect_that_takes_over_a_time_wait_is_refused_at_once() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let target = closed_port(SocketAddr::new(LOCALHOST, 0));
        let port = target.port();
        net.set_sysctl("ip_local_port_range", &format!("{port} {port}"));
        // Closed in order, so the port is in TIME_WAIT. A connect takes it over from a second later on.
        drop(connect_until_self(target, 10).unwrap());
        let daemon = refusing(method, &[]);
        thread::sleep(Duration::from_millis(1_200));
        let (mut took, mut outcome) = (Duration::ZERO, None);
        let sent_again = tcp_counter("RetransSegs").unwrap();
        wait_until(Duration::from_secs(20), "the TIME_WAIT is never taken over", || {
            const EADDRNOTAVAIL: i32 = 99;
            let began = Instant::now();
            let attempt = connect(&socket(LOCALHOST), (LOCALHOST, port).into());
            (took, outcome) = (began.elapsed(), Some(attempt));
            attempt.errno != EADDRNOTAVAIL
        });
        assert_eq!(outcome.unwrap().errno, ECONNREFUSED, "{method}: {outcome:?}");
        // A SYN whose answer the socket drops is sent again for two minutes, the first time after a second.
        let sent_again = tcp_counter("RetransSegs").unwrap() - sent_again;
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), 1, "{method}: {took:?}");
        assert_eq!(sent_again, 0, "{method}: {took:?}");
        let limit = Duration::from_millis(if scaled(100) == 100 { 50 } else { 900 });
        assert!(took < limit, "{method}: {took:?}");
        net.set_sysctl("ip_local_port_range", "32768 60999");
    }
}

#[test]
fn a_client_that_retries_never_takes_the_port_and_finds_the_server_when_it_is_back() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        let target = SocketAddr::new(LOCALHOST, 40_100);
        for _ in 0..scaled(200_000 / guard_methods().len()) {
            let outcome = TcpStream::connect(target);
            assert_eq!(outcome.unwrap_err().raw_os_error(), Some(ECONNREFUSED), "{method}");
        }
        let server = TcpListener::bind(target).unwrap();
        let client = TcpStream::connect(target).unwrap();
        let (accepted, from) = server.accept().unwrap();
        assert_eq!((accepted.local_addr().unwrap(), from), (target, client.local_addr().unwrap()));
        drop((client, accepted, server));
        let (events, _) = daemon.stop();
        assert!(!events.iter().any(is_event("established", net.inode)), "{method}");
        // Each 200th connect or so has the port.
        let expected = scaled(200_000 / guard_methods().len()) as u64 / 200;
        let prevented = count_of(&events);
        assert!(expected < 20 || (expected / 4..expected * 4).contains(&prevented), "{method}: {prevented}");
        assert_eq!(tcp_counter("InCsumErrors").unwrap(), 0, "{method}");
    }
}

#[test]
fn the_counts_of_the_events_are_the_clients_own() {
    let net = TestNetns::enter_new();
    let count = scaled(10_000);
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        // The daemon reads nothing meanwhile, so the ring buffer is full.
        daemon.signal(rustix::process::Signal::STOP);
        for _ in 0..count {
            assert!(!connect_itself(LOCALHOST).is_connected);
        }
        daemon.signal(rustix::process::Signal::CONT);
        thread::sleep(Duration::from_millis(1_500));
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), count as u64, "{method}");
        let unknown = |event: &&serde_json::Value| event["event"] == "prevented" && event["pid"].is_null();
        let lost: u64 = events.iter().filter(unknown).map(|event| event["count"].as_u64().unwrap()).sum();
        assert!(count < 10_000 || lost > 0, "the ring buffer was not full");
        for event in opened(&events, net.inode) {
            assert_opened_by_this_thread(event);
        }
    }
}

#[test]
fn a_flood_of_refused_connects_takes_no_name_of_another_user() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let mut daemon = refusing(method, &[]);
        // The daemon reads nothing meanwhile. Without shares the flood fills the ring buffer, and all events of a
        // second.
        daemon.signal(rustix::process::Signal::STOP);
        // While it is stopped, the rate of one user alone fills the ring buffer in 30 seconds.
        let (began, mut attempts) = (Instant::now(), 0);
        while attempts < 5_000 && began.elapsed() < Duration::from_secs(10) {
            assert!(!connect_itself(LOCALHOST).is_connected);
            attempts += 1;
        }
        let other = thread::spawn(|| {
            become_user(NOBODY);
            assert!(!connect_itself(LOCALHOST).is_connected);
        });
        other.join().unwrap();
        daemon.signal(rustix::process::Signal::CONT);
        let is_others = |event: &serde_json::Value| {
            is_event("prevented", net.inode)(event) && event["uid"] == NOBODY && event["pid"].is_u64()
        };
        daemon.expect(1, is_others);
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), attempts + 1, "{method}");
    }
}

#[test]
fn names_are_right_if_packets_wait_in_a_queue_and_on_another_cpu() {
    let net = TestNetns::enter_new();
    if let Err(error) = net.add_netem_delay() {
        return println!("FACT no_netem={error}");
    }
    net.enable_rps();
    for method in guard_methods() {
        let mut daemon = refusing(method, &[]);
        for _ in 0..scaled(50) {
            assert!(!connect_itself(LOCALHOST).is_connected);
        }
        daemon.expect(scaled(50), is_event("prevented", net.inode));
        let (events, _) = daemon.stop();
        for event in opened(&events, net.inode) {
            assert_opened_by_this_thread(event);
        }
    }
}

/// Signs the segments to and from this address, by TCP-MD5. False: the kernel has no TCP-MD5.
fn sign(socket: &Socket, peer: Ipv4Addr) -> bool {
    const TCP_MD5SIG: libc::c_int = 14;
    /// `struct tcp_md5sig`, include/uapi/linux/tcp.h at v5.10.
    #[repr(C)]
    struct Md5 {
        family: u16,
        port: u16,
        addr: [u8; 4],
        rest: [u8; 120],
        flags: u8,
        prefix_len: u8,
        key_len: u16,
        ifindex: i32,
        key: [u8; 80],
    }
    let signature = Md5 {
        family: libc::AF_INET as u16,
        port: 0,
        addr: peer.octets(),
        rest: [0; 120],
        flags: 0,
        prefix_len: 0,
        key_len: 3,
        ifindex: 0,
        key: std::array::from_fn(|at| b"key".get(at).copied().unwrap_or(0)),
    };
    // SAFETY: the option takes a pointer to a struct tcp_md5sig and its size.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_MD5SIG,
            (&raw const signature).cast(),
            size_of::<Md5>() as libc::socklen_t,
        )
    };
    outcome == 0
}

/// Signs the segments to and from this address, by TCP-AO. False: the kernel has no TCP-AO.
fn authenticate(socket: &Socket, peer: Ipv4Addr) -> bool {
    const TCP_AO_ADD_KEY: libc::c_int = 38;
    /// `struct tcp_ao_add`, include/uapi/linux/tcp.h at v6.7.
    #[repr(C, align(8))]
    struct Ao {
        family: u16,
        port: u16,
        addr: [u8; 4],
        rest: [u8; 120],
        algorithm: [u8; 64],
        ifindex: i32,
        flags: u32,
        reserved: u16,
        prefix: u8,
        send_id: u8,
        receive_id: u8,
        mac_len: u8,
        key_flags: u8,
        key_len: u8,
        key: [u8; 80],
    }
    let padded = |text: &[u8], at: usize| text.get(at).copied().unwrap_or(0);
    let key = Ao {
        family: libc::AF_INET as u16,
        port: 0,
        addr: peer.octets(),
        rest: [0; 120],
        algorithm: std::array::from_fn(|at| padded(b"hmac(sha1)", at)),
        ifindex: 0,
        flags: 0,
        reserved: 0,
        prefix: 32,
        send_id: 100,
        receive_id: 100,
        mac_len: 0,
        key_flags: 0,
        key_len: 3,
        key: std::array::from_fn(|at| padded(b"key", at)),
    };
    // SAFETY: the option takes a pointer to a struct tcp_ao_add and its size.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_AO_ADD_KEY,
            (&raw const key).cast(),
            size_of::<Ao>() as libc::socklen_t,
        )
    };
    outcome == 0
}

#[test]
fn a_signed_connect_passes_because_a_rewritten_one_would_fail_its_signature() {
    TestNetns::enter_new();
    let connect_signed = |sign: fn(&Socket, Ipv4Addr) -> bool| {
        let socket = socket(LOCALHOST);
        socket.bind(&SocketAddr::new(LOCALHOST, 0).into()).unwrap();
        if !sign(&socket, Ipv4Addr::LOCALHOST) {
            return Err(std::io::Error::last_os_error());
        }
        let own = socket.local_addr().unwrap().as_socket().unwrap();
        Ok(connect(&socket, own))
    };
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        for (name, sign) in [("md5", sign as fn(&Socket, Ipv4Addr) -> bool), ("ao", authenticate)] {
            match connect_signed(sign) {
                Err(error) => println!("FACT no_{name}={error}"),
                Ok(outcome) => {
                    println!("FACT signed_by={name}");
                    assert!(outcome.is_connected, "{method}, {name}: {outcome:?}");
                }
            }
        }
        // The unsigned neighbour.
        assert!(!connect_itself(LOCALHOST).is_connected);
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), 1);
    }
}

#[test]
fn an_ordinary_connection_passes_the_guard_unchanged() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        for address in [LOCALHOST, Ipv6Addr::LOCALHOST.into()] {
            let server = TcpListener::bind((address, 0)).unwrap();
            let mut client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
            let (mut accepted, _) = server.accept().unwrap();
            let data = vec![7; 1 << 20];
            let sender = thread::spawn(move || {
                client.write_all(&data).unwrap();
                client
            });
            let mut received = Vec::new();
            let mut chunk = vec![0; 1 << 16];
            while received.len() < 1 << 20 {
                let read = accepted.read(&mut chunk).unwrap();
                received.extend_from_slice(&chunk[..read]);
            }
            drop(sender.join().unwrap());
            assert!(received.iter().all(|byte| *byte == 7));
        }
        let (events, _) = daemon.stop();
        assert!(!events.iter().any(is_event("prevented", net.inode)), "{method}");
    }
    assert!(connect_to_self(LOCALHOST).0.peer_addr().is_ok());
}
