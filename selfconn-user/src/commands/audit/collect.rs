//! Reads the state that the audit assesses: for each network namespace its port settings, its listeners, the
//! ports that the user names, and the source address that the kernel chooses for a connect to each of them.
//!
//! The audit reads its input only here and in `boot` and `services`. Nothing here knows how it is rated.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, Result};

use super::services::RequestedServices;
use crate::{
    bpf,
    guard::GuardMode,
    ports::{LocalPorts, sysctl},
    sockets::{self, HolderSearch, InspectOptions, Namespace, NamespaceSelection, SocketEntry, SocketRef},
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
    /// What a guard does there. `None`: unknown.
    pub(super) guard: Option<GuardMode>,
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
    pub(super) pod: Option<Arc<str>>,
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
    services: &[RequestedServices],
) -> Result<AuditInput> {
    let list = bpf::namespaces::open_for_command();
    let options = InspectOptions { selection, procfs_only, namespaces: list.as_ref().ok() };
    let inspected = sockets::inspect(options, |namespace, listeners| {
        let local_ports = sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")))?;
        let audited_ports = audited_ports(&listeners, services);
        // Without the privilege, whether there is a guard is unknown, and nothing else is missing.
        let guard = GuardMode::in_this_netns()
            .inspect_err(|error| log::info!("whether there is a guard is unknown: {error}"))
            .ok();
        let namespace = namespace.clone();
        Ok(NamespaceInfo { namespace, local_ports, persistence: None, audited_ports, guard })
    });
    let inspected = inspected.with_context(|| match selection {
        NamespaceSelection::At(path) => format!("cannot inspect the network namespace {}", path.display()),
        NamespaceSelection::Inode(inode) => format!("cannot inspect the network namespace {inode}"),
        _ => "cannot inspect any network namespace".to_owned(),
    })?;
    let (mut namespaces, mut unseen) = (inspected.found, inspected.unseen);
    if *selection == NamespaceSelection::All {
        unseen.extend(list.err().map(|why| sockets::no_list(&why)));
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
    let processes = NetnsProcesses::read(Path::new("/proc"));
    let mut are_pods_unknown = false;
    for (index, info) in namespaces.iter_mut().enumerate() {
        info.persistence = match init_namespace {
            // Also if a pod listens here: a pod in the host's network cannot set sysctls of the host.
            Some(init) if init == index => Some(Persistence::SysctlD),
            _ if !is_namespace_of_one_pod(info, &processes) => None,
            _ if processes.unseen.is_some() => {
                are_pods_unknown = true;
                None
            }
            _ => Some(Persistence::Pod),
        };
    }
    unseen.extend(processes.unseen.filter(|_| are_pods_unknown));
    Ok(AuditInput { namespaces, init_namespace, unseen })
}

/// The ports to audit in the network namespace of the calling thread.
fn audited_ports(listeners: &[SocketEntry], services: &[RequestedServices]) -> Vec<AuditedPort> {
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
                is_requested: services
                    .iter()
                    .any(|service| service.addr == Some(addr) && service.ports.contains(&port)),
            });
        }
    }
    let requested =
        services.iter().flat_map(|service| service.ports.clone().map(|port| (service.addr, port)));
    for (addr, port) in requested {
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
    let holders = sockets::find_holders(&inodes, HolderSearch::Quick, usize::MAX);
    let mut processes: HashMap<u32, ListenerProcess> = HashMap::new();
    for audited in namespaces.iter_mut().flat_map(|info| &mut info.audited_ports) {
        // The lowest pid: the main process of a server is usually older than its workers.
        let Some(first) = holders
            .of(&SocketRef::of_inode(audited.inode))
            .and_then(|holders| holders.iter().min_by_key(|holder| holder.pid))
        else {
            continue;
        };
        let process = processes.entry(first.pid).or_insert_with(|| {
            let info = facts_of(first.pid).unwrap_or_default();
            ListenerProcess {
                pid: Some(first.pid),
                comm: first.comm.clone(),
                unit: info.unit,
                container: info.container,
                pod: info.pod,
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

/// True if every process that is seen to be in this namespace is in one and the same pod. In the network of a
/// node, which a pod can share but not set, there are also other processes.
fn is_namespace_of_one_pod(info: &NamespaceInfo, processes: &NetnsProcesses) -> bool {
    let of_listeners = info.audited_ports.iter().filter_map(|audited| audited.listener.as_ref());
    let of_listeners =
        of_listeners.filter(|process| process.pid.is_some()).map(|process| process.pod.clone());
    let processes = processes.by_inode.get(&info.namespace.id.inode.into()).into_iter().flatten();
    // A process that has ended meanwhile says nothing.
    let of_processes = processes.filter_map(|pid| facts_of(*pid)).map(|facts| facts.pod);
    is_one_pod(of_listeners.chain(of_processes))
}

fn is_one_pod(mut pods: impl Iterator<Item = Option<Arc<str>>>) -> bool {
    let Some(Some(first)) = pods.next() else { return false };
    pods.all(|pod| pod.is_some_and(|pod| pod == first))
}

/// The processes in each network namespace, without this process.
#[derive(Debug, Default)]
struct NetnsProcesses {
    by_inode: HashMap<u64, Vec<u32>>,
    /// Why there may be others: then no namespace is known to be of one pod.
    unseen: Option<String>,
}

impl NetnsProcesses {
    fn read(proc: &Path) -> Self {
        let mut processes = Self::default();
        let (mut denied, mut list_error) = (0, None);
        let entries = fs::read_dir(proc).map_err(|error| list_error = Some(error)).into_iter().flatten();
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    list_error = Some(error);
                    continue;
                }
            };
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(pid) = pid.filter(|pid| *pid != std::process::id()) else { continue };
            match fs::metadata(entry.path().join("ns/net")) {
                Ok(netns) => processes.by_inode.entry(netns.ino()).or_default().push(pid),
                Err(error) if process::is_gone(&error) => {}
                Err(_) => denied += 1,
            }
        }
        let why = match (list_error, denied) {
            (Some(error), _) => Some(format!("{}: {error}", proc.display())),
            (None, 0) => (!process::is_in_initial_pid_ns())
                .then(|| "processes are hidden outside the initial pid namespace".to_owned()),
            (None, denied) => Some(format!("number of processes that may not be inspected: {denied}")),
        };
        processes.unseen = why.map(|why| format!("whether a network namespace is of one pod: {why}"));
        processes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_a_pods_if_all_its_processes_are_in_that_pod() {
        let pods = |pods: &[Option<&str>]| is_one_pod(pods.iter().map(|pod| pod.map(Arc::from)));
        assert!(pods(&[Some("a")]) && pods(&[Some("a"), Some("a")]));
        for others in [&[][..], &[None], &[Some("a"), None], &[None, Some("a")], &[Some("a"), Some("b")]] {
            assert!(!pods(others), "{others:?}");
        }
    }

    #[test]
    fn processes_that_cannot_be_inspected_are_said() {
        let unseen = |proc: &Path| NetnsProcesses::read(proc).unseen;
        let proc = tempfile::tempdir().unwrap();
        let none = unseen(proc.path());
        assert!(none.is_none() || !process::is_in_initial_pid_ns(), "{none:?}");
        // A process that has ended.
        fs::create_dir(proc.path().join("7")).unwrap();
        assert_eq!(unseen(proc.path()), none);
        fs::create_dir(proc.path().join("8")).unwrap();
        fs::write(proc.path().join("8/ns"), "cannot be followed").unwrap();
        let why = unseen(proc.path()).unwrap();
        assert!(why.ends_with(": number of processes that may not be inspected: 1"), "{why}");
        let why = unseen(&proc.path().join("no")).unwrap();
        assert!(why.contains("No such file"), "{why}");
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
