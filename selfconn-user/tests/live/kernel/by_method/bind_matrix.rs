//! Which bind a self-connection is in the way of: for each pair of a self-connection and a server, the kernel's own
//! answer is compared with whether `blocked` is reported, by each bind method. A bind that only another server is in
//! the way of must not be reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{
    bind_methods::{bind_methods, start},
    client::{NOBODY, become_user},
    devices::bind_device,
    netns::TestNetns,
};

/// The programs report at most fifty failed binds of a user in a second.
const FAILURE_INTERVAL: Duration = Duration::from_millis(25);

/// The device beside `lo`.
const DEVICE: &str = "bind0";

/// Who chose the port of a self-connection.
#[derive(Clone, Copy, Debug)]
enum Port {
    /// connect().
    Chosen,
    /// The program, at the address that it connects to.
    Named,
    /// The program, at any address.
    NamedAtAny,
}

/// Options of a socket.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    reuse: bool,
    reuseport: bool,
    v6only: bool,
    device: Option<&'static str>,
    mptcp: bool,
    /// It belongs to a user without privileges.
    nobody: bool,
}

const PLAIN: Options =
    Options { reuse: false, reuseport: false, v6only: false, device: None, mptcp: false, nobody: false };
const V6ONLY: Options = Options { v6only: true, ..PLAIN };
const MPTCP: Options = Options { mptcp: true, ..PLAIN };
const SHARING: [(&str, Options); 4] = [
    ("-", PLAIN),
    ("reuseaddr", Options { reuse: true, ..PLAIN }),
    ("reuseport", Options { reuseport: true, ..PLAIN }),
    ("both", Options { reuse: true, reuseport: true, ..PLAIN }),
];

