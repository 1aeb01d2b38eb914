//! The table of dials in flight: what it holds, and what happens when it is full.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::Barrier,
    thread,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use selfconn::kernel::{
    attach::Wanted,
    host::Host,
    tracer::{Options, Tracer},
};
use selfconn_ebpf::{Dial, names};
use socket2::{SockRef, Socket};

use crate::{
    client::{connect_to_self, dial_until_self, socket},
    daemon::{Daemon, Variant, of, scaled},
    net::Net,
    role::Role,
};

fn with_tracer(work: impl FnOnce(&mut Tracer)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = Options {
            wanted: Wanted::default(),
            binds: selfconn::kernel::tracer::binds::WantedBinds::Off,
            ring_bytes: 1 << 16,
            refusals: 8,
            dials: 1 << 14,
            states: false,
            log: false,
        };
        work(&mut Tracer::start(&Host::look(false).unwrap(), options).unwrap());
    });
}

/// How many dials of a namespace are remembered.
fn remembered(tracer: &Tracer, net: Net) -> usize {
    tracer.remembered().unwrap().iter().filter(|(_, dial)| u64::from(dial.tuple.netns) == net.inode).count()
}

/// Opens `count` ordinary loopback connections to one server.
fn ordinary_connections(count: usize) -> Vec<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = listener.local_addr().unwrap();
    let connect = |_| {
        let client = TcpStream::connect(server).unwrap();
        // No TIME_WAIT, which would use up the ports.
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        (client, listener.accept().unwrap().0)
    };
    (0..count).map(connect).collect()
}

#[test]
fn ordinary_connections_held_open_and_opened_again_leave_nothing_behind() {
    use rustix::{
        process::{Resource, Rlimit, getrlimit, setrlimit},
        thread::{UnshareFlags, unshare_unsafe},
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    // Two descriptors for each connection, and some for everything else.
    let each = usize::try_from(maximum.unwrap_or(20_000).min(20_000)).unwrap() / 2 - 100;
    let net = Net::private();
    let total = scaled(100_000);
    with_tracer(|tracer| {
        for _ in 0..2 {
            let hold = Barrier::new(total.div_ceil(each) + 1);
            thread::scope(|scope| {
                for from in (0..total).step_by(each) {
                    let (hold, count) = (&hold, each.min(total - from));
                    scope.spawn(move || {
                        // SAFETY: a table of descriptors of this thread's own; it uses none but those that it opens
                        // from here on, and closes them itself.
                        unsafe { unshare_unsafe(UnshareFlags::FILES) }.unwrap();
                        let connections = ordinary_connections(count);
                        hold.wait();
                        hold.wait();
                        drop(connections);
                    });
                }
                hold.wait();
                assert_eq!(remembered(tracer, net), 0, "while {total} connections are open");
                hold.wait();
            });
            assert_eq!(remembered(tracer, net), 0, "after {total} connections were open");
        }
        assert!(tracer.counters().unwrap().not_remembered == 0);
    });
}

#[test]
fn refused_dials_leave_nothing_behind() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", "40000 40199");
    with_tracer(|tracer| {
        // An odd port is never hit.
        let closed = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 40_101);
        assert!(dial_until_self(closed, scaled(20_000)).is_none());
        assert_eq!(remembered(tracer, net), 0);
    });
}

