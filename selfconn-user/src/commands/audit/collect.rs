//! Reads the state that the audit assesses: for each network namespace its port settings, its listeners, the
//! ports that the user names, and the source address that the kernel chooses for a connect to each of them.
//!
//! The audit reads its input only here and in `boot` and `services`. Nothing here knows how it is rated.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
};

use anyhow::{Context as _, Result};

use super::services::RequestedService;
use crate::{
    bpf::loader::Iterators,
    ports::{LocalPorts, sysctl},
    sockets::{self, HolderSearch, InspectOptions, Namespace, NamespaceSelection, SocketEntry},
    system::{
        process::{self, ProcessInfo, ProcessProof},
        route,
    },
};

/// The audited state of one network namespace.
#[derive(Clone, Debug)]
pub(super) struct NamespaceInfo {
    pub(super) namespace: Namespace,
    pub(super) local_ports: LocalPorts,
    /// Where the settings of this namespace are configured permanently. `None`: unknown.
    pub(super) persistence: Option<Persistence>,
    pub(super) audited_ports: Vec<AuditedPort>,
}

/// An address and port to assess.
#[derive(Clone, Debug)]
pub(super) struct AuditedPort {
    /// `None`: any address of the host. The unspecified address: a listener on all addresses.
    pub(super) addr: Option<IpAddr>,
    pub(super) ifindex: Option<u32>,
    pub(super) port: u16,
    pub(super) route_source: RouteSource,
    /// The inode of the listening socket. 0: no listener.
    pub(super) inode: u64,
    pub(super) listener: Option<ListenerProcess>,
    /// True if the user named this port.
    pub(super) is_requested: bool,
}

/// The source address that the kernel chooses for a connect to an address, if the client does not bind one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RouteSource {
    /// The destination address itself. Also for an unspecified destination, which stands for every address of
    /// the host.
    Same,
    /// Another address of the host. Example: for all of 127.0.0.0/8 the kernel chooses 127.0.0.1.
    Other(IpAddr),
    /// The destination is not an address of this network namespace.
    NotLocal,
    /// No route to the destination at the moment, with the reason.
    Unroutable(String),
}

/// Where the sysctls of a namespace are configured permanently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Persistence {
    /// Network namespace of the host: in the files of sysctl.d.
    SysctlD,
    /// Network namespace of a pod: in the pod specification.
    Pod,
}

/// The process that holds a listening socket. Unknown fields are `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ListenerProcess {
    pub(super) pid: Option<u32>,
    pub(super) comm: Option<String>,
    pub(super) unit: Option<Arc<str>>,
    pub(super) container: Option<Arc<str>>,
    pub(super) is_in_pod: bool,
}

impl ListenerProcess {
    /// The process as text for people. The caller must escape it.
    pub(super) fn description(&self) -> String {
        let Some(pid) = self.pid else { return "an unknown process".to_owned() };
        let name = format!("{}[{pid}]", self.comm.as_deref().unwrap_or(""));
        match (&self.container, &self.unit) {
            // The unit of a container is a scope named after the container id, so the id is enough.
            (Some(id), _) => format!("{name} container {}", id.get(..12).unwrap_or(id)),
            (None, Some(unit)) => format!("{name} {unit}"),
            (None, None) => name,
        }
    }
}

/// All that the audit assesses.
#[derive(Debug)]
pub(super) struct AuditInput {
    pub(super) namespaces: Vec<NamespaceInfo>,
    /// Index of the namespace of process 1, to which the files of sysctl.d apply. `None`: not among
    /// `namespaces`.
    pub(super) init_namespace: Option<usize>,
    /// What could not be read, and why.
    pub(super) unseen: Vec<String>,
}