#[derive(Clone, Copy, Debug)]
struct Client(&'static str, Port, Options);

/// A server with its name in the printed matrix.
#[derive(Clone, Copy, Debug)]
struct Server(&'static str, &'static str, Options);

const SERVERS: [Server; 10] = [
    Server("0.0.0.0", "0.0.0.0", PLAIN),
    Server("127.0.0.1", "127.0.0.1", PLAIN),
    Server("127.0.0.2", "127.0.0.2", PLAIN),
    Server("::", "::", PLAIN),
    Server("::-v6only", "::", V6ONLY),
    Server("::1", "::1", PLAIN),
    Server("::ffff:127.0.0.1", "::ffff:127.0.0.1", PLAIN),
    Server("::ffff:0.0.0.0", "::ffff:0.0.0.0", PLAIN),
    Server("127.0.0.1-mptcp", "127.0.0.1", MPTCP),
    Server("::-mptcp-v6only", "::", Options { v6only: true, ..MPTCP }),
];

impl Options {
    /// A socket with these options.
    fn socket(self, address: SocketAddr) -> io::Result<Socket> {
        let make = move || {
            let protocol = self.mptcp.then_some(Protocol::MPTCP);
            if self.nobody {
                become_user(NOBODY);
            }
            Socket::new(Domain::for_address(address), Type::STREAM, protocol)
        };
        let socket = thread::spawn(make).join().unwrap()?;
        socket.set_reuse_address(self.reuse)?;
        socket.set_reuse_port(self.reuseport)?;
        if address.is_ipv6() {
            socket.set_only_v6(self.v6only)?;
        }
        if let Some(device) = self.device {
            bind_device(&socket, device);
        }
        Ok(socket)
    }
}

impl Client {
    /// Makes the self-connection.
    fn connect(self, net: TestNetns, port: u16) -> io::Result<Socket> {
        let Self(address, chosen_by, options) = self;
        let ip: IpAddr = address.parse().unwrap();
        let target = SocketAddr::new(ip, port);
        let socket = options.socket(target)?;
        let any: IpAddr = if ip.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        match chosen_by {
            // A range of one port: the first attempt hits itself.
            Port::Chosen => net.set_sysctl("ip_local_port_range", &format!("{port} {port}")),
            Port::Named => socket.bind(&target.into())?,
            Port::NamedAtAny => socket.bind(&SocketAddr::new(any, port).into())?,
        }
        socket.connect(&target.into())?;
        assert_eq!(socket.local_addr()?.as_socket(), socket.peer_addr()?.as_socket(), "{self:?}");
        Ok(socket)
    }
}

/// The kernel's answers so far. Each pair has a port of its own, by which its event is found.
struct Matrix {
    net: TestNetns,
    next_port: u16,
    /// By port: what was tried, and whether the kernel refused the bind because of the self-connection.
    answers: BTreeMap<u16, (String, bool)>,
    last_failure: Instant,
    longest_bind: Duration,
}

impl Matrix {
    /// Tries each server beside each of the client's states. Prints a line for each state.
    fn try_all(&mut self, name: &str, client: Client, servers: &[Server]) {
        for is_open in [true, false] {
            let state = if is_open { "ESTABLISHED" } else { "TIME_WAIT" };
            let mut line = String::new();
            for server in servers {
                let mark = match self.try_pair(client, *server, is_open) {
                    Some(true) => "refused",
                    Some(false) => "binds",
                    None => "n/a",
                };
                line += &format!(" {}={mark}", server.0);
            }
            println!("MATRIX {name} {state}:{line}");
        }
    }

    /// `None`: this kernel has no such socket.
    fn try_pair(&mut self, client: Client, server: Server, is_open: bool) -> Option<bool> {
        self.next_port += 1;
        let port = self.next_port;
        let connection = match client.connect(self.net, port) {
            Ok(connection) => connection,
            Err(error) if client.2.mptcp => return is_unsupported(&error),
            Err(error) => panic!("{client:?}: {error}"),
        };
        let connection = is_open.then_some(connection);
        let Server(_, address, options) = server;
        let address = SocketAddr::new(address.parse().unwrap(), port);
        let socket = || options.socket(address);
        let first = match socket() {
            Ok(first) => first,
            Err(error) if options.mptcp => return is_unsupported(&error),
            Err(error) => panic!("{server:?}: {error}"),
        };
        let began = Instant::now();
        let outcome = first.bind(&address.into());
        self.longest_bind = self.longest_bind.max(began.elapsed());
        let is_refused = match outcome {
            Ok(()) => false,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{client:?} {server:?}: {error}");
                true
            }
        };
        if !is_refused {
            // The next server with the same request fails because of this one, unless both share the port.
            first.listen(1).unwrap();
            let second = socket().unwrap();
            let is_shared = second.bind(&address.into()).is_ok();
            assert!(!is_shared || options.reuseport, "{server:?}");
        }
        thread::sleep(FAILURE_INTERVAL.saturating_sub(self.last_failure.elapsed()));
        self.last_failure = Instant::now();
        self.answers.insert(port, (format!("{client:?}, open: {is_open}; {server:?}"), is_refused));
        drop(connection);
        Some(is_refused)
    }
}

#[track_caller]
fn is_unsupported(error: &io::Error) -> Option<bool> {
    assert!(matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::ENOPROTOOPT)), "{error}");
    None
}

