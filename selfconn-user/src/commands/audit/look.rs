//! What there is to judge: of each network namespace its settings, its listeners, the ports that the user names, and
//! from where a dial to each would leave.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt as _,
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Socket, Type};

use super::{fix::Lasts, services::Asked};
use crate::{
    ports::LocalPorts,
    process,
    sockets::{self, Listener, Namespace, Search, Which},
    sysctl,
};

/// A network namespace, as far as it matters here.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) namespace: Namespace,
    pub(super) ports: LocalPorts,
    /// Where its settings come from when it is made anew, if that is known.
    pub(super) lasts: Option<Lasts>,
    pub(super) targets: Vec<Target>,
}

/// What may be dialled.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// `None`: any of the host's. The unspecified one: the listener's.
    pub(super) addr: Option<IpAddr>,
    pub(super) ifindex: Option<u32>,
    pub(super) port: u16,
    pub(super) leaves: Leaves,
    /// The listening socket's; 0: there is none.
    pub(super) inode: u64,
    pub(super) listener: Option<Who>,
    /// Whether the user named it.
    pub(super) is_asked: bool,
}

/// From where a dial to an address leaves, if the client doesn't bind one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Leaves {
    /// From that very address, or from one of the host's that is meant as well.
    Itself,
    /// From another one of the host's: of 127.0.0.0/8 the kernel prefers 127.0.0.1.
    From(IpAddr),
    /// The address is somebody else's.
    Foreign,
    /// It can't be dialled now.
    Nowhere(String),
}

/// Who listens, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Who {
    pub(super) pid: Option<u32>,
    pub(super) comm: Option<String>,
    pub(super) unit: Option<String>,
    pub(super) container: Option<String>,
    pub(super) is_in_pod: bool,
}

impl Who {
    /// For people, not yet escaped.
    pub(super) fn text(&self) -> String {
        let Some(pid) = self.pid else { return "an unknown process".to_owned() };
        let name = format!("{}[{pid}]", self.comm.as_deref().unwrap_or(""));
        match (&self.container, &self.unit) {
            // The scope of a container is named after it.
            (Some(id), _) => format!("{name} container {}", id.get(..12).unwrap_or(id)),
            (None, Some(unit)) => format!("{name} {unit}"),
            (None, None) => name,
        }
    }
}

/// What was looked at.
#[derive(Debug)]
pub(super) struct Looked {
    pub(super) namespaces: Vec<Seen>,
    /// The index of the namespace to which the files of sysctl.d apply, where it was seen.
    pub(super) boot: Option<usize>,
    /// What could not be seen, and why.
    pub(super) unseen: Vec<String>,
}

/// Reads it all.
pub(super) fn look(which: &Which, procfs_only: bool, asked: &[Asked]) -> Result<Looked> {
    let inspected = sockets::inspect(which, procfs_only, |namespace, listeners| {
        let ports = sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")))?;
        Ok(Seen { namespace: namespace.clone(), ports, lasts: None, targets: targets(&listeners, asked) })
    });
    let inspected = inspected.with_context(|| match which {
        Which::At(path) => format!("cannot look at the network namespace {}", path.display()),
        _ => "no network namespace can be looked at".to_owned(),
    })?;
    let (mut namespaces, mut unseen) = (inspected.found, inspected.unseen);
    drop_foreign(&mut namespaces);
    unseen.extend(name_listeners(&mut namespaces));
    let boot = match fs::metadata("/proc/1/ns/net") {
        Ok(first) => namespaces.iter().position(|seen| u64::from(seen.namespace.inode) == first.ino()),
        Err(error) => {
            unseen.push(format!("whether sysctl.d is about this network namespace: /proc/1/ns/net: {error}"));
            None
        }
    };
    for (index, seen) in namespaces.iter_mut().enumerate() {
        let is_in_pod = |target: &Target| target.listener.as_ref().is_some_and(|who| who.is_in_pod);
        seen.lasts = if boot == Some(index) {
            Some(Lasts::SysctlD)
        } else {
            // A pod in the host's network may set nothing there.
            seen.targets.iter().any(is_in_pod).then_some(Lasts::Pod)
        };
    }
    Ok(Looked { namespaces, boot, unseen })
}

/// In the network namespace of the calling thread.
fn targets(listeners: &[Listener], asked: &[Asked]) -> Vec<Target> {
    let mut known: HashMap<(IpAddr, Option<u32>), Leaves> = HashMap::new();
    let mut leaves = |addr: Option<IpAddr>, ifindex, port| match addr.filter(|addr| !addr.is_unspecified()) {
        None => Leaves::Itself,
        Some(addr) => known.entry((addr, ifindex)).or_insert_with(|| leaves(addr, ifindex, port)).clone(),
    };
    let mut seen = HashSet::new();
    let mut targets = Vec::new();
    for listener in listeners {
        let Listener { addr, port, ifindex, inode } = *listener;
        // Several sockets may listen at one place.
        if seen.insert((Some(addr), ifindex, port)) {
            targets.push(Target {
                addr: Some(addr),
                ifindex,
                port,
                leaves: leaves(Some(addr), ifindex, port),
                inode,
                listener: Some(Who::default()),
                is_asked: asked.contains(&Asked { addr: Some(addr), port }),
            });
        }
    }
    for &Asked { addr, port } in asked {
        if seen.insert((addr, None, port)) {
            let leaves = leaves(addr, None, port);
            targets.push(Target {
                addr,
                ifindex: None,
                port,
                leaves,
                inode: 0,
                listener: None,
                is_asked: true,
            });
        }
    }
    targets
}

