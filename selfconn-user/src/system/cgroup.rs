//! Control groups: which one a process is in, and the systemd unit, the container and the pod that its path names.
//!
//! The owner of a directory makes directories of any name below it, and systemd gives the directory of every
//! `Delegate=yes` unit to the unit's user. A name is therefore used only where every directory above it is
//! root's. Pure; `directories` asks the file system who owns what.

use std::{fmt, str::FromStr, sync::Arc};

mod directories;
#[cfg(test)]
mod tests;

pub(super) use directories::components;
pub use directories::{OwnGroup, own_group, visit_named};

/// Levels of a path without unit and container that only root makes.
const OWNER_LEVELS: usize = 3;

/// A control group whose name only root can have given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedGroup {
    /// Its path in the unified hierarchy.
    pub path: String,
    /// The systemd unit in that path.
    pub unit: Option<String>,
    /// The kernel's id of the group: the inode of its directory.
    pub id: u64,
}

/// A control group that `selfconn exec` made: its processes are one owner's, and the programs in the kernel know them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedGroup {
    /// The kernel's id of the group: the inode of its directory.
    pub id: u64,
    /// Its path in the unified hierarchy.
    pub path: Arc<str>,
}

impl FromStr for WatchedGroup {
    type Err = &'static str;

    /// Parses `ID:PATH`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once(':').and_then(|(id, path)| Some((id.parse().ok()?, path)));
        match parts {
            Some((id @ 1.., path)) if path.starts_with('/') => Ok(Self { id, path: path.into() }),
            _ => Err("must be ID:PATH"),
        }
    }
}

impl fmt::Display for WatchedGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.id, self.path)
    }
}

impl WatchedGroup {
    /// True if a group with this path is this one, or below it.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        path.strip_prefix(&*self.path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// The hierarchy that has the names. On a host with both, container engines that write groups themselves write
/// them to systemd's, and the process stays in its engine's unified group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hierarchy {
    /// The unified hierarchy of cgroup v2.
    Unified,
    /// systemd's own hierarchy, `name=systemd`, of cgroup v1.
    Systemd,
}

/// The control group in the text of `/proc/PID/cgroup`: that of systemd's own hierarchy unless it is the root
/// of it, else the unified one.
pub(super) fn path(text: &str) -> Option<(Hierarchy, &str)> {
    let path_of = |name: &str| {
        text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            (controllers == name).then_some(path)
        })
    };
    let systemd = path_of("name=systemd").map(|path| (Hierarchy::Systemd, path));
    let unified = path_of("").map(|path| (Hierarchy::Unified, path));
    systemd.filter(|(_, path)| *path != "/").or(unified).or(systemd)
}

/// Who can have made a directory of a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    /// Only root: every directory above is root's.
    Root,
    /// A directory above it belongs to a user, or has gone.
    Anyone,
    /// The directories above cannot be seen: the path leads out of this process's control group namespace, or
    /// the hierarchy is not mounted here.
    OutOfView,
}

/// A component of the path of a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Component<'a> {
    name: &'a str,
    maker: Maker,
}

/// What the path of a control group says about its processes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CgroupInfo {
    pub(super) unit: Option<String>,
    pub(super) container: Option<String>,
    pub(super) pod: Option<String>,
    /// The group that pays for its processes: the container or the unit, else at most three levels. A group that
    /// a user or a container made is part of it.
    pub(super) owner: Option<String>,
}

