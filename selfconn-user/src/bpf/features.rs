//! The features of this kernel and the capabilities of this process. They are probed once and used by the
//! attach code, the daemon and `doctor`.
//!
//! Features are probed and never derived from version numbers, because distributions backport features and
//! policies can forbid a feature that a version has.

use std::{fs, io, sync::OnceLock};

use anyhow::Context as _;
use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use rustix::thread::CapabilitySet;
use selfconn_ebpf::{ABSENT, FIELDS, Field, cgroup_access, task_access, uses_static_offsets};

use super::{
    attach::Method,
    btf::{Btf, BtfKind},
    tracefs::{self, Tracefs},
};
use crate::system::{capabilities, process, sysfs};

mod checks;
mod offsets;

const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";

/// The BTF types that the methods `tp_btf` and `fentry` attach to.
const METHOD_TARGETS: [(Method, BtfKind, &str); 2] = [
    (Method::TpBtf, BtfKind::Typedef, "btf_trace_inet_sock_set_state"),
    (Method::Fentry, BtfKind::Function, "tcp_set_state"),
];

/// The function behind `bpf_get_socket_cookie` in programs with typed pointers (v5.12, net/core/filter.c). Whether
/// such a program may call it can't be probed without one.
const SOCKET_COOKIE_HELPER: &str = "bpf_get_socket_ptr_cookie";

/// The state by which sock_diag is asked for sockets that are bound and idle (include/net/tcp_states.h at v6.8).
const IDLE_SOCKET_STATE: &str = "TCP_BOUND_INACTIVE";

/// The attach target of the iterator over descriptors, and the helper that it calls, which is a function of the
/// kernel. The helpers of tracing programs cannot be probed.
const DESCRIPTOR_TARGETS: [&str; 2] = ["bpf_iter_task_file", "bpf_sock_from_file"];

/// The attach target of the iterator over network namespaces.
const NAMESPACE_TARGET: &str = "bpf_iter_task";

/// Defined where the programs of tracepoints and kprobes are run (kernel/trace/bpf_trace.c at v5.10). The kernel has it,
/// and any tracing program, only with `CONFIG_BPF_EVENTS`. The functions there are not in the BTF of 5.10.
const TRACING_STRUCT: &str = "bpf_trace_sample_data";

/// Which lockdown there is. A container often has no securityfs.
const LOCKDOWN_PATH: &str = "/sys/kernel/security/lockdown";

/// The event source of kprobes (`kernel/events/core.c` at v5.10).
const KPROBE_TYPE: &str = "/sys/bus/event_source/devices/kprobe/type";

fn kprobes() -> Result<(), String> {
    if fs::exists(KPROBE_TYPE).unwrap_or(false) {
        return Ok(());
    }
    Err(sysfs::why_missing(KPROBE_TYPE, "the kernel was built without CONFIG_KPROBE_EVENTS"))
}

/// The result of all probes.
#[derive(Debug)]
pub struct KernelFeatures {
    /// `uname -r`.
    pub release: String,
    /// `uname -m`.
    pub machine: String,
    /// The bytes of the kernel's BTF, or the reason why they cannot be read.
    pub btf: Result<Vec<u8>, String>,
    /// The offsets for the programs; all are [`ABSENT`] without BTF.
    pub offsets: [u32; FIELDS],
    /// True if a socket's addresses are at the static offsets, so that the programs with constant offsets can
    /// be used.
    pub uses_static_offsets: bool,
    /// The problem with the BTF, if a field that every BTF-based program needs is missing.
    pub offsets_missing: Option<String>,
    /// The methods whose attach target exists in the BTF.
    btf_targets: Vec<Method>,
    /// The functions of [`DESCRIPTOR_TARGETS`] that the BTF lacks.
    descriptor_targets_missing: Vec<&'static str>,
    /// True if the BTF has [`NAMESPACE_TARGET`].
    has_namespace_target: bool,
    /// True if the BTF lacks [`TRACING_STRUCT`]. It explains a refusal, and is none.
    lacks_tracing: bool,
    /// How the programs access the current task: one of [`task_access`].
    pub task_access: u32,
    /// How the programs find the control group of the current task: one of [`cgroup_access`].
    pub cgroup_access: u32,
    /// True if programs with typed pointers may make the cookie of a socket.
    pub socket_cookie: bool,
    /// True if sock_diag lists sockets that are bound and idle.
    pub shows_idle_sockets: bool,
    /// True if programs may call `bpf_probe_read_kernel`.
    pub probe_read: bool,
    /// An error if the kernel has no kprobes for perf events, with the reason.
    pub kprobes: Result<(), String>,
    /// `none`, `integrity` or `confidentiality`; `None`: securityfs does not provide it.
    pub lockdown: Option<String>,
    pub tracefs: Tracefs,
    /// The effective capabilities, with those that CAP_SYS_ADMIN includes.
    pub capabilities: CapabilitySet,
    /// True if this process is in the initial pid namespace, so that its pids are the pids that the programs
    /// report.
    pub is_initial_pid_ns: bool,
    /// Further limitations of this run, as text for people.
    pub limitations: Vec<String>,
}

