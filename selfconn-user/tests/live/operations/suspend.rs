//! A suspend of the host. Runs only on a machine that is dedicated to such tests and can suspend itself.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

use crate::support::{
    client::run_self_connection,
    daemon::{HookVariant, TestDaemon, is_event},
    dedicated::is_dedicated_machine,
    netns::TestNetns,
};

/// Writing a number of seconds wakes the machine then.
const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";

/// Longer than a TIME_WAIT.
const LENGTH: Duration = Duration::from_secs(70);

/// How long this machine has been suspended since it booted.
fn suspended() -> Duration {
    let now = |clock| Duration::try_from(clock_gettime(clock)).unwrap();
    let monotonic = now(ClockId::Monotonic);
    now(ClockId::Boottime).saturating_sub(monotonic)
}

#[test]
fn a_time_wait_outlasts_a_suspend_and_still_explains_a_failed_bind() {
    if !is_dedicated_machine() {
        return;
    }
    let can_suspend = fs::read_to_string("/sys/power/state")
        .is_ok_and(|states| states.split_whitespace().any(|state| state == "freeze"));
    if !can_suspend || fs::write(ALARM, "0").is_err() {
        println!("skipped: this kernel can't suspend, or has no clock that wakes it");
        return;
    }
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, is_event("closed", net.inode));

    let before = suspended();
    fs::write(ALARM, format!("+{}", LENGTH.as_secs())).unwrap();
    fs::write("/sys/power/state", "freeze").unwrap();
    let length = suspended() - before;
    assert!(length > LENGTH - Duration::from_secs(5), "{length:?}");

    // By the wall clock the TIME_WAIT is over; the kernel still has it.
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
    let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
    assert_eq!((&blocked["port"], &blocked["holder"]["state"]), (&port.into(), &"TIME_WAIT".into()));
    assert_eq!(blocked["holder"]["pid"], std::process::id(), "whose it was is known: {blocked}");
    daemon.stop();
}
