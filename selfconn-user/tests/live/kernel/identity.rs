//! Two sockets can have the same addresses and ports at the same time, if they are bound to different devices, and a
//! namespace can have the inode of one that has ended. Each socket has its own events, its own process and its own
//! end, and only the socket that was meant is destroyed.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use selfconn::sockets::{self, Cookie, TargetSocket};
use selfconn_ebpf::Endpoint;
use serde_json::Value;
use socket2::Socket;

use crate::support::{
    client::{NOBODY, assert_aborted, become_user, connect_to_self, is_connected, socket},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, scaled, selfconn},
    dedicated::{is_emulated, time_limit},
    devices::bind_device,
    helper_process::HelperProcess,
    netns::TestNetns,
    retries::{PREEMPTED, for_each_variant_retrying},
};

const DEVICES: [&str; 2] = ["va", "vb"];
const SHARED_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const SHARED_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const PORT: u16 = 5_000;

/// A namespace with two devices that have the same addresses. `None`, with a line that says so: the kernel has no veth.
fn netns_with_shared_addresses() -> Option<(TestNetns, [u32; 2])> {
    let net = TestNetns::enter_new();
    match net.add_veth_pair(DEVICES) {
        Ok(indices) => {
            for index in indices {
                net.add_device_address(index, SHARED_V4.into());
                net.add_device_address(index, SHARED_V6.into());
            }
            Some((net, indices))
        }
        Err(error) => {
            println!("FACT veth: {error}: sockets on two devices can't be made here");
            None
        }
    }
}

/// A self-connection through one device. It ends by a reset, so its port is free at once.
fn connect_on(device: Option<&str>, address: SocketAddr) -> Socket {
    let client = connect_unchecked(device, address);
    assert_eq!(client.local_addr().unwrap(), client.peer_addr().unwrap());
    client
}

/// The same, where the remedy may destroy it at once. A user without privileges makes it.
fn connect_unchecked(device: Option<&str>, address: SocketAddr) -> Socket {
    let connect = || {
        become_user(NOBODY);
        let client = socket(address.ip());
        client.set_reuse_address(true).unwrap();
        if let Some(device) = device {
            bind_device(&client, device);
        }
        client.bind(&address.into()).unwrap();
        client.connect(&address.into()).unwrap();
        client.set_linger(Some(Duration::ZERO)).unwrap();
        client
    };
    thread::scope(|scope| scope.spawn(connect).join().unwrap())
}

fn addresses(indices: [u32; 2]) -> [(IpAddr, [SocketAddr; 2]); 2] {
    [
        (SHARED_V4.into(), [SocketAddr::new(SHARED_V4.into(), PORT); 2]),
        (SHARED_V6.into(), indices.map(|index| SocketAddrV6::new(SHARED_V6, PORT, 0, index).into())),
    ]
}

fn of_kind<'a>(events: &'a [Value], kind: &str, net: TestNetns) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == kind && event["netns"] == net.inode).collect()
}

#[test]
fn sockets_on_two_devices_are_two_connections_with_their_own_ends() {
    let Some((net, indices)) = netns_with_shared_addresses() else { return };
    for_each_variant_retrying(PREEMPTED, |variant| {
        for (address, on_device) in addresses(indices) {
            let mut daemon = TestDaemon::start(variant, &[]);
            let [first, second] = [0, 1].map(|at| connect_on(Some(DEVICES[at]), on_device[at]));
            let established = daemon.try_expect(2, is_event("established", net.inode))?;
            let sockets = [(&first, indices[0], DEVICES[0]), (&second, indices[1], DEVICES[1])];
            for (event, (socket, index, device)) in established.iter().zip(sockets) {
                assert_eq!(event["addr"], address.to_string(), "{event}");
                // The daemon is in this namespace.
                assert_eq!((&event["ifindex"], &event["device"]), (&index.into(), &device.into()), "{event}");
                assert_eq!(event["source"], "live", "{event}");
                // A program that can't make the cookie says nothing instead of something else.
                let cookie = event["cookie"].as_u64();
                assert!(cookie.is_none_or(|cookie| cookie == socket.cookie().unwrap()), "{event}");
            }
            drop(second);
            let closed = daemon.try_expect(1, is_event("closed", net.inode))?;
            assert_eq!(closed[0]["id"], established[1]["id"], "{closed:#?}");
            drop(first);
            daemon.try_expect(2, is_event("closed", net.inode))?;
            let (events, _) = daemon.stop();
            let closed = of_kind(&events, "closed", net);
            assert_eq!((of_kind(&events, "established", net).len(), closed.len()), (2, 2), "{events:#?}");
            assert_eq!(closed[1]["id"], established[0]["id"], "{closed:#?}");
        }
        Ok(())
    });
}

