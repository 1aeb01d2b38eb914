//! The public fields of a self-connection, and the one constructor that makes them. Every event about a
//! self-connection has them, and so has a line of `scan --json`.

use std::sync::Arc;

use schemars::JsonSchema;
use selfconn_ebpf::{Owner, Task, cause};
use serde::Serialize;

use super::envelope;
use crate::{
    budget::{Payer, may_be_mapped},
    detect::connection::{Connection, Source, comm},
    system::{
        command_line::CommandLine,
        process::{Attribution, Holder, ProcessInfo},
    },
};

/// The fields of the self-connection that an event is about.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ConnectionFields {
    /// Identifier of the connection: the same in all its events, unique on this boot. Null if the connection
    /// ended before this run, which only `blocked` can be about.
    #[schemars(with = "String")]
    pub id: Option<String>,
    /// Socket cookie, as `ss -e` shows it.
    pub cookie: Option<u64>,
    /// `live`, or `scan` if the connection was found in the socket table.
    pub source: &'static str,
    /// Address family of the socket: `ipv4` or `ipv6`.
    pub family: &'static str,
    /// Source and destination address.
    pub addr: String,
    /// Number of the device that the socket is bound to.
    pub ifindex: Option<u32>,
    /// Name of that device.
    pub device: Option<Arc<str>>,
    /// Source and destination port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// `ephemeral` if connect() chose the source port, `bound` if the socket had a port before connect().
    pub cause: Option<&'static str>,
    /// Connects to the same address and port that were refused before.
    pub refused_before: Option<u64>,
    /// The process, in the initial pid namespace. `owner` says whether it connected or holds the socket.
    pub pid: Option<u32>,
    /// Thread id of the connecting thread.
    pub tid: Option<u32>,
    /// Name of the process.
    pub comm: Option<String>,
    /// Name of the thread.
    pub thread_comm: Option<String>,
    /// Path of the executable.
    pub exe: Option<Arc<str>>,
    /// Arguments of the process.
    #[schemars(with = "Option<Vec<String>>")]
    pub cmdline: Option<Arc<CommandLine>>,
    /// True if `cmdline` has only a part of the arguments, or none because events shall have none.
    pub cmdline_truncated: bool,
    /// Real user id of the process, or the user of the socket.
    pub uid: Option<u32>,
    /// Path of the control group.
    pub cgroup: Option<Arc<str>>,
    /// systemd unit of the process.
    pub unit: Option<Arc<str>>,
    /// Id of the container.
    pub container: Option<Arc<str>>,
    /// Uid of the Kubernetes pod.
    pub pod: Option<Arc<str>>,
    /// How the process is known: `witnessed` at connect(), or `holder` because it has the socket open.
    pub owner: Option<&'static str>,
    /// True if the kernel itself uses the socket (NFS, SMB): it has no file, so no process can have it open.
    pub kernel_socket: Option<bool>,
    /// The processes that have the socket open now. Null if they were not looked up.
    pub holders: Option<Vec<Holder>>,
    /// Initial sequence number.
    pub isn: Option<u32>,
    /// Initial sequence number of the peer. Equality with `isn` proves the self-connection.
    pub peer_isn: Option<u32>,
    /// True if the process connected, or is of the user that owns the socket. A process that has the socket open may
    /// have got it from any other one.
    #[serde(skip)]
    pub is_process_certain: bool,
    /// True if the host has the same file at the path `exe`.
    #[serde(skip)]
    pub is_exe_ours: bool,
    /// The user that pays for the connection: of an opener in a user namespace, the user that made it.
    #[serde(skip)]
    pub owner_uid: Option<u32>,
    /// The control group that pays for the connection.
    #[serde(skip)]
    pub owner_cgroup: Option<Arc<str>>,
    /// The kernel's id of the control group that pays, at the third level. 0: unknown.
    #[serde(skip)]
    pub owner_cgroup_id: u64,
}

/// The id of the connection with this number.
#[must_use]
pub fn connection_id(run: u64, number: u64) -> String {
    envelope::id(run, "", number)
}

