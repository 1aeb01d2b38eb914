//! `exe` and `cmdline` are those of the program that connected, or null: also if its process runs another program
//! when it is looked up. The processes are an unprivileged user's.

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    another_program,
    daemon::{HookVariant, TestDaemon, comm_by_thread, is_event, is_name_or_unknown},
    helper_process::HelperProcess,
    netns::TestNetns,
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

/// What a process is when it is looked up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Now {
    TheProgramThatConnected,
    AnotherProgram,
    /// Either, because the look-up and the execve() race.
    Either,
}

fn exe(pid: u32) -> String {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap().to_str().unwrap().to_owned()
}

/// The events of the only self-connection. Programs saw the opener and the closer.
fn try_events(daemon: &mut TestDaemon, net: TestNetns, client: HelperProcess) -> Result<[Value; 2], Missed> {
    let opened = daemon.try_expect(1, is_event("established", net.inode))?.remove(0);
    client.finish();
    let closed = daemon.try_expect(1, is_event("closed", net.inode))?.remove(0);
    Missed::if_opener_unseen(&opened)?;
    Missed::if_opener_unseen(&closed)?;
    Missed::if_null(&closed, &["how", "closer"])?;
    Ok([opened, closed])
}

/// Checks the facts about the process that connected as the program `comm`.
fn assert_facts(variant: &HookVariant, event: &Value, pid: u32, comm: &str, now: Now) {
    assert_eq!((&event["pid"], &event["owner"]), (&pid.into(), &"witnessed".into()), "{variant:?}: {event}");
    assert_eq!(event["uid"], 65_534, "{event}");
    assert!(is_name_or_unknown(&event["comm"], comm), "{variant:?}: {event}");
    assert!(!event.to_string().contains(another_program::NAME), "{variant:?}: {event}");
    let this = exe(std::process::id());
    let is_first = event["exe"] == this.as_str() && event["cmdline"][1] == "--exact";
    let is_null = event["exe"].is_null() && event["cmdline"].is_null();
    match now {
        Now::TheProgramThatConnected => assert!(is_first, "{variant:?}: {event}"),
        Now::AnotherProgram => assert!(is_null, "{variant:?}: {event}"),
        Now::Either => {
            assert!(event["exe"].is_null() || event["exe"] == this.as_str(), "{variant:?}: {event}");
        }
    }
    // What is not the program's but the process's stays, where the kernel provides the start time.
    if now == Now::AnotherProgram && !comm_by_thread(comm).is_null() {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = event["cgroup"].as_str().unwrap();
        assert!(groups.lines().any(|line| line.ends_with(path)), "{path} in {groups}");
    }
}

#[test]
fn an_execve_after_the_connect_does_not_change_the_program() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        for now in [Now::Either, Now::AnotherProgram] {
            let mut daemon = TestDaemon::start(variant, &[]);
            if now == Now::AnotherProgram {
                // The process is looked up after its execve().
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
                assert_facts(variant, event, pid, "before-exec", now);
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
        let mut client = HelperProcess::start_unprivileged("connect", None);
        client.read_output();
        let pid = client.pid();
        for event in try_events(&mut daemon, net, client)? {
            assert_facts(variant, &event, pid, "a-client", Now::TheProgramThatConnected);
        }
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
        for (task, now) in [
            ("defer the SYN and send", Now::TheProgramThatConnected),
            ("defer the SYN and exec", Now::AnotherProgram),
        ] {
            let mut daemon = TestDaemon::shared(variant, &[]);
            let mut client = HelperProcess::start(task);
            assert_eq!(client.read_output(), "deferred");
            assert_eq!(client.read_output(), "sent");
            let pid = client.pid();
            for event in try_events(&mut daemon, net, client)? {
                assert_facts(variant, &event, pid, "before-send", now);
            }
            daemon.stop();
        }
        Ok(())
    });
}