#[test]
fn sockets_on_two_devices_from_before_the_daemon_have_their_own_processes() {
    let Some((net, indices)) = netns_with_shared_addresses() else { return };
    for (_, on_device) in addresses(indices) {
        // Each is held by a process of its own.
        let mut held: Vec<_> = [0, 1]
            .map(|at| {
                let client = connect_on(Some(DEVICES[at]), on_device[at]);
                let mut holder = HelperProcess::start_unprivileged_with_fd("hold", &client);
                holder.read_output();
                (holder, client.cookie().unwrap())
            })
            .into();
        let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
        let established = daemon.expect(2, is_event("established", net.inode));
        for (at, (holder, cookie)) in held.iter().enumerate() {
            let event = established.iter().find(|event| event["cookie"] == *cookie).expect("its own event");
            assert_eq!((&event["source"], &event["owner"]), (&"scan".into(), &"holder".into()), "{event}");
            assert_eq!(
                (&event["pid"], &event["ifindex"], &event["device"]),
                (&holder.pid().into(), &indices[at].into(), &DEVICES[at].into()),
                "{event}"
            );
        }
        let only = format!("netns={}", net.inode);
        let output =
            Command::new(selfconn()).args(["scan", "--json", "--holders", "--only", &only]).output().unwrap();
        let rows = String::from_utf8(output.stdout).unwrap();
        for (at, (holder, cookie)) in held.iter().enumerate() {
            let mut rows = rows.lines().map(|row| serde_json::from_str::<Value>(row).unwrap());
            let row = rows.find(|row| row["cookie"] == *cookie).expect("a row of its own");
            let of_row = (&row["pid"], &row["ifindex"], &row["device"]);
            assert_eq!(of_row, (&holder.pid().into(), &indices[at].into(), &DEVICES[at].into()), "{row}");
        }
        // Later snapshots keep them apart, too.
        daemon.run_until_snapshots(2, || thread::sleep(Duration::from_millis(20)));
        let (last, cookie) = held.pop().unwrap();
        last.finish();
        let closed = daemon.expect(1, is_event("closed", net.inode));
        assert_eq!(closed[0]["cookie"], cookie, "{closed:#?}");
        let (other, _) = held.pop().unwrap();
        other.finish();
        daemon.expect(2, is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        assert_eq!(of_kind(&events, "established", net).len(), 2, "{events:#?}");
    }
}

#[test]
fn the_remedy_destroys_the_socket_that_its_rules_select_and_not_its_twin() {
    let Some((net, indices)) = netns_with_shared_addresses() else { return };
    let only = format!("netns={}", net.inode);
    for (_, on_device) in addresses(indices) {
        let excepted = format!("ifindex={}", indices[0]);
        let options = ["--remedy", "destroy", "--remedy-only", &only, "--remedy-except", &excepted];
        let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
        let [protected, selected] = [0, 1].map(|at| connect_unchecked(Some(DEVICES[at]), on_device[at]));
        let remedied = daemon.expect(2, is_event("remedied", net.inode));
        assert_eq!(
            remedied
                .iter()
                .map(|event| (event["ifindex"].as_u64(), event["result"].as_str()))
                .collect::<Vec<_>>(),
            [(Some(indices[0].into()), Some("excepted")), (Some(indices[1].into()), Some("destroyed"))],
            "{remedied:#?}"
        );
        assert_aborted(&selected);
        assert!(is_connected(&protected));
        let closed = daemon.expect(1, is_event("closed", net.inode));
        assert_eq!(closed[0]["cookie"], selected.cookie().unwrap(), "{closed:#?}");
        daemon.stop();
        drop((protected, selected));
    }
}

#[test]
fn a_socket_that_another_one_hides_is_reported_as_failed_and_nothing_is_destroyed() {
    let Some((net, indices)) = netns_with_shared_addresses() else { return };
    let only = format!("netns={}", net.inode);
    let address = SocketAddr::new(SHARED_V4.into(), PORT);
    let bound = connect_on(Some(DEVICES[0]), address);
    // The kernel finds this one for a request about the other, too, because it is bound to no device.
    let unbound = connect_on(None, address);
    let scan = |rule: &str| {
        let options = ["scan", "--json", "--destroy", "--only", &only, "--only", rule];
        let output = Command::new(selfconn()).args(options).output().unwrap();
        let rows = String::from_utf8(output.stdout).unwrap();
        let mut rows: Vec<Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
        assert_eq!(rows.pop().unwrap()["event"], "summary");
        (output.status.code(), rows)
    };
    let of = |rows: &[Value], socket: &Socket| {
        let cookie = socket.cookie().unwrap();
        rows.iter().find(|row| row["cookie"] == cookie).expect("it is listed").clone()
    };
    let (code, rows) = scan(&format!("ifindex={}", indices[0]));
    let hidden = of(&rows, &bound);
    assert_eq!((rows.len(), &hidden["result"]), (1, &"failed".into()), "{rows:#?}");
    assert!(hidden["why"].as_str().unwrap().contains("hides it"), "{hidden}");
    assert_eq!(code, Some(1), "one of them is left");
    assert!(is_connected(&bound) && is_connected(&unbound), "nothing is destroyed");
    // Nothing hides it any more.
    drop(unbound);
    let (code, rows) = scan(&format!("ifindex={}", indices[0]));
    assert_eq!((code, &of(&rows, &bound)["result"]), (Some(0), &"destroyed".into()), "{rows:#?}");
    assert_aborted(&bound);
}

#[test]
fn a_twin_survives_ten_thousand_races_between_destroy_and_close() {
    let Some((net, indices)) = netns_with_shared_addresses() else { return };
    let address = SocketAddr::new(SHARED_V4.into(), PORT);
    let twin = connect_on(Some(DEVICES[0]), address);
    let mut endpoint = Endpoint::new(u32::try_from(net.inode).unwrap(), address.ip(), address.port(), false);
    endpoint.ifindex = indices[1];
    let (to_closer, sockets_to_close) = mpsc::channel::<(Socket, Duration)>();
    let close = |(socket, delay): (Socket, Duration)| {
        // Shorter than a sleep can be. An emulated machine may have one CPU, and all takes longer there.
        let until = Instant::now() + delay;
        while Instant::now() < until {
            if is_emulated() {
                thread::sleep(delay);
            }
        }
        drop(socket);
    };
    let closer = thread::spawn(move || sockets_to_close.iter().for_each(close));
    let (mut destroyed, mut gone, mut refused) = (0, 0, 0);
    for round in 0..scaled(10_000) {
        let client = connect_on(Some(DEVICES[1]), address);
        // The kernel finds this one instead, for as long as it is there.
        let hiding = (round / 10 % 2 == 1).then(|| connect_on(None, address));
        let cookie = Cookie::new(client.cookie().unwrap()).unwrap();
        let inode = fs::metadata(format!("/proc/self/fd/{}", client.as_raw_fd())).unwrap().ino();
        // Every other round as on a kernel whose programs can't read the cookie.
        let known = (round % 2 == 0).then_some(cookie);
        let target = TargetSocket {
            endpoint,
            cookie: known,
            inode: Some(inode),
            uid: Some(NOBODY),
            netns_hints: Vec::new(),
        };
        // Before the look-up, in the middle of it, or after the request.
        let delay = time_limit(Duration::from_micros(10), Duration::from_micros(200)) * (round as u32 % 100);
        to_closer.send((client, delay)).unwrap();
        let outcome = sockets::look_up(&target).and_then(|found| {
            let Some(found) = found else { return Ok(false) };
            assert_eq!(found, cookie, "round {round}: another socket");
            sockets::destroy(&target, found)
        });
        match outcome {
            Ok(true) => destroyed += 1,
            Ok(false) => gone += 1,
            Err(why) => {
                assert!(hiding.is_some() && why.contains("hides it"), "round {round}: {why}");
                refused += 1;
            }
        }
        let is_right = is_connected(&twin) && hiding.as_ref().is_none_or(is_connected);
        assert!(is_right, "round {round}: the wrong socket is destroyed");
        drop(hiding);
        // The port has one client at a time.
        let until = Instant::now() + Duration::from_secs(10);
        while sockets::look_up(&TargetSocket { cookie: Some(cookie), ..target.clone() }).unwrap().is_some() {
            assert!(Instant::now() < until, "round {round}: the socket stays");
            thread::yield_now();
        }
    }
    drop(to_closer);
    closer.join().unwrap();
    println!("FACT twins destroyed={destroyed} gone={gone} refused={refused} wrong=0");
    assert!(gone > 0 && (is_emulated() || destroyed > 0 && refused > 0));
}

#[test]
fn a_namespace_with_the_inode_of_one_that_has_ended_inherits_nothing() {
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 7_100);
    // A thread is alone in its namespace, which ends with it. The kernel gives the lowest free inode to the next one.
    let ended = thread::spawn(move || {
        let net = TestNetns::enter_new();
        become_user(NOBODY);
        let client = socket(address.ip());
        client.bind(&address.into()).unwrap();
        client.connect(&address.into()).unwrap();
        // It stays in TIME_WAIT.
        drop(client);
        net
    });
    let ended = ended.join().unwrap();
    daemon.expect(1, is_event("closed", ended.inode));
    let until = Instant::now() + Duration::from_secs(20);
    let (successor, _server) = loop {
        let net = TestNetns::enter_new();
        if net.inode == ended.inode {
            break (net, TcpListener::bind(address).unwrap());
        }
        assert!(Instant::now() < until, "the inode {} is not given out again", ended.inode);
        thread::sleep(Duration::from_millis(50));
    };
    // A listener keeps this server out, and no self-connection.
    assert!(TcpListener::bind(address).is_err());
    // The event of a real one comes after anything about the bind above.
    let (client, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err());
    let blocked = daemon.expect(1, |event| event["event"] == "blocked" && event["netns"] == successor.inode);
    assert_eq!(blocked[0]["port"], port, "{blocked:#?}");
    drop(client);
    daemon.stop();
}

