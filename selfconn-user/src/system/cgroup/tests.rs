//! Table tests of the names in the path of a control group.

use super::*;

const ID: &str = "7eb263389e5eea068ad3d0c208ea4dd02ba86fa0b2ebd44f63adc391351fba6d";
const POD: &str = "2b7f2ae1-66c6-4a1b-9e3c-0a0b0c0d0e0f";

/// The components of a path whose directories are root's, except those below `delegated`.
fn with_owner<'a>(path: &'a str, delegated: Option<&str>) -> Vec<Component<'a>> {
    let (mut maker, mut components) = (Maker::Root, Vec::new());
    if path.starts_with("/..") {
        maker = Maker::OutOfView;
    }
    for name in path.split('/').filter(|name| !name.is_empty()) {
        components.push(Component { name, maker });
        if Some(name) == delegated {
            maker = Maker::Anyone;
        }
    }
    components
}

#[track_caller]
fn assert_info(components: &[Component<'_>], expected: [Option<&str>; 3]) {
    let info = CgroupInfo::new(components);
    let found = [info.unit.as_deref(), info.container.as_deref(), info.pod.as_deref()];
    assert_eq!(found, expected, "unit, container, pod of {components:?}");
}

/// The text of `/proc/PID/cgroup` as public reports show it, with unit, container and pod.
#[test]
fn the_forms_of_engines_name_unit_container_and_pod() {
    let slice = "kubepods-besteffort-pod2b7f2ae1_66c6_4a1b_9e3c_0a0b0c0d0e0f.slice";
    let scope = format!("cri-containerd-{ID}.scope");
    let ecs = "fedcba9876543210fedcba9876543210-1234567890";
    for (text, unit, container, pod) in [
        ("0::/system.slice/nginx.service".to_owned(), Some("nginx.service"), None, None),
        (
            // Below Delegate=yes the names are the user's.
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/postgresql.service".to_owned(),
            Some("user@1000.service"),
            None,
            None,
        ),
        // A hybrid host with the cgroupfs driver.
        (format!("1:name=systemd:/docker/{ID}\n0::/system.slice/containerd.service"), None, Some(ID), None),
        // containerd by cgroupfs, with the name of a slice of systemd.
        (
            format!(
                "0::/system.slice/containerd.service/\
                 kubepods-burstable-pod2b7f2ae1_66c6_4a1b_9e3c_0a0b0c0d0e0f.slice:cri-containerd:{ID}"
            ),
            None,
            Some(ID),
            Some(POD),
        ),
        (
            format!("0::/kubepods.slice/kubepods-besteffort.slice/{slice}/{scope}"),
            Some(scope.as_str()),
            Some(ID),
            Some(POD),
        ),
        // A node that is a container itself: `--cgroup-root`.
        (
            format!("0::/kubelet.slice/kubelet-kubepods.slice/kubelet-{slice}/{scope}"),
            Some(scope.as_str()),
            Some(ID),
            Some(POD),
        ),
        // Seen from a private control group namespace.
        (format!("0::/../../{slice}/{scope}"), Some(scope.as_str()), Some(ID), Some(POD)),
        (format!("0::/ecs/0123456789abcdef0123456789abcdef/{ecs}"), None, Some(ecs), None),
        // LXC: not the nginx.service of the host.
        ("0::/lxc.payload.web1/system.slice/nginx.service".to_owned(), None, Some("web1"), None),
        (
            "0::/machine.slice/machine-web1.scope/payload/system.slice/nginx.service".to_owned(),
            Some("machine-web1.scope"),
            Some("web1"),
            None,
        ),
    ] {
        let (_, path) = path(&text).unwrap();
        let delegated = path.contains("user@").then_some("user@1000.service");
        assert_info(&with_owner(path, delegated), [unit, container, pod]);
    }
}

#[test]
fn other_names_of_engines_and_near_misses() {
    let docker = format!("docker-{ID}.scope");
    let libpod = format!("libpod-{ID}.scope");
    let conmon = format!("libpod-conmon-{ID}.scope");
    let crio = format!("crio-{ID}.scope");
    for (path, expected) in [
        ("/".to_owned(), [None; 3]),
        ("/user.slice/user-0.slice/session-3.scope".to_owned(), [Some("session-3.scope"), None, None]),
        // A directory for the units of systemd that would collide with a file of the kernel.
        ("/system.slice/_cpu.service".to_owned(), [Some("cpu.service"), None, None]),
        ("/init.scope".to_owned(), [Some("init.scope"), None, None]),
        ("/system.slice/a.service/b.service".to_owned(), [Some("a.service"), None, None]),
        ("/system.slice/not-a-unit/b.service".to_owned(), [None; 3]),
        (format!("/docker/{ID}"), [None, Some(ID), None]),
        (format!("/system.slice/{docker}"), [Some(&docker), Some(ID), None]),
        // A container in a container: the outer one, which the host's engine knows.
        (format!("/system.slice/{docker}/docker/{}", ID.replace('7', "8")), [Some(&docker), Some(ID), None]),
        (format!("/kubepods/burstable/pod{POD}/{ID}"), [None, Some(ID), Some(POD)]),
        // Its root may be uid 0 without a user namespace.
        (format!("/system.slice/{docker}/pod{POD}"), [Some(&docker), Some(ID), None]),
        (format!("/kubepods/pod{}/{ID}", &ID[..32]), [None, Some(ID), Some(&ID[..32])]),
        (format!("/kubepods.slice/kubepods-pod1.slice/{crio}"), [Some(&crio), Some(ID), None]),
        // podman, and the container's own groups below.
        (format!("/machine.slice/{libpod}/container"), [Some(&libpod), Some(ID), None]),
        (format!("/machine.slice/{libpod}/init.scope"), [Some(&libpod), Some(ID), None]),
        (format!("/machine.slice/{conmon}"), [Some(&conmon), None, None]),
        // podman with --cgroups=split: the unit is the container's.
        (format!("/system.slice/web.service/libpod-payload-{ID}"), [Some("web.service"), Some(ID), None]),
        // systemd-nspawn@.service; a name that systemd escaped; a virtual machine.
        (
            "/machine.slice/systemd-nspawn@web.service/payload".to_owned(),
            [Some("systemd-nspawn@web.service"), Some("web"), None],
        ),
        (
            r"/machine.slice/machine-web\x2d1.scope/payload".to_owned(),
            [Some(r"machine-web\x2d1.scope"), Some("web-1"), None],
        ),
        (
            r"/machine.slice/machine-qemu\x2d1\x2dweb.scope/libvirt".to_owned(),
            [Some(r"machine-qemu\x2d1\x2dweb.scope"), None, None],
        ),
        (format!("/docker/{}", &ID[1..]), [None; 3]),
        (format!("/docker/{}", ID.to_uppercase()), [None; 3]),
        (format!("/other/{}/{}-1", &ID[..32], &ID[..32]), [None; 3]),
        (format!("/ecs/{}/{}-", &ID[..32], &ID[..32]), [None; 3]),
        ("/kubepods/pod2b7f2ae1-66c6-4a1b-9e3c/x".to_owned(), [None; 3]),
    ] {
        assert_info(&with_owner(&path, None), expected);
    }
}

#[test]
fn a_name_below_a_users_directory_is_not_used() {
    let docker = format!("docker-{ID}.scope");
    for (path, delegated, expected) in [
        (format!("/system.slice/job.service/{docker}"), "job.service", [Some("job.service"), None, None]),
        ("/home/nginx.service".to_owned(), "home", [None; 3]),
        (format!("/home/kubepods/pod{POD}/{ID}"), "home", [None; 3]),
        ("/home.slice/nginx.service".to_owned(), "home.slice", [None; 3]),
        (
            "/machine.slice/machine-web1.scope/payload".to_owned(),
            "machine-web1.scope",
            [Some("machine-web1.scope"), None, None],
        ),
        ("/lxc.payload.web1/lxc.payload.web2".to_owned(), "lxc.payload.web1", [None, Some("web1"), None]),
    ] {
        assert_info(&with_owner(&path, Some(delegated)), expected);
    }
}

#[test]
fn out_of_view_a_name_is_used_down_to_the_first_one_that_is_not_a_slice() {
    let docker = format!("docker-{ID}.scope");
    for (path, expected) in [
        (format!("/../{docker}"), [Some(docker.as_str()), Some(ID), None]),
        (format!("/../job.service/{docker}"), [Some("job.service"), None, None]),
        (format!("/../burstable/pod{POD}/{ID}"), [None, Some(ID), Some(POD)]),
        (format!("/../job/pod{POD}/{ID}"), [None; 3]),
        ("/../user-1.slice/user@1.service/nginx.service".to_owned(), [Some("user@1.service"), None, None]),
    ] {
        assert_info(&with_owner(&path, None), expected);
    }
}

#[test]
fn the_owner_is_the_group_that_only_root_makes() {
    let docker = format!("docker-{ID}.scope");
    for (path, delegated, owner) in [
        ("/".to_owned(), None, None),
        (
            "/system.slice/nginx.service/worker".to_owned(),
            None,
            Some("/system.slice/nginx.service".to_owned()),
        ),
        (
            "/user.slice/user-1.slice/user@1.service/a/b".to_owned(),
            Some("user@1.service"),
            Some("/user.slice/user-1.slice/user@1.service".to_owned()),
        ),
        (format!("/system.slice/{docker}/a/b"), None, Some(format!("/system.slice/{docker}"))),
        (format!("/kubepods/pod{POD}/{ID}/a"), None, Some(format!("/kubepods/pod{POD}/{ID}"))),
        ("/a.slice/b.slice/c.slice/d.slice".to_owned(), None, Some("/a.slice/b.slice/c.slice".to_owned())),
        ("/home.slice/x/y".to_owned(), Some("home.slice"), Some("/home.slice".to_owned())),
    ] {
        assert_eq!(CgroupInfo::new(&with_owner(&path, delegated)).owner, owner, "{path}");
    }
}

#[test]
fn the_cgroup_is_systemds_or_the_unified_one() {
    use Hierarchy::{Systemd, Unified};
    for (text, expected) in [
        ("0::/system.slice/a.service\n", Some((Unified, "/system.slice/a.service"))),
        ("1:name=systemd:/system.slice/a.service\n0::/\n", Some((Systemd, "/system.slice/a.service"))),
        ("1:name=systemd:/\n0::/system.slice/a.service\n", Some((Unified, "/system.slice/a.service"))),
        ("1:name=systemd:/docker/b\n0::/system.slice/a.service\n", Some((Systemd, "/docker/b"))),
        ("12:pids:/x\n1:name=systemd:/y\n", Some((Systemd, "/y"))),
        ("1:name=systemd:/\n", Some((Systemd, "/"))),
        ("0::/\n", Some((Unified, "/"))),
        ("0::/with:colon\n", Some((Unified, "/with:colon"))),
        ("12:pids:/x\n", None),
        ("", None),
    ] {
        assert_eq!(path(text), expected, "{text:?}");
    }
}