impl ConnectionFields {
    /// Combines a connection with the information that `/proc` has about its process. `run` identifies this
    /// run, so that ids stay unique on this boot.
    #[must_use]
    pub fn new(connection: &Connection, run: u64, attribution: &Attribution) -> Self {
        let opener = connection.opener;
        let process = attribution.named_process(opener.is_some());
        // If connect() was not observed, report the first process that has the socket open instead.
        let holder = attribution.first_holder().filter(|_| opener.is_none());
        let task = opener.map(|opener| opener.task);
        let is_of_socket_user =
            process.uid.is_some_and(|uid| connection.uid == Some(uid) && !may_be_mapped(uid));
        Self {
            id: (connection.number != 0).then(|| connection_id(run, connection.number)),
            cookie: connection.cookie,
            source: match connection.source {
                Source::Live => "live",
                Source::Scan => "scan",
            },
            family: if connection.endpoint.is_ipv6() { "ipv6" } else { "ipv4" },
            addr: connection.endpoint.ip().to_string(),
            ifindex: connection.endpoint.device(),
            device: attribution.device.clone().or_else(|| connection.device.clone()),
            port: connection.endpoint.port,
            netns: connection.endpoint.known_netns(),
            cause: opener.and_then(|opener| match opener.cause {
                cause::EPHEMERAL => Some("ephemeral"),
                cause::BOUND => Some("bound"),
                _ => None,
            }),
            refused_before: attribution.refused_before,
            pid: task.map(|task| task.pid).or(holder.map(|holder| holder.pid)),
            tid: task.map(|task| task.tid),
            comm: task
                .and_then(|task| process_name(&task))
                // The name that the process had when its other facts were read.
                .or_else(|| process.comm.clone())
                .or_else(|| holder.and_then(|holder| holder.comm.clone())),
            thread_comm: task.map(|task| comm(&task.comm)),
            exe: process.exe.clone(),
            cmdline: process.cmdline.clone(),
            cmdline_truncated: process.cmdline.as_ref().is_some_and(|cmdline| cmdline.is_cut),
            uid: opener.map(|opener| opener.uid).or(connection.uid),
            cgroup: process.cgroup.clone(),
            unit: process.unit.clone(),
            container: process.container.clone(),
            pod: process.pod.clone(),
            owner: opener.map(|_| "witnessed").or(holder.map(|_| "holder")),
            kernel_socket: connection.is_kernel_socket,
            holders: attribution.holders.clone(),
            isn: connection.isns.map(|(isn, _)| isn),
            peer_isn: connection.isns.map(|(_, peer_isn)| peer_isn),
            is_process_certain: opener.is_some() || is_of_socket_user,
            is_exe_ours: process.is_exe_ours,
            owner_uid: opener.map(|opener| opener.owner.uid).or(connection.uid),
            owner_cgroup: process.owner_cgroup.clone(),
            owner_cgroup_id: opener.map_or(0, |opener| opener.owner.cgroup),
        }
    }

    /// Who is named as the one that pays for the connection.
    #[must_use]
    pub fn payer(&self) -> Payer {
        Payer { uid: self.owner_uid, cgroup: self.owner_cgroup.clone() }
    }

    /// Whose share of the log, and of the remedy, the connection takes.
    #[must_use]
    pub fn share_owner(&self) -> Owner {
        self.payer().owner(self.owner_cgroup_id)
    }

    /// The fields of a self-connection of `java[7]` in a container.
    #[cfg(test)]
    pub(crate) fn sample() -> Self {
        Self {
            id: Some("1-1".to_owned()),
            cookie: None,
            source: "live",
            family: "ipv4",
            addr: "127.0.0.1".to_owned(),
            ifindex: None,
            device: None,
            port: 40_000,
            netns: Some(4_026_531_833),
            cause: Some("ephemeral"),
            refused_before: Some(57),
            pid: Some(7),
            tid: Some(8),
            comm: Some("java".to_owned()),
            thread_comm: Some("pool-1".to_owned()),
            exe: Some("/usr/bin/java".into()),
            cmdline: Some(Arc::new(["java", "-jar", "a.jar"].into_iter().collect())),
            cmdline_truncated: false,
            uid: Some(1_000),
            cgroup: Some("/docker/4a".into()),
            unit: None,
            container: Some("4a".into()),
            pod: None,
            owner: Some("witnessed"),
            kernel_socket: Some(false),
            holders: None,
            isn: None,
            peer_isn: None,
            is_process_certain: true,
            is_exe_ours: true,
            owner_uid: Some(1_000),
            owner_cgroup: None,
            owner_cgroup_id: 0,
        }
    }
}

