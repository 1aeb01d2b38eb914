//! A hundred thousand ordinary connections leave the connect table empty.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::Barrier,
    thread,
    time::Duration,
};

use socket2::SockRef;

use crate::support::{
    daemon::scaled,
    direct_tracer::{entry_count, with_tracer},
    netns::TestNetns,
};

/// Opens `count` ordinary loopback connections to one server.
fn ordinary_connections(count: usize) -> Vec<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = listener.local_addr().unwrap();
    let connect = |_| {
        let client = TcpStream::connect(server).unwrap();
        // No TIME_WAIT, which would exhaust the ports.
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        (client, listener.accept().unwrap().0)
    };
    (0..count).map(connect).collect()
}

#[test]
fn ordinary_connections_leave_no_entries_in_the_connect_table() {
    use rustix::{
        process::{Resource, Rlimit, getrlimit, setrlimit},
        thread::{UnshareFlags, unshare_unsafe},
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    // Two descriptors for each connection, and some for everything else.
    let each = usize::try_from(maximum.unwrap_or(20_000).min(20_000)).unwrap() / 2 - 100;
    let net = TestNetns::enter_new();
    let total = scaled(100_000);
    with_tracer(|tracer| {
        for _ in 0..2 {
            let hold = Barrier::new(total.div_ceil(each) + 1);
            thread::scope(|scope| {
                for from in (0..total).step_by(each) {
                    let (hold, count) = (&hold, each.min(total - from));
                    scope.spawn(move || {
                        // SAFETY: this thread gets a descriptor table of its own. It uses only descriptors
                        // that it opens from here on, and it closes them itself.
                        unsafe { unshare_unsafe(UnshareFlags::FILES) }.unwrap();
                        let connections = ordinary_connections(count);
                        hold.wait();
                        hold.wait();
                        drop(connections);
                    });
                }
                hold.wait();
                assert_eq!(entry_count(tracer, net), 0, "while {total} connections are open");
                hold.wait();
            });
            assert_eq!(entry_count(tracer, net), 0, "after {total} connections were open");
        }
        assert!(tracer.counters().unwrap().connect_table_full == 0);
    });
}