/// Reads all selected namespaces.
pub(super) fn collect(
    selection: &NamespaceSelection,
    procfs_only: bool,
    services: &[RequestedService],
) -> Result<AuditInput> {
    let (iterators, no_list) = Iterators::open();
    let options = InspectOptions { selection, procfs_only, namespaces: iterators.namespaces.as_ref() };
    let inspected = sockets::inspect(options, |namespace, listeners| {
        let local_ports = sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")))?;
        let audited_ports = audited_ports(&listeners, services);
        Ok(NamespaceInfo { namespace: namespace.clone(), local_ports, persistence: None, audited_ports })
    });
    let inspected = inspected.with_context(|| match selection {
        NamespaceSelection::At(path) => format!("cannot inspect the network namespace {}", path.display()),
        NamespaceSelection::Inode(inode) => format!("cannot inspect the network namespace {inode}"),
        _ => "cannot inspect any network namespace".to_owned(),
    })?;
    let (mut namespaces, mut unseen) = (inspected.found, inspected.unseen);
    if *selection == NamespaceSelection::All {
        unseen.extend(no_list.map(|why| sockets::no_list(&why)));
    }
    drop_ports_of_other_namespaces(&mut namespaces);
    unseen.extend(identify_listeners(&mut namespaces));
    let init_namespace = match fs::metadata("/proc/1/ns/net") {
        Ok(init) => namespaces.iter().position(|info| u64::from(info.namespace.id.inode) == init.ino()),
        Err(error) => {
            unseen
                .push(format!("whether sysctl.d applies to this network namespace: /proc/1/ns/net: {error}"));
            None
        }
    };
    for (index, info) in namespaces.iter_mut().enumerate() {
        let is_in_pod =
            |audited: &AuditedPort| audited.listener.as_ref().is_some_and(|process| process.is_in_pod);
        info.persistence = if init_namespace == Some(index) {
            // Also if a pod listens here: a pod in the host's network cannot set sysctls of the host.
            Some(Persistence::SysctlD)
        } else {
            info.audited_ports.iter().any(is_in_pod).then_some(Persistence::Pod)
        };
    }
    Ok(AuditInput { namespaces, init_namespace, unseen })
}

/// The ports to audit in the network namespace of the calling thread.
fn audited_ports(listeners: &[SocketEntry], services: &[RequestedService]) -> Vec<AuditedPort> {
    let mut cache: HashMap<(IpAddr, Option<u32>), RouteSource> = HashMap::new();
    let mut cached_source =
        |addr: Option<IpAddr>, ifindex, port| match addr.filter(|addr| !addr.is_unspecified()) {
            None => RouteSource::Same,
            Some(addr) => {
                cache.entry((addr, ifindex)).or_insert_with(|| route_source(addr, ifindex, port)).clone()
            }
        };
    let mut seen = HashSet::new();
    let mut audited_ports = Vec::new();
    for listener in listeners {
        let &SocketEntry { endpoint, inode, .. } = listener;
        let ifindex = endpoint.device().filter(|_| endpoint.is_link_local());
        let (addr, port) = (endpoint.ip(), endpoint.port);
        // Several sockets can listen on the same address and port.
        if seen.insert((Some(addr), ifindex, port)) {
            audited_ports.push(AuditedPort {
                addr: Some(addr),
                ifindex,
                port,
                route_source: cached_source(Some(addr), ifindex, port),
                inode,
                listener: Some(ListenerProcess::default()),
                is_requested: services.contains(&RequestedService { addr: Some(addr), port }),
            });
        }
    }
    for &RequestedService { addr, port } in services {
        if seen.insert((addr, None, port)) {
            let route_source = cached_source(addr, None, port);
            audited_ports.push(AuditedPort {
                addr,
                ifindex: None,
                port,
                route_source,
                inode: 0,
                listener: None,
                is_requested: true,
            });
        }
    }
    audited_ports
}

fn route_source(addr: IpAddr, ifindex: Option<u32>, port: u16) -> RouteSource {
    let destination = match addr {
        IpAddr::V4(addr) => SocketAddr::new(addr.into(), port),
        IpAddr::V6(addr) => SocketAddrV6::new(addr, port, 0, ifindex.unwrap_or(0)).into(),
    };
    match route::source(destination).map(|source| source.to_canonical()) {
        Ok(source) if source == addr => RouteSource::Same,
        outcome => match (route::bind(destination), outcome) {
            (Err(error), _) if error.kind() == io::ErrorKind::AddrNotAvailable => RouteSource::NotLocal,
            (_, Ok(source)) => RouteSource::Other(source),
            (_, Err(error)) => RouteSource::Unroutable(error.to_string()),
        },
    }
}