/// Who pays for an event that is about a process and no connection of its own.
#[derive(Clone, Debug)]
pub struct Charged {
    /// Whose share of the log the event takes.
    pub owner: Owner,
    /// Who is named if it is suppressed.
    pub payer: Payer,
}

impl Charged {
    /// `owner` is what the kernel says of the process, whose facts are the other argument.
    pub(super) fn new(owner: Owner, process: &ProcessInfo) -> Self {
        let payer = Payer { uid: Some(owner.uid), cgroup: process.owner_cgroup.clone() };
        Self { owner: payer.owner(owner.cgroup), payer }
    }
}

impl Default for Charged {
    fn default() -> Self {
        Self { owner: Owner::UNKNOWN, payer: Payer::default() }
    }
}

/// The name of the process, if the eBPF program could read it.
pub(super) fn process_name(task: &Task) -> Option<String> {
    (task.leader[0] != 0 || task.pid == task.tid).then(|| comm(&task.leader))
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use selfconn_ebpf::Opener;

    use super::*;
    use crate::{detect::samples, system::process::Subject};

    #[test]
    fn facts_are_of_the_process_that_is_named() {
        let holder = |pid, start_ticks, comm: &str| Holder {
            pid,
            comm: Some(comm.to_owned()),
            start_ticks: Some(start_ticks),
        };
        let first = holder(7, 1, "java");
        let of_first = Subject::Holder(Rc::new(first.clone()));
        let (other, reused, after_exec) = (holder(8, 1, "java"), holder(7, 2, "java"), holder(7, 1, "sleep"));
        let opener = Some(Opener::UNKNOWN);
        for (subject, opener, holders, is_known) in [
            (Subject::Opener, opener, vec![first.clone()], true),
            (of_first.clone(), None, vec![first.clone(), other.clone()], true),
            // It ended, and another one is the first now.
            (of_first.clone(), None, vec![other.clone(), first.clone()], false),
            (of_first.clone(), None, vec![reused], false),
            (of_first.clone(), None, vec![after_exec], false),
            (of_first.clone(), None, vec![], false),
            // The opener became known after the look-up.
            (of_first, opener, vec![first.clone()], false),
            (Subject::Opener, None, vec![first], false),
            (Subject::Nobody, None, vec![other], false),
        ] {
            let connection =
                Connection { opener, ..samples::connection(1, samples::endpoint("127.0.0.1", 80)) };
            let process = ProcessInfo { exe: Some("/usr/bin/java".into()), ..ProcessInfo::default() };
            let attribution = Attribution {
                subject: subject.clone(),
                process: Rc::new(process),
                holders: Some(holders.clone()),
                ..Attribution::default()
            };
            let fields = ConnectionFields::new(&connection, 1, &attribution);
            assert_eq!(fields.exe.is_some(), is_known, "{subject:?} {opener:?} {holders:?}");
        }
    }

    #[test]
    fn a_holder_is_certain_if_its_user_is_the_only_one_who_can_have_made_the_socket() {
        for (opener, of_socket, of_process, is_certain) in [
            (Some(Opener::UNKNOWN), Some(1_000), None, true),
            (None, Some(1_000), Some(1_000), true),
            (None, Some(0), Some(0), true),
            // Passed on, for example to a service of the host.
            (None, Some(1_000), Some(101), false),
            (None, Some(1_000), Some(0), false),
            (None, Some(0), Some(1_000), false),
            (None, Some(1_000), None, false),
            (None, None, Some(0), false),
            (None, None, None, false),
            // Another container may have the same uid.
            (None, Some(65_535), Some(65_535), true),
            (None, Some(65_536), Some(65_536), false),
        ] {
            let endpoint = samples::endpoint("127.0.0.1", 80);
            let connection = Connection { opener, uid: of_socket, ..samples::connection(1, endpoint) };
            let process = Rc::new(ProcessInfo { uid: of_process, ..ProcessInfo::default() });
            let holder = Holder { pid: 7, comm: None, start_ticks: Some(1) };
            let subject =
                if opener.is_some() { Subject::Opener } else { Subject::Holder(Rc::new(holder.clone())) };
            let holders = Some(vec![holder]);
            let attribution = Attribution { subject, process, holders, ..Attribution::default() };
            let fields = ConnectionFields::new(&connection, 1, &attribution);
            assert_eq!(fields.is_process_certain, is_certain, "{opener:?} {of_socket:?} {of_process:?}");
        }
    }
}