/// A thread in a network namespace of its own. It holds a self-connection, and makes one more for each message, until
/// the channel is closed. Then the namespace ends.
fn enter_netns_until_closed(entered: &mpsc::Sender<(TestNetns, fs::File)>, connects: &mpsc::Receiver<()>) {
    let net = TestNetns::enter_new();
    let namespace = fs::File::open("/proc/thread-self/ns/net").unwrap();
    let mut process = HelperProcess::start("wait");
    process.read_output();
    let connect = || {
        let (client, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        client.set_linger(Some(Duration::ZERO)).unwrap();
        client
    };
    let held = connect();
    entered.send((net, namespace)).unwrap();
    connects.iter().for_each(|()| drop(connect()));
    drop(held);
    process.finish();
}

/// Waits until every part of the daemon that these options start has been in this namespace.
fn expect_visits(daemon: &mut TestDaemon, options: &[&str], net: TestNetns, connect: &mpsc::Sender<()>) {
    daemon.expect(1, is_event("established", net.inode));
    daemon.run_until_snapshots(2, || thread::sleep(Duration::from_millis(20)));
    if options.contains(&"--remedy") {
        daemon.expect(1, is_event("remedied", net.inode));
    }
    if options.contains(&"--guard") {
        // The first connect adds the namespace to the guard's queue. The guard sees a later one.
        let until = Instant::now() + DEADLINE;
        let in_a_moment = || Instant::now() + Duration::from_millis(200);
        while daemon.wait_until(in_a_moment(), 1, is_event("prevented", net.inode)).is_err() {
            assert!(Instant::now() < until, "the namespace is never guarded");
            connect.send(()).unwrap();
        }
    }
}

#[test]
fn a_daemon_keeps_no_namespace_alive() {
    for options in [&[][..], &["--remedy", "dry-run", "--guard", "dry-run"]] {
        let here = TestNetns::enter_new();
        let mut daemon =
            TestDaemon::start(&HookVariant(vec![]), &[&["--reconcile", "1", "-vv"], options].concat());
        let (entered, from_there) = mpsc::channel();
        let (connect, connects) = mpsc::channel();
        let there = thread::spawn(move || enter_netns_until_closed(&entered, &connects));
        let (net, namespace) = from_there.recv().unwrap();
        let added = here.add_device_with_peer_in("toward", namespace.as_raw_fd());
        drop(namespace);
        if let Err(error) = added {
            println!("FACT veth: {error}: whether a namespace ends can't be seen here");
            drop(connect);
            there.join().unwrap();
            return;
        }
        expect_visits(&mut daemon, options, net, &connect);
        assert!(here.has_device("toward"));
        drop(connect);
        there.join().unwrap();
        let since = Instant::now();
        let limit = time_limit(Duration::from_secs(1), Duration::from_secs(5));
        while here.has_device("toward") {
            assert!(since.elapsed() < limit, "{options:?}: something keeps the namespace alive");
            thread::sleep(Duration::from_millis(10));
        }
        println!("FACT netns gone_after_ms={} {options:?}", since.elapsed().as_millis());
        daemon.stop();
    }
}
