//! The table of dials in flight: what it holds, and what happens when it is full.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::Barrier,
    thread,
    time::Duration,
};

use selfconn::kernel::{
    attach::Wanted,
    host::Host,
    tracer::{Options, Tracer},
};
use socket2::SockRef;

use crate::{
    client::{connect_to_self, dial_until_self},
    daemon::{Daemon, Variant, of, scaled},
    net::Net,
};

fn with_tracer(work: impl FnOnce(&mut Tracer)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = Options {
            wanted: Wanted::default(),
            ring_bytes: 1 << 16,
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