/// Asks the routing table, by a UDP socket, which sends nothing.
fn leaves(addr: IpAddr, ifindex: Option<u32>, port: u16) -> Leaves {
    let end = |port| match addr {
        IpAddr::V4(addr) => SocketAddr::new(addr.into(), port),
        IpAddr::V6(addr) => SocketAddrV6::new(addr, port, 0, ifindex.unwrap_or(0)).into(),
    };
    let socket = || Socket::new(Domain::for_address(end(0)), Type::DGRAM, None);
    let source = || {
        let socket = socket()?;
        socket.connect(&end(port).into())?;
        socket.local_addr()
    };
    match source().map(|source| source.as_socket().map(|source| source.ip().to_canonical())) {
        Ok(Some(source)) if source == addr => Leaves::Itself,
        outcome => match (socket().and_then(|socket| socket.bind(&end(0).into())), outcome) {
            (Err(error), _) if error.kind() == io::ErrorKind::AddrNotAvailable => Leaves::Foreign,
            (_, Ok(Some(source))) => Leaves::From(source),
            (_, Ok(None)) => Leaves::Nowhere("the kernel gave no source".to_owned()),
            (_, Err(error)) => Leaves::Nowhere(error.to_string()),
        },
    }
}

/// An address that is named, and that another of the namespaces has, says nothing about the rest of them.
fn drop_foreign(namespaces: &mut [Seen]) {
    let is_at_home = |target: &Target| target.leaves != Leaves::Foreign;
    let at_home: HashSet<_> = namespaces
        .iter()
        .flat_map(|seen| &seen.targets)
        .filter(|target| is_at_home(target))
        .map(|target| (target.addr, target.port))
        .collect();
    for (index, seen) in namespaces.iter_mut().enumerate() {
        let is_elsewhere = |target: &Target| index != 0 || at_home.contains(&(target.addr, target.port));
        seen.targets
            .retain(|target| is_at_home(target) || target.listener.is_some() || !is_elsewhere(target));
    }
}

/// Fills in who listens. What could not be seen is returned.
fn name_listeners(namespaces: &mut [Seen]) -> Vec<String> {
    let all = || namespaces.iter().flat_map(|seen| &seen.targets);
    let inodes: HashSet<_> = all().map(|target| target.inode).filter(|inode| *inode != 0).collect();
    if inodes.is_empty() {
        return vec![];
    }
    if !process::is_in_initial_pid_ns() {
        return vec![
            "listeners' processes: their pids are unknown outside the initial pid namespace".to_owned(),
        ];
    }
    let holders = sockets::holders(&inodes, Search::Quick);
    let mut known: HashMap<u32, Who> = HashMap::new();
    for target in namespaces.iter_mut().flat_map(|seen| &mut seen.targets) {
        // A server's first process is older than its workers.
        let Some(first) =
            holders.of.get(&target.inode).and_then(|of| of.iter().min_by_key(|holder| holder.pid))
        else {
            continue;
        };
        let who = known.entry(first.pid).or_insert_with(|| {
            let facts = process::read(first.pid).unwrap_or_default();
            Who {
                pid: Some(first.pid),
                comm: first.comm.clone(),
                is_in_pod: facts.cgroup.is_some_and(|path| is_of_a_pod(&path)),
                unit: facts.unit,
                container: facts.container,
            }
        });
        target.listener = Some(who.clone());
    }
    holders.unseen.into_iter().collect()
}

/// The kubelet puts pods below a control group of this name, by either of its drivers, and maybe within another.
fn is_of_a_pod(cgroup: &str) -> bool {
    let is_root =
        |part: &str| part == "kubepods" || part == "kubepods.slice" || part.ends_with("-kubepods.slice");
    cgroup.split('/').any(is_root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_known_by_its_control_group() {
        for (path, is_pod) in [
            ("/kubepods/burstable/pod1/4a5b", true),
            ("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-4a5b.scope", true),
            ("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice/cri-4a5b.scope", true),
            ("/system.slice/kubelet.service", false),
            ("/system.slice/kubepods-cleaner.service", false),
            ("/", false),
        ] {
            assert_eq!(is_of_a_pod(path), is_pod, "{path}");
        }
    }

    #[test]
    fn where_a_dial_leaves_from_is_asked_of_the_routing_table() {
        let leaves = |addr: &str| leaves(addr.parse().unwrap(), None, 9);
        assert_eq!(leaves("127.0.0.1"), Leaves::Itself);
        assert_eq!(leaves("127.0.0.53"), Leaves::From("127.0.0.1".parse().unwrap()));
        // For documentation only (RFC 5737), so nobody's.
        assert_eq!(leaves("192.0.2.1"), Leaves::Foreign);
    }
}
