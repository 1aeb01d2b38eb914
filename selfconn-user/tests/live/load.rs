//! Many at once: what each method sees of self-connections that four workers make as fast as they can, and whose names
//! it gives them. What is seen is told as a fact of this kernel; the default must lose nothing, and nothing may ever
//! name the wrong opener.

use std::{collections::HashMap, net::Ipv4Addr, thread, time::Duration};

use crate::{
    client::connect_to_self,
    daemon::{Daemon, of, scaled, variants},
    net::Net,
};

const WORKERS: u8 = 4;

/// Each worker dials its own loopback address, by which its self-connections are told from the others'. The thread of
/// each address.
fn work(each: usize) -> HashMap<String, i64> {
    thread::scope(|scope| {
        let worker = |number: u8| {
            move || {
                let own = Ipv4Addr::new(127, 0, 1, number);
                for _ in 0..each {
                    let (socket, _) = connect_to_self(own.into());
                    socket.set_linger(Some(Duration::ZERO)).unwrap();
                }
                (own.to_string(), i64::from(rustix::thread::gettid().as_raw_nonzero().get()))
            }
        };
        let workers: Vec<_> = (1..=WORKERS).map(|number| scope.spawn(worker(number))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    })
}

fn under_load(net: Net, condition: &str) {
    let each = scaled(1_800);
    let made = each * usize::from(WORKERS);
    for variant in variants() {
        let mut daemon = Daemon::start(&variant, &["--ring-size", "32M"]);
        let tids = work(each);
        // The last words: after these, everything before is told.
        let (last, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        drop(last);
        daemon.expect(1, |event| of("closed", net.inode)(event) && event["addr"] == "127.0.0.1");
        let (events, _) = daemon.stop();
        let count = |kind| {
            events
                .iter()
                .filter(|event| of(kind, net.inode)(event) && event["addr"] != "127.0.0.1")
                .collect::<Vec<_>>()
        };
        let (established, closed) = (count("established"), count("closed"));
        let mut owners = [0; 3];
        for event in &established {
            let expected = tids.get(event["addr"].as_str().unwrap());
            let which = match event["tid"].as_i64() {
                None => 2,
                tid => usize::from(tid.as_ref() != expected),
            };
            owners[which] += 1;
        }
        let [right, wrong, unknown] = owners;
        let name = variant.0.last().unwrap_or(&"default");
        println!(
            "FACT load={condition} method={name} made={made} established={} closed={} right={right} wrong={wrong} unknown={unknown}",
            established.len(),
            closed.len()
        );
        assert_eq!(wrong, 0, "{variant:?} names a wrong opener");
        assert_eq!(established.len(), closed.len(), "{variant:?}: one close for each open");
        if variant.0.is_empty() {
            assert_eq!((established.len(), right), (made, made), "the default loses nothing");
        }
    }
}

#[test]
fn four_workers_lose_nothing_by_default() {
    under_load(Net::private(), "plain");
}

#[test]
fn four_workers_with_packet_steering_lose_nothing_by_default() {
    let net = Net::private();
    net.steer();
    under_load(net, "steered");
}

#[test]
fn a_variant_is_what_it_says() {
    // The facts above are worth what their names are worth: a forced method is the only one that is live.
    for variant in variants().into_iter().filter(|variant| !variant.0.is_empty()) {
        let (events, _) = Daemon::start(&variant, &[]).stop();
        let hooks = events[0]["hooks"].as_array().unwrap();
        let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
        assert_eq!(live, [*variant.0.last().unwrap()], "{}", events[0]);
    }
}