impl CgroupInfo {
    /// The unit by systemd's rule (`cg_path_get_unit`, src/basic/cgroup-util.c at v257): the first component
    /// that is not a slice. The container is the outermost one, because the names below are the container's.
    /// A container engine that makes groups below its own unit starts containers that are not that unit.
    pub(super) fn new(components: &[Component<'_>]) -> Self {
        let trusted = trusted_names(components);
        let unit_at = trusted.iter().position(|name| !name.ends_with(".slice"));
        let unit = unit_at.map(|at| trusted[at]).filter(|name| is_unit(name));
        let container = (0..trusted.len()).find_map(|at| Some((at, container(&trusted, at)?)));
        let leaf = container.as_ref().map(|(at, _)| *at).or(unit_at);
        let levels = leaf.map_or(OWNER_LEVELS, |at| at + 1).min(trusted.len());
        // The root of a container may make directories below its own that look like root's.
        let down_to_container = container.as_ref().map_or(trusted.len(), |(at, _)| at + 1);
        let is_engine = unit_at
            .zip(container.as_ref())
            .is_some_and(|(unit_at, (at, _))| unit_at < *at && !trusted[*at].starts_with("libpod-"));
        Self {
            unit: unit.filter(|_| !is_engine).map(|name| name.strip_prefix('_').unwrap_or(name).to_owned()),
            container: container.map(|(_, id)| id),
            pod: trusted[..down_to_container].iter().find_map(|name| pod(name)),
            owner: (levels > 0).then(|| format!("/{}", trusted[..levels].join("/"))),
        }
    }
}

/// The names that root chose. Out of view, those down to the first one that systemd or Kubernetes would not
/// keep for itself.
fn trusted_names<'a>(components: &[Component<'a>]) -> Vec<&'a str> {
    let mut is_below_leaf = false;
    let is_trusted = |component: &&Component<'_>| match component.maker {
        Maker::Root => true,
        Maker::Anyone => false,
        Maker::OutOfView => !std::mem::replace(&mut is_below_leaf, !is_inner(component.name)),
    };
    let named = components.iter().filter(|component| component.name != "..");
    named.take_while(is_trusted).map(|component| component.name).collect()
}

/// True for a group that has only groups of systemd or of Kubernetes directly below it.
fn is_inner(name: &str) -> bool {
    name.ends_with(".slice")
        || matches!(name, "kubepods" | "burstable" | "besteffort")
        || name.starts_with("pod") && pod(name).is_some()
}

fn is_unit(name: &str) -> bool {
    name.ends_with(".service") || name.ends_with(".scope")
}

/// The container that the component at this index stands for.
fn container(names: &[&str], at: usize) -> Option<String> {
    let name = names[at];
    if let Some(name) = name.strip_prefix("lxc.payload.") {
        return Some(name.to_owned());
    }
    // systemd-nspawn runs the container in `payload`, below a scope or below its template's service.
    if names.get(at + 1) == Some(&"payload") {
        let machine = name.strip_prefix("machine-").and_then(|name| name.strip_suffix(".scope"));
        let instance = name.strip_prefix("systemd-nspawn@").and_then(|name| name.strip_suffix(".service"));
        return machine.or(instance).map(unescape);
    }
    // docker, containerd, cri-o and podman name the group after the container's id, with or without a prefix;
    // containerd by cgroupfs writes `SLICE:PREFIX:ID`.
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let (prefix, id) = name.rsplit_once(['-', ':']).unwrap_or(("", name));
    // conmon monitors a container and runs outside it.
    if is_lower_hex(id, 64) && !prefix.ends_with("conmon") {
        return Some(id.to_owned());
    }
    // ECS: `/ecs/TASK/CONTAINER`.
    let is_ecs = names.get(..at.checked_sub(1)?)?.last() == Some(&"ecs")
        && is_lower_hex(prefix, 32)
        && !id.is_empty()
        && id.bytes().all(|byte| byte.is_ascii_digit());
    is_ecs.then(|| name.to_owned())
}

/// The uid in the name of a pod's group: `kubepods-burstable-podUID.slice`, where `_` stands for `-`, or
/// `podUID`. A static pod has 32 hexadecimal digits. With `--cgroup-root`, names of slices begin with that root.
fn pod(name: &str) -> Option<String> {
    let name = name.split_once(':').map_or(name, |(slice, _)| slice);
    let slice = name
        .strip_suffix(".slice")
        .filter(|slice| slice.starts_with("kubepods") || slice.contains("-kubepods-"));
    let uid = match slice {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    let mut parts = uid.split('-');
    let is_uuid = [8, 4, 4, 4, 12]
        .into_iter()
        .all(|length| parts.next().is_some_and(|part| is_lower_hex(part, length)))
        && parts.next().is_none();
    (is_uuid || is_lower_hex(&uid, 32)).then_some(uid)
}

fn is_lower_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Runs every parser of this module on arbitrary text.
#[cfg(any(test, fuzzing))]
pub(super) fn parse_anything(text: &str) {
    let path = path(text).map_or(text, |(_, path)| path);
    for maker in [Maker::Root, Maker::OutOfView] {
        let components: Vec<_> = path.split('/').map(|name| Component { name, maker }).collect();
        let _ = CgroupInfo::new(&components);
    }
}

/// The name that systemd escaped: `\x2d` stands for `-`. The result is the escaped name if it is not text.
fn unescape(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.strip_prefix(b"x").and_then(|code| code.get(..2)).filter(|_| first == b'\\');
        let code = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| name.to_owned())
}
