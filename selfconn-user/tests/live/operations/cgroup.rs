//! What the path of a control group says about its processes, and whose word that is.

use serde_json::Value;

use crate::support::{
    cgroup::TestCgroup,
    daemon::{HookVariant, TestDaemon, is_event},
    helper_process::{HelperProcess, UNPRIVILEGED},
    netns::TestNetns,
};

const ID: &str = "7eb263389e5eea068ad3d0c208ea4dd02ba86fa0b2ebd44f63adc391351fba6d";
const POD: &str = "2b7f2ae1-66c6-4a1b-9e3c-0a0b0c0d0e0f";
const OTHER_POD: &str = "12345678-1234-1234-1234-123456789abc";

/// The event of a self-connection of an unprivileged process that is started in the first group, makes the
/// directory and moves there.
fn established_in(net: TestNetns, daemon: &mut TestDaemon, start: &TestCgroup, below: &str) -> Value {
    let directory = start.path().join(below);
    let task = format!("connect in cgroup {}", directory.display());
    let mut client = HelperProcess::start_unprivileged(&task, Some(&start.procs()));
    let port: u64 = client.read_output().parse().unwrap();
    let is_this = |event: &Value| is_event("established", net.inode)(event) && event["pid"] == client.pid();
    let event = daemon.expect(1, is_this).remove(0);
    assert_eq!((&event["port"], &event["uid"]), (&port.into(), &UNPRIVILEGED.into()), "{event}");
    assert!(event["cgroup"].as_str().unwrap().ends_with(below), "{event}");
    client.finish();
    event
}

/// Unit, container and pod.
fn names(event: &Value) -> [Value; 3] {
    ["unit", "container", "pod"].map(|field| event[field].clone())
}

#[test]
fn a_control_group_that_a_user_made_names_no_unit_and_no_container() {
    let net = TestNetns::enter_new();
    let delegated = match TestCgroup::create("user@65534.service") {
        Ok(delegated) => delegated,
        Err(why) => return println!("skipped: {why}"),
    };
    delegated.delegate();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    for below in [
        "nginx.service".to_owned(),
        format!("docker-{ID}.scope"),
        format!("kubepods-pod{}.slice/cri-containerd-{ID}.scope", POD.replace('-', "_")),
        format!("kubepods/burstable/pod{POD}/{ID}"),
        "machine-web.scope/payload".to_owned(),
        "lxc.payload.web".to_owned(),
        String::new(),
    ] {
        let event = established_in(net, &mut daemon, &delegated, &below);
        assert_eq!(names(&event), ["user@65534.service".into(), Value::Null, Value::Null], "{event}");
    }
    daemon.stop();
}

/// The negative twin: the same names, made by root.
#[test]
fn a_control_group_that_root_made_names_unit_container_and_pod() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let scope = format!("cri-containerd-{ID}.scope");
    let docker = format!("docker-{ID}.scope");
    let ecs = format!("{}-1234567890", &ID[..32]);
    let ecs_path = format!("ecs/{}/{ecs}", &ID[32..]);
    for (path, expected) in [
        ("nginx.service".to_owned(), [Some("nginx.service"), None, None]),
        (docker.clone(), [Some(docker.as_str()), Some(ID), None]),
        (
            format!("kubepods-pod{}.slice/{scope}", POD.replace('-', "_")),
            [Some(scope.as_str()), Some(ID), Some(POD)],
        ),
        (format!("kubepods/burstable/pod{POD}/{ID}"), [None, Some(ID), Some(POD)]),
        ("lxc.payload.web".to_owned(), [None, Some("web"), None]),
        ("machine-web.scope/payload".to_owned(), [Some("machine-web.scope"), Some("web"), None]),
        (ecs_path, [None, Some(&*ecs), None]),
        (
            format!("kubepods-pod{}.slice:cri-containerd:{ID}", POD.replace('-', "_")),
            [None, Some(ID), Some(POD)],
        ),
    ] {
        let group = match TestCgroup::create(&path) {
            Ok(group) => group,
            Err(why) => return println!("skipped: {why}"),
        };
        // The root of a container gives the names below it, and may be uid 0, too. Names below a unit are root's.
        let _below = expected[1].map(|_| {
            let below = TestCgroup::create(&format!("{path}/pod{OTHER_POD}")).unwrap();
            below.delegate();
            let event = established_in(net, &mut daemon, &below, "");
            assert_eq!(names(&event), expected.map(|name| name.map_or(Value::Null, Into::into)), "{event}");
            below
        });
        // The container's own directories below change nothing: the user owns the group itself.
        group.delegate();
        for below in ["", "nginx.service", "system.slice/nginx.service"] {
            let event = established_in(net, &mut daemon, &group, below);
            assert_eq!(names(&event), expected.map(|name| name.map_or(Value::Null, Into::into)), "{event}");
        }
    }
    daemon.stop();
}