/// Drops the requested addresses that a namespace does not have. A requested address that no namespace has is
/// kept once, in the first namespace, so that the output mentions it.
fn drop_ports_of_other_namespaces(namespaces: &mut [NamespaceInfo]) {
    let is_local = |audited: &AuditedPort| audited.route_source != RouteSource::NotLocal;
    let local: HashSet<_> = namespaces
        .iter()
        .flat_map(|info| &info.audited_ports)
        .filter(|audited| is_local(audited))
        .map(|audited| (audited.addr, audited.port))
        .collect();
    for (index, info) in namespaces.iter_mut().enumerate() {
        let is_shown_elsewhere =
            |audited: &AuditedPort| index != 0 || local.contains(&(audited.addr, audited.port));
        info.audited_ports.retain(|audited| {
            is_local(audited) || audited.listener.is_some() || !is_shown_elsewhere(audited)
        });
    }
}

/// Fills in the listening processes. Returns what could not be read.
fn identify_listeners(namespaces: &mut [NamespaceInfo]) -> Vec<String> {
    let all = || namespaces.iter().flat_map(|info| &info.audited_ports);
    let inodes: HashSet<_> = all().map(|audited| audited.inode).filter(|inode| *inode != 0).collect();
    if inodes.is_empty() {
        return vec![];
    }
    if !process::is_in_initial_pid_ns() {
        return vec![
            "processes of the listeners: their pids are unknown outside the initial pid namespace".to_owned(),
        ];
    }
    let holders = sockets::find_holders(&inodes, HolderSearch::Quick);
    let mut processes: HashMap<u32, ListenerProcess> = HashMap::new();
    for audited in namespaces.iter_mut().flat_map(|info| &mut info.audited_ports) {
        // The lowest pid: the main process of a server is usually older than its workers.
        let Some(first) = holders
            .by_inode
            .get(&audited.inode)
            .and_then(|holders| holders.iter().min_by_key(|holder| holder.pid))
        else {
            continue;
        };
        let process = processes.entry(first.pid).or_insert_with(|| {
            let info = facts_of(first.pid).unwrap_or_default();
            ListenerProcess {
                pid: Some(first.pid),
                comm: first.comm.clone(),
                is_in_pod: info.cgroup.is_some_and(|path| is_in_pod_cgroup(&path)),
                unit: info.unit,
                container: info.container,
            }
        });
        audited.listener = Some(process.clone());
    }
    holders.unseen.into_iter().collect()
}

/// What identifies a listening process: its control group. Nothing is read that waits for the process.
fn facts_of(pid: u32) -> Option<ProcessInfo> {
    process::read_facts(pid, &ProcessProof::None, true).map(|facts| facts.info)
}

/// True if the kubelet made this control group. The kubelet puts pods below `kubepods` (cgroupfs driver) or
/// `kubepods.slice` (systemd driver), which can be nested below another slice.
fn is_in_pod_cgroup(cgroup: &str) -> bool {
    let is_root =
        |part: &str| part == "kubepods" || part == "kubepods.slice" || part.ends_with("-kubepods.slice");
    cgroup.split('/').any(is_root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_recognised_by_its_control_group() {
        for (path, is_pod) in [
            ("/kubepods/burstable/pod1/4a5b", true),
            ("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-4a5b.scope", true),
            ("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice/cri-4a5b.scope", true),
            ("/system.slice/kubelet.service", false),
            ("/system.slice/kubepods-cleaner.service", false),
            ("/", false),
        ] {
            assert_eq!(is_in_pod_cgroup(path), is_pod, "{path}");
        }
    }

    #[test]
    fn the_source_address_comes_from_the_routing_table() {
        let source = |addr: &str| route_source(addr.parse().unwrap(), None, 9);
        assert_eq!(source("127.0.0.1"), RouteSource::Same);
        assert_eq!(source("127.0.0.53"), RouteSource::Other("127.0.0.1".parse().unwrap()));
        // Reserved for documentation (RFC 5737), so no host has it.
        assert_eq!(source("192.0.2.1"), RouteSource::NotLocal);
    }
}