#[test]
fn a_bind_is_reported_exactly_where_the_kernel_refuses_it_because_of_a_self_connection() {
    let net = TestNetns::enter_new();
    let has_device = net.add_veth_pair([DEVICE, "bind1"]).is_ok();
    // Each comparison with the socket table clears the ports that nothing holds any more.
    let start = |method| (method, start(method, &["--reconcile", "1"]));
    let daemons: Vec<_> = bind_methods().into_iter().map(start).collect();
    let last_failure = Instant::now();
    let mut matrix = Matrix {
        net,
        next_port: 40_000,
        answers: BTreeMap::new(),
        last_failure,
        longest_bind: Duration::ZERO,
    };

    for (name, client) in [
        ("v4 chosen", Client("127.0.0.1", Port::Chosen, PLAIN)),
        ("v4 named", Client("127.0.0.1", Port::Named, PLAIN)),
        ("v4 named at any", Client("127.0.0.1", Port::NamedAtAny, PLAIN)),
        ("v6 chosen", Client("::1", Port::Chosen, PLAIN)),
        ("v6 chosen, v6only", Client("::1", Port::Chosen, V6ONLY)),
        ("v6 named", Client("::1", Port::Named, PLAIN)),
        ("v6 named at any", Client("::1", Port::NamedAtAny, PLAIN)),
        ("mapped chosen", Client("::ffff:127.0.0.1", Port::Chosen, PLAIN)),
        ("mapped named", Client("::ffff:127.0.0.1", Port::Named, PLAIN)),
        ("mapped named at any", Client("::ffff:127.0.0.1", Port::NamedAtAny, PLAIN)),
        ("mptcp v4 named", Client("127.0.0.1", Port::Named, MPTCP)),
        ("v4 named, of nobody", Client("127.0.0.1", Port::Named, Options { nobody: true, ..PLAIN })),
    ] {
        matrix.try_all(name, client, &SERVERS);
    }
    for (shared, options) in SHARING {
        let servers: Vec<Server> =
            SHARING.iter().map(|(name, options)| Server(name, "127.0.0.1", *options)).collect();
        matrix.try_all(&format!("{shared} named"), Client("127.0.0.1", Port::Named, options), &servers);
        let options = Options { nobody: true, ..options };
        matrix.try_all(
            &format!("{shared} chosen, of nobody"),
            Client("127.0.0.1", Port::Chosen, options),
            &servers,
        );
        let servers = SHARING.map(|(name, options)| Server(name, "0.0.0.0", options));
        matrix.try_all(&format!("{shared} chosen"), Client("::1", Port::Chosen, options), &servers);
    }
    let device = |name| Options { device: Some(name), ..PLAIN };
    let mut servers = vec![Server("no-device", "127.0.0.1", PLAIN), Server("lo", "127.0.0.1", device("lo"))];
    if has_device {
        servers.push(Server("another-device", "127.0.0.1", device(DEVICE)));
    }
    for (name, options) in [("no device", PLAIN), ("on lo", device("lo"))] {
        matrix.try_all(name, Client("127.0.0.1", Port::Named, options), &servers);
    }

    let refused: BTreeSet<u16> =
        matrix.answers.iter().filter(|(_, (_, is_refused))| *is_refused).map(|(port, _)| *port).collect();
    println!("FACT bind_matrix pairs={} refused={}", matrix.answers.len(), refused.len());
    assert!(refused.len() > 100 && matrix.answers.len() - refused.len() > 100, "{}", matrix.answers.len());
    for (method, daemon) in daemons {
        let (events, _) = daemon.stop();
        // On a preemptible kernel: see `bind_preemption`.
        let end = events.last().unwrap();
        let not_examined = end["binds_not_examined"].as_u64().unwrap_or(0);
        println!(
            "FACT bind_matrix method={method} not_examined={not_examined} lost={} longest_bind={:?}",
            end["lost"]["binds"], matrix.longest_bind
        );
        let is_blocked =
            |event: &&serde_json::Value| event["event"] == "blocked" && event["netns"] == net.inode;
        let blocked: BTreeSet<u16> = events
            .iter()
            .filter(is_blocked)
            .map(|event| u16::try_from(event["port"].as_u64().unwrap()).unwrap())
            .collect();
        let describe = |port: &u16| {
            let (what, is_refused) = &matrix.answers[port];
            let of_port = events.iter().filter(|event| event["port"] == *port);
            let seen: Vec<_> = of_port.map(|event| format!("{} {}", event["event"], event["time"])).collect();
            format!("{port}: {what}: refused: {is_refused}; events: {seen:?}")
        };
        let wrong: Vec<String> = blocked.difference(&refused).map(describe).collect();
        assert!(wrong.is_empty(), "{method}: reported, but not refused: {wrong:#?}");
        let missing: Vec<String> = refused.difference(&blocked).map(describe).collect();
        assert!(
            missing.len() as u64 <= not_examined,
            "{method}: not reported, {not_examined} not examined: {missing:#?}\n{end:#?}"
        );
    }
}
