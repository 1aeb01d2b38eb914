//! `exe` and `cmdline` are those of the program that connected, or null: also if its process runs another program
//! when it is looked up. The processes are an unprivileged user's.

use std::net::Ipv4Addr;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    another_program,
    client::connect_to_self,
    daemon::{HookVariant, TestDaemon, comm_by_thread, is_event, is_name_or_unknown},
    helper_process::HelperProcess,
    netns::TestNetns,
    retries::{Missed, PREEMPTED, for_each_variant_retrying, until_looked_up},
};

fn exe(pid: u32) -> String {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap().to_str().unwrap().to_owned()
}

/// The events of the self-connection of this process. Programs saw the opener and the closer.
fn try_events(daemon: &mut TestDaemon, net: TestNetns, client: HelperProcess) -> Result<[Value; 2], Missed> {
    let pid = client.pid();
    let is_its = |kind| move |event: &Value| is_event(kind, net.inode)(event) && event["pid"] == pid;
    let opened = daemon.try_expect(1, is_its("established"))?.remove(0);
    client.finish();
    let closed = daemon.try_expect(1, is_its("closed"))?.remove(0);
    Missed::if_opener_unseen(&opened)?;
    Missed::if_opener_unseen(&closed)?;
    Missed::if_null(&closed, &["how", "closer"])?;
    Ok([opened, closed])
}

/// Checks the facts about the process that connected as the program `comm`. They may be null. Returns true if exe
/// and cmdline are not.
fn has_program(variant: &HookVariant, event: &Value, comm: &str) -> bool {
    assert_eq!(
        (&event["uid"], &event["owner"]),
        (&65_534.into(), &"witnessed".into()),
        "{variant:?}: {event}"
    );
    assert!(is_name_or_unknown(&event["comm"], comm), "{variant:?}: {event}");
    assert!(!event.to_string().contains(another_program::NAME), "{variant:?}: {event}");
    let (exe, arguments) = (&event["exe"], &event["cmdline"]);
    assert!(exe.is_null() || *exe == self::exe(std::process::id()).as_str(), "{variant:?}: {event}");
    assert!(arguments.is_null() || arguments[1] == "--exact", "{variant:?}: {event}");
    !exe.is_null() && !arguments.is_null()
}

#[test]
fn an_execve_after_the_connect_does_not_change_the_program() {
    let net = TestNetns::enter_new();
    let (_before, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    for_each_variant_retrying(PREEMPTED, |variant| {
        // Otherwise the look-up and the execve() race.
        for is_looked_up_later in [false, true] {
            let mut daemon = TestDaemon::start(variant, &[]);
            // The first snapshot is over: a pass over descriptors can take the place of the closer.
            daemon
                .try_expect(1, |event| is_event("established", net.inode)(event) && event["port"] == port)?;
            if is_looked_up_later {
                daemon.signal(Signal::STOP);
            }
            let mut client = HelperProcess::start("connect and exec");
            client.read_output();
            assert_eq!(client.read_output(), "waiting", "the same process runs something else");
            let pid = client.pid();
            assert!(exe(pid).contains(another_program::NAME), "{}", exe(pid));
            daemon.signal(Signal::CONT);
            let [opened, closed] = try_events(&mut daemon, net, client)?;
            for event in [&opened, &closed] {
                let has_program = has_program(variant, event, "before-exec");
                assert!(!(is_looked_up_later && has_program), "{variant:?}: {event}");
            }
            // The closer is the process as it is at the end.
            let closer = &closed["closer"];
            assert_eq!(closer["pid"], pid, "{closed}");
            assert_ne!(closer["comm"], "before-exec", "it had another name by then: {closed}");
            daemon.stop();
        }
        Ok(())
    });
}

#[test]
fn without_an_execve_the_program_is_known() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::shared(variant, &[]);
        until_looked_up(|| {
            let mut client = HelperProcess::start_unprivileged("connect", None);
            client.read_output();
            let events = try_events(&mut daemon, net, client)?;
            Ok(events.iter().all(|event| has_program(variant, event, "a-client")))
        })?;
        daemon.stop();
        Ok(())
    });
}

/// `connect()` with TCP_FASTOPEN_CONNECT sends nothing. The first send does, in whatever program runs then.
#[test]
fn a_syn_that_another_program_sends_is_of_the_program_that_called_connect() {
    let net = TestNetns::enter_new();
    // A client without cookies, which would come from an earlier connection.
    net.set_sysctl("tcp_fastopen", "5");
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::shared(variant, &[]);
        let mut connect = |task| {
            let mut client = HelperProcess::start(task);
            assert_eq!((client.read_output(), client.read_output()), ("deferred".into(), "sent".into()));
            try_events(&mut daemon, net, client)
        };
        let mut cgroup = Value::Null;
        until_looked_up(|| {
            let events = connect("defer the SYN and send")?;
            cgroup = events[0]["cgroup"].clone();
            Ok(events.iter().all(|event| has_program(variant, event, "before-send")))
        })?;
        until_looked_up(|| {
            let events = connect("defer the SYN and exec")?;
            for event in &events {
                assert!(event["exe"].is_null() && event["cmdline"].is_null(), "{variant:?}: {event}");
                has_program(variant, event, "before-send");
            }
            // What is not the program's but the process's stays, where the kernel provides the start time.
            let is_start_time_known = !comm_by_thread("before-send").is_null();
            Ok(!is_start_time_known || events.iter().all(|event| event["cgroup"] == cgroup))
        })?;
        daemon.stop();
        Ok(())
    });
}
