//! Control groups: the path of a process's group, and the systemd unit and the container that it names. Parsers of text;
//! nothing here opens a file.

/// The control group in the text of `/proc/PID/cgroup`: that of the unified hierarchy, or that of systemd's
/// own hierarchy if the process is in the root of the unified one.
pub(super) fn path(text: &str) -> Option<String> {
    let path_of = |hierarchy: &str| {
        text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            (controllers == hierarchy).then_some(path)
        })
    };
    let unified = path_of("");
    let path = unified.filter(|path| *path != "/").or_else(|| path_of("name=systemd")).or(unified)?;
    Some(path.to_owned())
}

/// What the path of a control group says about its processes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CgroupInfo {
    pub(super) unit: Option<String>,
    pub(super) container: Option<String>,
}

impl CgroupInfo {
    /// Finds the innermost unit (a service, or the scope of a session) and the innermost container. docker,
    /// containerd, cri-o and podman name the group after the container's id of 64 hexadecimal digits, with or
    /// without a prefix.
    pub(super) fn parse(path: &str) -> Self {
        let innermost = || path.rsplit('/');
        let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
        Self {
            unit: innermost().find(is_unit).map(str::to_owned),
            container: innermost().find_map(container_id).map(str::to_owned),
        }
    }
}

fn container_id(part: &str) -> Option<&str> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = part.rsplit_once('-').unwrap_or(("", part));
    let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    // conmon monitors a container and runs outside it.
    (is_id && !prefix.ends_with("conmon")).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_path_names_unit_and_container() {
        const ID: &str = "4a5b6c7d8e9f00112233445566778899aabbccddeeff00112233445566778899";
        for (path, unit, container) in [
            ("/system.slice/nginx.service".to_owned(), Some("nginx.service".to_owned()), None),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/web.service".to_owned(),
                Some("web.service".to_owned()),
                None,
            ),
            ("/user.slice/user-0.slice/session-3.scope".to_owned(), Some("session-3.scope".to_owned()), None),
            ("/".to_owned(), None, None),
            // docker, by cgroupfs and by systemd
            (format!("/docker/{ID}"), None, Some(ID)),
            (format!("/system.slice/docker-{ID}.scope"), Some(format!("docker-{ID}.scope")), Some(ID)),
            // containerd and cri-o below Kubernetes
            (
                format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope"),
                Some(format!("cri-containerd-{ID}.scope")),
                Some(ID),
            ),
            (format!("/kubepods/burstable/pod1/{ID}"), None, Some(ID)),
            (format!("/kubepods.slice/crio-{ID}.scope"), Some(format!("crio-{ID}.scope")), Some(ID)),
            // podman, and the container's own groups below
            (
                format!("/machine.slice/libpod-{ID}.scope/container"),
                Some(format!("libpod-{ID}.scope")),
                Some(ID),
            ),
            (format!("/machine.slice/libpod-{ID}.scope/init.scope"), Some("init.scope".to_owned()), Some(ID)),
            (
                format!("/machine.slice/libpod-conmon-{ID}.scope"),
                Some(format!("libpod-conmon-{ID}.scope")),
                None,
            ),
            (format!("/docker/{}", &ID[1..]), None, None),
            (format!("/docker/{}", ID.to_uppercase()), None, None),
        ] {
            let expected = CgroupInfo { unit, container: container.map(str::to_owned) };
            assert_eq!(CgroupInfo::parse(&path), expected, "{path}");
        }
    }

    #[test]
    fn the_cgroup_is_the_unified_one_or_systemds() {
        for (text, path) in [
            ("0::/system.slice/a.service\n", Some("/system.slice/a.service")),
            ("12:pids:/x\n1:name=systemd:/system.slice/a.service\n0::/\n", Some("/system.slice/a.service")),
            ("12:pids:/x\n1:name=systemd:/y\n", Some("/y")),
            ("0::/\n", Some("/")),
            ("0::/with:colon\n", Some("/with:colon")),
            ("12:pids:/x\n", None),
            ("", None),
        ] {
            assert_eq!(super::path(text).as_deref(), path, "{text:?}");
        }
    }
}
