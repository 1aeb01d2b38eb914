//! The guard on VRF devices.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
    time::{Duration, Instant},
};

use super::{LOCALHOST, is_refused};
use crate::support::{
    client::{become_user, connect_to_self, socket},
    daemon::{HookVariant, TestDaemon, is_event},
    devices::bind_device,
    guard::{connect, count_of, guard_methods, refusing, wait_until},
    helper_process::HelperProcess,
    netns::TestNetns,
};

/// An address that VRF devices have, each in its own routing table.
const VRF_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// Makes a VRF device with [`VRF_ADDRESS`]. False: this kernel has no VRF.
fn add_vrf(net: TestNetns, name: &str, table: u32) -> bool {
    match net.add_vrf(name, table) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            println!("skipped: this kernel has no VRF");
            false
        }
        made => {
            net.add_device_address(made.unwrap(), VRF_ADDRESS);
            true
        }
    }
}

fn is_refused_in(device: &str) -> bool {
    let socket = socket(VRF_ADDRESS);
    bind_device(&socket, device);
    socket.bind(&std::net::SocketAddr::new(VRF_ADDRESS, 0).into()).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    !connect(&socket, socket.local_addr().unwrap().as_socket().unwrap()).is_connected
}

/// The guards on devices of this network namespace.
fn guarded_devices() -> usize {
    selfconn::bpf::found_guards::find().unwrap().len()
}

#[test]
fn a_namespace_with_many_vrf_devices_delays_no_other() {
    const USER: u32 = 31_999;
    const DEVICES: u32 = 12;
    let crowded = TestNetns::enter_new();
    for number in 1..=DEVICES {
        if !add_vrf(crowded, &format!("vrf{number}"), 100 + number) {
            return;
        }
    }
    // A thread leads nobody to its namespace, a process does.
    let inside = HelperProcess::start("wait");
    for method in guard_methods() {
        let guarded_first = thread::scope(|scope| {
            // The daemon is in another namespace.
            let beside = scope.spawn(|| {
                TestNetns::enter_new_in_helper();
                let options = ["--guard", "refuse", "--guard-method", method, "--guard-only", "uid=31999"];
                TestDaemon::start(&HookVariant(vec![]), &options)
            });
            let daemon = beside.join().unwrap();
            let some = || guarded_devices() > 0;
            wait_until(Duration::from_secs(60), "the crowded namespace is never reached", some);
            let victim = scope.spawn(|| {
                TestNetns::enter_new_in_helper();
                become_user(USER);
                drop(connect_to_self(LOCALHOST));
                wait_until(Duration::from_secs(30), "the namespace is never guarded", is_refused);
            });
            victim.join().unwrap();
            let guarded_first = guarded_devices();
            let began = Instant::now();
            let all = || guarded_devices() == DEVICES as usize + 1;
            wait_until(Duration::from_secs(300), "some devices are never guarded", all);
            println!("FACT other_devices_guarded_after_s={} method={method}", began.elapsed().as_secs());
            daemon.stop();
            guarded_first
        });
        println!("FACT devices_guarded_before_victim={guarded_first} method={method}");
        assert!(guarded_first < DEVICES as usize, "{method}: {guarded_first} devices came before the victim");
        let none = || guarded_devices() == 0;
        wait_until(Duration::from_secs(5), "a guard is left on a device", none);
    }
    inside.finish();
}

#[test]
fn a_vrf_device_is_guarded_and_one_made_later_after_the_next_walk() {
    for method in guard_methods() {
        let net = TestNetns::enter_new();
        if !add_vrf(net, "before", 100) {
            return;
        }
        assert!(!is_refused_in("before"), "{method}: without a daemon");
        let daemon = refusing(method, &[]);
        assert!(is_refused_in("before"), "{method}");
        assert!(add_vrf(net, "later", 101));
        wait_until(Duration::from_secs(60), "the new device is never guarded", || is_refused_in("later"));
        assert!(is_refused_in("before"), "{method}: as before");
        let (events, _) = daemon.stop();
        let prevented = events.iter().filter(|event| is_event("prevented", net.inode)(event));
        assert!(count_of(prevented) >= 3, "{method}");
        for device in ["before", "later"] {
            wait_until(Duration::from_secs(5), "it is refused after the end", || !is_refused_in(device));
        }
    }
}