impl KernelFeatures {
    /// Probes the kernel and this process once for each command.
    ///
    /// # Errors
    /// As [`Self::probe`], as text for people.
    pub(super) fn for_command() -> Result<&'static Self, String> {
        static FEATURES: OnceLock<Result<KernelFeatures, String>> = OnceLock::new();
        let features = FEATURES.get_or_init(|| Self::probe(false).map_err(|error| format!("{error:#}")));
        features.as_ref().map_err(Clone::clone)
    }

    /// Probes the kernel and this process. With `without_btf` it behaves as if the kernel had no BTF, for
    /// tests.
    ///
    /// # Errors
    /// If a seccomp filter forbids to read the capabilities.
    pub fn probe(without_btf: bool) -> anyhow::Result<Self> {
        fs::metadata("/proc/self/status").context("cannot read /proc/self/status: mount procfs on /proc")?;
        let btf = if without_btf {
            Err("hidden by an option".to_owned())
        } else {
            match sysfs::masked(BTF_PATH) {
                Some(why) => Err(format!("{BTF_PATH}: {why}")),
                None => fs::read(BTF_PATH).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => {
                        format!("no {BTF_PATH}: the kernel was built without CONFIG_DEBUG_INFO_BTF")
                    }
                    _ => format!("{BTF_PATH}: {error}"),
                }),
            }
        };
        let (mut targets, mut socket_cookie, mut has_namespace_target) = (Vec::new(), false, false);
        let (mut shows_idle_sockets, mut lacks_tracing) = (false, false);
        let mut descriptor_targets_missing = DESCRIPTOR_TARGETS.to_vec();
        let (offsets, offsets_missing) = match btf.as_deref().map(Btf::parse) {
            Ok(Ok(btf)) => {
                targets.extend(
                    METHOD_TARGETS
                        .iter()
                        .filter(|(_, kind, name)| btf.has(*kind, name))
                        .map(|target| target.0),
                );
                descriptor_targets_missing.retain(|name| !btf.has(BtfKind::Function, name));
                has_namespace_target = btf.has(BtfKind::Function, NAMESPACE_TARGET);
                lacks_tracing = !btf.has(BtfKind::Struct, TRACING_STRUCT);
                socket_cookie = btf.has(BtfKind::Function, SOCKET_COOKIE_HELPER);
                shows_idle_sockets = btf.has_enumerator(IDLE_SOCKET_STATE);
                offsets::read_offsets(&btf)
            }
            Ok(Err(error)) => ([ABSENT; FIELDS], Some(error.to_string())),
            Err(_) => ([ABSENT; FIELDS], None),
        };
        // The helpers of tracing programs cannot be probed. Tracepoint programs have the same helpers for
        // tasks (`bpf_tracing_func_proto`, kernel/trace/bpf_trace.c at v5.11).
        let has_helper = |helper| is_helper_supported(ProgramType::TracePoint, helper).unwrap_or(false);
        let probe_read = has_helper(BpfHelper::BPF_FUNC_probe_read_kernel);
        let task_access = if offsets[Field::GroupLeader as usize] == ABSENT {
            task_access::NONE
        } else if has_helper(BpfHelper::BPF_FUNC_get_current_task_btf) {
            task_access::BTF
        } else if probe_read {
            task_access::PROBE
        } else {
            task_access::NONE
        };
        let cgroup_access = if has_helper(BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id) {
            cgroup_access::ANCESTOR
        } else if has_helper(BpfHelper::BPF_FUNC_get_current_cgroup_id) {
            cgroup_access::CURRENT
        } else {
            cgroup_access::NONE
        };
        let uname = rustix::system::uname();
        Ok(Self {
            release: uname.release().to_string_lossy().into_owned(),
            machine: uname.machine().to_string_lossy().into_owned(),
            btf,
            uses_static_offsets: uses_static_offsets(&offsets),
            offsets,
            offsets_missing,
            btf_targets: targets,
            descriptor_targets_missing,
            has_namespace_target,
            lacks_tracing,
            task_access,
            cgroup_access,
            socket_cookie,
            shows_idle_sockets,
            probe_read,
            kprobes: kprobes(),
            lockdown: fs::read_to_string(LOCKDOWN_PATH).ok().and_then(|text| parse_lockdown(&text)),
            tracefs: tracefs::find(),
            capabilities: capabilities::effective().context("cannot read the capabilities")?,
            is_initial_pid_ns: process::is_in_initial_pid_ns(),
            limitations: Vec::new(),
        })
    }

    /// True if the kernel may have BTF, and a mount hides it.
    #[must_use]
    pub fn is_btf_masked(&self) -> bool {
        sysfs::masked(BTF_PATH).is_some()
    }

    /// True if the kernel may have this method, and a mount hides whether it does.
    #[must_use]
    pub fn is_masked(&self, method: Method) -> bool {
        method == Method::Kprobe && sysfs::masked(KPROBE_TYPE).is_some()
    }

    /// What this process cannot observe or find out, as text for people.
    #[must_use]
    pub fn limits(&self) -> Vec<String> {
        let mut limits = self.limitations.clone();
        if !self.is_initial_pid_ns {
            limits.push(
                "not in the initial pid namespace: pids are the host's, and nothing is looked up in /proc"
                    .into(),
            );
        }
        if self.offsets_missing.is_some() || self.btf.is_err() {
            limits.push(
                "no usable BTF: netns, ifindex, cookie, cause, bytes, ISNs, how a connection ends, which ports are at risk, \
                 and what is in /proc of a process that had just started are unknown"
                    .into(),
            );
        }
        limits
    }
}

/// Parses the word in brackets, as in `none [integrity] confidentiality`.
fn parse_lockdown(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(level, _)| level.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lockdown_is_the_word_in_brackets() {
        assert_eq!(parse_lockdown("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(parse_lockdown("[none] integrity confidentiality\n").as_deref(), Some("none"));
        assert_eq!(parse_lockdown("none\n"), None);
    }
}
