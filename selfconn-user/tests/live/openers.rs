//! The table of dials in flight: what it holds, and what happens when it is full.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::Barrier,
    thread,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use rustix::process::Signal;
use selfconn::kernel::{
    attach::Wanted,
    host::Host,
    tracer::{Options, Tracer},
};
use selfconn_ebpf::{Dial, DialSet, Tuple, WAYS, names, set_of};
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
    // One set holds more than one; and a backlog of none holds one or two.
    let (server, waiting) = unanswered(3 * WAYS);
    let connections: Vec<_> = thread::scope(|scope| {
        let connect = || connect_to_self(Ipv4Addr::LOCALHOST.into());
        (0..3).map(|_| scope.spawn(connect).join().unwrap()).collect()
    });
    let established = daemon.expect(3, of("established", net.inode));
    for event in &established {
        for unknown in ["pid", "tid", "comm", "thread_comm", "uid", "cause", "owner"] {
            assert!(event[unknown].is_null(), "{unknown} in {event}");
        }
    }
    drop((connections, server, waiting));
    daemon.expect(3, of("closed", net.inode));
    let (_, stderr) = daemon.stop();
    assert!(stderr.contains("kernel: the table of dials is full"), "{stderr}");
}

#[test]
fn self_connections_that_were_told_leave_room_for_dials() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--dials", "1"]);
    let held: Vec<_> = (0..3 * WAYS).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into())).collect();
    let established = daemon.expect(held.len(), of("established", net.inode));
    assert!(established.iter().all(|event| event["pid"] == std::process::id()), "{established:#?}");
    drop(held);
    let closed = daemon.expect(3 * WAYS, of("closed", net.inode));
    assert!(closed.iter().all(|event| event["pid"] == std::process::id()), "{closed:#?}");
    daemon.stop();
}

/// The table of dials of a running daemon.
struct Dials(Array<MapData, [u8; size_of::<DialSet>()]>);

impl Dials {
    fn of(daemon: &Daemon) -> Self {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
        let map_id =
            |text: String| text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok());
        let ids =
            descriptors.filter_map(|entry| map_id(std::fs::read_to_string(entry.unwrap().path()).ok()?));
        let of_dials = |id: u32| {
            let map = MapData::from_id(id).unwrap();
            (map.info().unwrap().name_as_str() == Some(names::DIALS)).then_some(map)
        };
        let map = ids.into_iter().find_map(of_dials).expect("the daemon has the map open");
        Self(Array::try_from(Map::Array(map)).unwrap())
    }

    fn set(&self, index: u32) -> DialSet {
        // SAFETY: the programs wrote a DialSet there, of integers and byte arrays.
        unsafe { std::mem::transmute(self.0.get(&index, 0).unwrap()) }
    }

    /// What is remembered of a dial to this port.
    fn to(&self, net: Net, port: u16) -> Option<(u64, Dial)> {
        let entries = (0..self.0.len()).flat_map(|index| {
            let DialSet { socks, dials } = self.set(index);
            socks.into_iter().zip(dials)
        });
        let is_it = |(sock, dial): &(u64, Dial)| {
            *sock != 0 && u64::from(dial.tuple.netns) == net.inode && dial.tuple.dport == port
        };
        entries.into_iter().find(is_it)
    }

    fn remember(&mut self, sock: u64, dial: Dial) {
        let index = set_of(sock as u32, self.0.len());
        let mut set = self.set(index);
        let way = set.socks.iter().position(|sock| *sock == 0).expect("a free entry");
        (set.socks[way], set.dials[way]) = (sock, dial);
        // SAFETY: integers and byte arrays without padding.
        let bytes = unsafe { std::mem::transmute::<DialSet, [u8; size_of::<DialSet>()]>(set) };
        self.0.set(index, bytes, 0).unwrap();
    }
}

#[test]
fn an_entry_whose_socket_is_gone_is_swept_and_one_whose_socket_lives_stays() {
    let net = Net::private();
    // A reading finds namespaces by their processes, and this one is a thread's.
    let mut inhabitant = Role::start("wait");
    inhabitant.says();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let (connection, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, of("established", net.inode));
    let mut dials = Dials::of(&daemon);
    let (sock, lives) = dials.to(net, port).expect("it is remembered");
    // As if both witnesses had lost the end of a dial: the address is of no socket.
    let tuple = Tuple { dport: port ^ 1, ..lives.tuple };
    // A daemon that runs might sweep it before we look.
    daemon.signal(Signal::STOP);
    dials.remember(sock ^ 1, Dial::new((sock ^ 1) as u32, tuple, lives.opener, 0));
    assert!(dials.to(net, port ^ 1).is_some());
    daemon.signal(Signal::CONT);
    daemon.while_reading(2, || thread::sleep(Duration::from_millis(20)));
    assert!(dials.to(net, port ^ 1).is_none(), "it is swept");
    assert_eq!(dials.to(net, port), Some((sock, lives)), "it stays");
    drop(connection);
    daemon.expect(1, of("closed", net.inode));
    daemon.stop();
    inhabitant.end();
}