#[test]
fn a_self_connection_is_remembered_until_it_ends() {
    let net = Net::private();
    with_tracer(|tracer| {
        let (connection, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        assert_eq!(remembered(tracer, net), 1);
        let (_, dial) =
            tracer.remembered().unwrap().into_iter().find(|(_, dial)| dial.tuple.dport == port).unwrap();
        assert_eq!(dial.opener.task.pid, std::process::id());
        drop(connection);
        assert_eq!(remembered(tracer, net), 0);
    });
}

/// Dials of a server that takes no more: their SYNs are dropped, and they stay on their way.
pub(crate) fn unanswered(count: usize) -> (TcpListener, Vec<Socket>) {
    let listener = socket(Ipv4Addr::LOCALHOST.into());
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let server = listener.local_addr().unwrap();
    let dial = |_| {
        let client = socket(Ipv4Addr::LOCALHOST.into());
        client.set_nonblocking(true).unwrap();
        let _ = client.connect(&server);
        client
    };
    (listener.into(), (0..count).map(dial).collect())
}

#[test]
fn a_full_table_names_nobody_and_says_so() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--dials", "1", "-vv"]);
    // The table of one is full once any socket of this host has connected to itself.
    let connections: Vec<_> = thread::scope(|scope| {
        let connect = || connect_to_self(Ipv4Addr::LOCALHOST.into());
        (0..3).map(|_| scope.spawn(connect).join().unwrap()).collect()
    });
    let established = daemon.expect(3, of("established", net.inode));
    let unnamed: Vec<_> = established.iter().filter(|event| event["pid"].is_null()).collect();
    assert!(unnamed.len() >= 2, "{established:#?}");
    for event in unnamed {
        for unknown in ["tid", "comm", "thread_comm", "uid", "cause", "owner"] {
            assert!(event[unknown].is_null(), "{unknown} in {event}");
        }
    }
    drop(connections);
    daemon.expect(3, of("closed", net.inode));
    let (_, stderr) = daemon.stop();
    assert!(stderr.contains("kernel: the table of dials is full"), "{stderr}");
}

/// The table of dials of a running daemon.
fn dials_of(daemon: &Daemon) -> HashMap<MapData, u64, [u8; size_of::<Dial>()]> {
    let descriptors = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
    let map_id =
        |text: String| text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok());
    let ids = descriptors.filter_map(|entry| map_id(std::fs::read_to_string(entry.unwrap().path()).ok()?));
    let of_dials = |id: u32| {
        let map = MapData::from_id(id).unwrap();
        (map.info().unwrap().name_as_str() == Some(names::DIALS)).then_some(map)
    };
    let map = ids.into_iter().find_map(of_dials).expect("the daemon has the map open");
    HashMap::try_from(Map::HashMap(map)).unwrap()
}

#[test]
fn an_entry_whose_socket_is_gone_is_swept_and_one_whose_socket_lives_stays() {
    let net = Net::private();
    // A reading finds namespaces by their processes, and this one is a thread's.
    let mut inhabitant = Role::start("wait");
    inhabitant.says();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let (socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, of("established", net.inode));
    let mut dials = dials_of(&daemon);
    let of_port = |dials: &HashMap<_, u64, [u8; size_of::<Dial>()]>, port: u16| {
        // SAFETY: the programs wrote a Dial there, of integers and byte arrays.
        let dial = |bytes: [u8; size_of::<Dial>()]| unsafe { std::mem::transmute::<_, Dial>(bytes) };
        let entries = dials.iter().map(Result::unwrap).map(|(sock, bytes)| (sock, dial(bytes)));
        let is_it =
            |(_, dial): &(u64, Dial)| u64::from(dial.tuple.netns) == net.inode && dial.tuple.dport == port;
        entries.into_iter().find(is_it)
    };
    let (sock, lives) = of_port(&dials, port).expect("it is remembered");
    // As if both witnesses had lost the end of a dial: the address is of no socket.
    let mut stale = lives;
    stale.tuple.dport = port ^ 1;
    // SAFETY: integers and byte arrays without padding.
    let bytes = unsafe { std::mem::transmute::<Dial, [u8; size_of::<Dial>()]>(stale) };
    dials.insert(sock ^ 1, bytes, 0).unwrap();
    assert!(of_port(&dials, port ^ 1).is_some());
    daemon.while_reading(2, || thread::sleep(Duration::from_millis(20)));
    assert!(of_port(&dials, port ^ 1).is_none(), "it is swept");
    assert_eq!(of_port(&dials, port), Some((sock, lives)), "it stays");
    drop(socket);
    daemon.expect(1, of("closed", net.inode));
    daemon.stop();
    inhabitant.end();
}
