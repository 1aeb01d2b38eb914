//! The attachment of the guard to `lo`: what is lost meanwhile, who takes it off, what runs before it.

use std::{
    net::UdpSocket,
    os::fd::AsFd as _,
    sync::mpsc::{Sender, channel},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use selfconn::system::rtnetlink;

use super::{LOCALHOST, LOOPBACK, is_refused};
use crate::support::{
    daemon::{DEADLINE, is_event},
    guard::{guard_methods, is_refused_within, refusing},
    netns::TestNetns,
};

static TEST_PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-test-programs"));

/// Sends datagrams to itself until the namespace of this thread is guarded. Returns how many were lost. `begun`: the
/// first one has arrived.
fn lost_until_guarded(begun: &Sender<()>) -> usize {
    let echo = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    echo.connect(echo.local_addr().unwrap()).unwrap();
    let receive = |patience| {
        echo.set_read_timeout(Some(patience)).unwrap();
        echo.recv(&mut [0; 1]).is_ok()
    };
    let until = Instant::now() + DEADLINE;
    let (mut sent, mut received) = (0_usize, 0);
    loop {
        echo.send(&[0]).unwrap();
        sent += 1;
        received += usize::from(receive(Duration::from_millis(1)));
        if sent == 1 {
            begun.send(()).unwrap();
        }
        // Now and then, because each connect before that makes a self-connection.
        if sent.is_multiple_of(64) && is_refused_within(LOCALHOST, Duration::from_millis(1)) {
            break;
        }
        assert!(Instant::now() < until, "the namespace is never guarded");
    }
    // What is late is not lost.
    while received < sent && receive(Duration::from_millis(200)) {
        received += 1;
    }
    sent - received
}

#[test]
fn an_attachment_by_tcx_loses_no_packet() {
    for method in guard_methods() {
        let _net = TestNetns::enter_new();
        for _ in 0..5 {
            let (begun, has_begun) = channel();
            let sender = thread::spawn(move || lost_until_guarded(&begun));
            has_begun.recv_timeout(DEADLINE).unwrap();
            let daemon = refusing(method, &[]);
            let lost = sender.join().unwrap();
            println!("FACT lost_datagrams={lost} method={method}");
            assert!(lost == 0 || *method != "tcx", "{lost}");
            daemon.stop();
        }
    }
}

#[test]
fn a_guard_that_is_taken_off_is_reported() {
    let net = TestNetns::enter_new();
    // A link can't be taken off from outside without its number; a filter can.
    let mut daemon = refusing("clsact", &[]);
    for filter in rtnetlink::filters(LOOPBACK).unwrap() {
        rtnetlink::remove_filter(LOOPBACK, &filter).unwrap();
    }
    assert!(!is_refused());
    let unguarded = daemon.expect(1, is_event("unguarded", net.inode)).remove(0);
    assert_eq!(unguarded["why"], "the program was taken off");
    daemon.stop();
}

#[test]
fn a_program_that_runs_first_and_ends_the_chain_is_reported() {
    let net = TestNetns::enter_new();
    let mut foreign = Ebpf::load(TEST_PROGRAMS).unwrap();
    let program: &mut SchedClassifier = foreign.program_mut("ends_the_chain").unwrap().try_into().unwrap();
    program.load().unwrap();
    for method in guard_methods() {
        let mut daemon = refusing(method, &[]);
        assert!(is_refused());
        if *method == "tcx" {
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options("lo", TcAttachType::Egress, first).unwrap();
        } else {
            // Of two filters of the same priority, the newer one runs first.
            let fd = program.fd().unwrap().as_fd();
            rtnetlink::add_filter(LOOPBACK, fd, "ends_the_chain", 1).unwrap();
        }
        assert!(!is_refused(), "{method}");
        let unguarded = daemon.expect(1, is_event("unguarded", net.inode)).remove(0);
        assert_eq!(
            unguarded["why"], "the program ends_the_chain runs first, and may end the chain",
            "{method}"
        );
        if *method == "tcx" {
            program.unload().unwrap();
            program.load().unwrap();
        } else {
            let filters = rtnetlink::filters(LOOPBACK).unwrap();
            let foreign = filters.iter().find(|filter| filter.name == "ends_the_chain").unwrap();
            rtnetlink::remove_filter(LOOPBACK, foreign).unwrap();
        }
        assert!(is_refused(), "{method}: the guard is there again");
        daemon.stop();
    }
}
