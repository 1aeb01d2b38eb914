//! The guard in operation.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr},
    os::unix::process::CommandExt as _,
    process::Command,
};

use serde_json::Value;

use super::audit::AuditOutput;
use crate::support::{
    client::{NOBODY, connect_to_self},
    daemon::{HookVariant, TestDaemon, is_event, selfconn},
    guard::{connect_itself, count_of, guard_methods, refusing},
    netns::TestNetns,
    refused_connects::{at, connect_refused, enter_wide_range_netns, is_at_risk},
};

mod attachment;
mod devices;
mod end;
mod exemptions;
mod namespaces;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOOPBACK: u32 = 1;

fn is_refused() -> bool {
    !connect_itself(LOCALHOST).is_connected
}

#[test]
fn a_self_connection_from_before_the_guard_keeps_working() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let (mut connection, _) = connect_to_self(LOCALHOST);
        let daemon = refusing(method, &[]);
        assert!(is_refused(), "{method}");
        connection.write_all(b"still").unwrap();
        let mut received = [0; 5];
        connection.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"still", "{method}");
        let (events, _) = daemon.stop();
        let prevented = events.iter().filter(|event| is_event("prevented", net.inode)(event));
        assert_eq!(count_of(prevented), 1, "{method}");
    }
}

#[test]
fn at_risk_and_audit_say_what_a_guard_does() {
    let net = enter_wide_range_netns();
    let audited = || {
        let audit = AuditOutput::run(&["--netns", "self", "--port", "40000"]);
        assert_eq!((&audit.rows[0]["risk"], audit.code), (&"high".into(), Some(1)), "{audit:?}");
        audit.rows[0]["guard"].clone()
    };
    for method in guard_methods() {
        for mode in ["off", "dry-run", "refuse"] {
            let options = ["--guard", mode, "--guard-own-netns", "--guard-method", method];
            let options = if mode == "off" { &[][..] } else { &options };
            let mut daemon = TestDaemon::start(&HookVariant(vec![]), options);
            assert_eq!(audited(), mode, "{method}");
            let text = Command::new(selfconn()).args(["audit", "--netns", "self"]).output().unwrap().stdout;
            assert_eq!(
                String::from_utf8_lossy(&text).contains("\n  guard  re"),
                mode != "off",
                "{method}, {mode}"
            );
            connect_refused(at(40_000), 20);
            let at_risk = daemon.expect(1, is_at_risk(40_000, net)).remove(0);
            assert_eq!(at_risk["guard"], mode, "{method}: {at_risk}");
            daemon.stop();
            assert_eq!(audited(), "off", "{method}, {mode}: after its end");
        }
    }
    // Without the privilege it is unknown.
    let mut unprivileged = Command::new(selfconn());
    unprivileged
        .args(["audit", "--netns", "self", "--port", "40000"])
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/");
    let audit = AuditOutput::from_command(&mut unprivileged);
    assert_eq!(audit.rows[0]["guard"], Value::Null, "{audit:?}");
}
