//! What this kernel and this process have: read once, and asked by the attach code, the daemon and `doctor`.
//!
//! Probes, never versions: distributions backport, and policies refuse what a version promises.

use std::{fs, io};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use selfconn_ebpf::{ABSENT, FIELDS, Field, is_usual, task_access};

use super::{
    attach::{Method, Refusal},
    btf::{Btf, Named},
    format,
    tracefs::{self, Tracefs},
    tracer::binds::BindMethod,
};

const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";

/// What the typed methods attach to, as BTF has it.
const TARGETS: [(Method, Named, &str); 2] = [
    (Method::TpBtf, Named::Typedef, "btf_trace_inet_sock_set_state"),
    (Method::Fentry, Named::Function, "tcp_set_state"),
];

/// `include/uapi/linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    number: u32,
    /// As manuals have it.
    pub name: &'static str,
}

/// Loads maps and programs.
pub const CAP_BPF: Capability = Capability { number: 39, name: "CAP_BPF" };
/// Attaches tracing programs, which read kernel memory.
pub const CAP_PERFMON: Capability = Capability { number: 38, name: "CAP_PERFMON" };
/// Stands for both of them, and mounts.
pub const CAP_SYS_ADMIN: Capability = Capability { number: 21, name: "CAP_SYS_ADMIN" };

/// This process's effective capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// Reads `CapEff` out of the text of `/proc/self/status`.
    #[must_use]
    pub fn parse(status: &str) -> Option<Self> {
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(mask.trim(), 16).ok().map(Self)
    }

    /// Whether the capability is effective, by itself or through CAP_SYS_ADMIN, which stands for CAP_BPF and
    /// CAP_PERFMON (`bpf_capable` and `perfmon_capable`, `include/linux/capability.h` at v5.10).
    #[must_use]
    pub const fn has(self, capability: Capability) -> bool {
        self.0 & (1 << capability.number | 1 << CAP_SYS_ADMIN.number) != 0
    }
}

/// What was found.
#[derive(Debug)]
pub struct Host {
    /// `uname -r`.
    pub release: String,
    /// `uname -m`.
    pub machine: String,
    /// The bytes of the kernel's BTF, or why they can't be had.
    pub btf: Result<Vec<u8>, String>,
    /// Offsets for the programs; all [`ABSENT`] without BTF.
    pub offsets: [u32; FIELDS],
    /// Whether a socket's addresses are where [`selfconn_ebpf::USUAL`] has them.
    pub has_usual_layout: bool,
    /// What is wrong with the BTF, if a field that every typed program needs is missing.
    pub offsets_missing: Option<String>,
    /// Which of the typed methods' targets the BTF has.
    targets: Vec<Method>,
    /// How the programs reach the current task.
    pub task_access: u32,
    /// Whether `bpf_probe_read_kernel` may be called.
    pub probe_read: bool,
    /// Whether the kernel has kprobes for perf events.
    pub kprobes: bool,
    /// `none`, `integrity` or `confidentiality`; `None`: securityfs doesn't tell.
    pub lockdown: Option<String>,
    /// Where tracefs is.
    pub tracefs: Tracefs,
    /// This process's capabilities.
    pub capabilities: Capabilities,
    /// Whether pids here are those that the kernel reports.
    pub is_initial_pid_ns: bool,
    /// What else can't be done here, for people.
    pub lacks: Vec<String>,
}

impl Host {
    /// Looks. `without_btf` is for tests: as if the kernel had no BTF.
    ///
    /// # Errors
    /// When `/proc/self` can't be read.
    pub fn look(without_btf: bool) -> anyhow::Result<Self> {
        let capabilities = fs::read_to_string("/proc/self/status")
            .ok()
            .and_then(|status| Capabilities::parse(&status))
            .ok_or_else(|| anyhow::anyhow!("cannot read /proc/self/status: mount procfs on /proc"))?;
        let btf = if without_btf {
            Err("hidden by an option".to_owned())
        } else {
            fs::read(BTF_PATH).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    format!("no {BTF_PATH}: the kernel was built without CONFIG_DEBUG_INFO_BTF")
                }
                _ => format!("{BTF_PATH}: {error}"),
            })
        };
        let mut targets = Vec::new();
        let (offsets, offsets_missing) = match btf.as_deref().map(Btf::parse) {
            Ok(Ok(btf)) => {
                targets.extend(
                    TARGETS.iter().filter(|(_, named, name)| btf.has(*named, name)).map(|target| target.0),
                );
                offsets(&btf)
            }
            Ok(Err(error)) => ([ABSENT; FIELDS], Some(error.to_string())),
            Err(_) => ([ABSENT; FIELDS], None),
        };
        // Tracing programs can't be asked about helpers; tracepoint programs have the same ones for tasks
        // (`bpf_tracing_func_proto`, kernel/trace/bpf_trace.c at v5.11).
        let has = |helper| is_helper_supported(ProgramType::TracePoint, helper).unwrap_or(false);
        let probe_read = has(BpfHelper::BPF_FUNC_probe_read_kernel);
        let task_access = if offsets[Field::GroupLeader as usize] == ABSENT {
            task_access::NONE
        } else if has(BpfHelper::BPF_FUNC_get_current_task_btf) {
            task_access::BTF
        } else if probe_read {
            task_access::PROBE
        } else {
            task_access::NONE
        };
        let uname = rustix::system::uname();
        Ok(Self {
            release: uname.release().to_string_lossy().into_owned(),
            machine: uname.machine().to_string_lossy().into_owned(),
            btf,
            has_usual_layout: is_usual(&offsets),
            offsets,
            offsets_missing,
            targets,
            task_access,
            probe_read,
            kprobes: fs::exists("/sys/bus/event_source/devices/kprobe/type").unwrap_or(false),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown")
                .ok()
                .and_then(|text| lockdown(&text)),
            tracefs: tracefs::find(),
            capabilities,
            is_initial_pid_ns: crate::process::is_in_initial_pid_ns(),
            lacks: Vec::new(),
        })
    }

    /// Whether this process may load and attach anything at all.
    ///
    /// # Errors
    /// [`Refusal::Denied`], naming the missing capability.
    pub fn permits(&self) -> Result<(), Refusal> {
        match [CAP_BPF, CAP_PERFMON].into_iter().find(|capability| !self.capabilities.has(*capability)) {
            None => Ok(()),
            Some(Capability { name, .. }) => Err(Refusal::Denied(format!(
                "needs {name} (or {}): run as root, or grant it",
                CAP_SYS_ADMIN.name
            ))),
        }
    }

    /// Whether a method has what it needs here, before anything is loaded for it.
    ///
    /// # Errors
    /// The reason why it hasn't. For the perf method it opens the tracepoint's `format` file, so tracefs must be
    /// visible to this thread.
    pub fn offers(&self, method: Method) -> Result<(), Refusal> {
        self.permits()?;
        let unsupported = |why: &str| Err(Refusal::Unsupported(why.to_owned()));
        match method {
            Method::TpBtf | Method::Fentry => self.has_target(method),
            Method::Perf => {
                // First, for under lockdown=confidentiality tracefs has no events either, and the policy is the reason.
                self.reads_memory()?;
                let text = tracefs::read_format("sock/inet_sock_set_state").map_err(Refusal::Unsupported)?;
                format::check(&text, format::SET_STATE).map_err(Refusal::Unsupported)
            }
            Method::Kprobe if !self.kprobes => unsupported("the kernel was built without CONFIG_KPROBES"),
            Method::Kprobe => {
                self.has_offsets()?;
                self.reads_memory()
            }
        }
    }

    /// The same of a method that sees binds fail.
    ///
    /// # Errors
    /// As [`Self::offers`].
    pub fn offers_binds(&self, method: BindMethod) -> Result<(), Refusal> {
        self.permits()?;
        self.has_offsets()?;
        match method {
            BindMethod::Fexit => Ok(()),
            BindMethod::Perf => {
                self.reads_memory()?;
                for (event, fields) in [
                    ("syscalls/sys_enter_bind", format::BIND_ENTER),
                    ("syscalls/sys_exit_bind", format::BIND_EXIT),
                ] {
                    let text = tracefs::read_format(event).map_err(Refusal::Unsupported)?;
                    format::check(&text, fields).map_err(Refusal::Unsupported)?;
                }
                Ok(())
            }
        }
    }

    /// What can't be seen or known from where this process is.
    #[must_use]
    pub fn limits(&self) -> Vec<String> {
        let mut limits = self.lacks.clone();
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

    fn has_offsets(&self) -> Result<(), Refusal> {
        if let Err(why) = &self.btf {
            return Err(Refusal::Unsupported(why.clone()));
        }
        self.offsets_missing.clone().map_or(Ok(()), |why| Err(Refusal::Unsupported(why)))
    }

    fn has_target(&self, method: Method) -> Result<(), Refusal> {
        self.has_offsets()?;
        if self.targets.contains(&method) {
            return Ok(());
        }
        let name = TARGETS.iter().find(|target| target.0 == method).map_or("it", |target| target.2);
        Err(Refusal::Unsupported(format!("the kernel's BTF has no {name}")))
    }

    fn reads_memory(&self) -> Result<(), Refusal> {
        if self.probe_read {
            return Ok(());
        }
        let why = "bpf_probe_read_kernel may not be called";
        Err(match self.lockdown.as_deref() {
            Some("confidentiality") => Refusal::Refused(format!("{why} under lockdown=confidentiality")),
            _ => Refusal::Unsupported(why.to_owned()),
        })
    }
}

/// The offset of every field, and what a typed program needs and doesn't find.
fn offsets(btf: &Btf<'_>) -> ([u32; FIELDS], Option<String>) {
    let mut offsets = [ABSENT; FIELDS];
    let mut missing = None;
    for (field, of, member, is_needed) in Field::ALL {
        match btf.offset(of, member) {
            Ok(Some(offset)) => offsets[field as usize] = offset,
            Ok(None) if is_needed => missing = Some(format!("the kernel's BTF has no {of}.{member}")),
            Ok(None) => {}
            Err(error) if is_needed => missing = Some(error.to_string()),
            Err(_) => {}
        }
    }
    (offsets, missing)
}

/// The word in brackets of `none [integrity] confidentiality`.
fn lockdown(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(level, _)| level.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_those_that_are_effective() {
        let of =
            |mask: &str| Capabilities::parse(&format!("CapPrm:\t1\nCapEff:\t{mask}\nCapBnd:\t2\n")).unwrap();
        for (mask, bpf, perfmon, admin) in [
            ("000001ffffffffff", true, true, true),
            ("0000000000000000", false, false, false),
            ("0000008000000000", true, false, false),
            ("0000004000000000", false, true, false),
            ("000000c000000000", true, true, false),
            ("0000000000200000", true, true, true),
        ] {
            let got = of(mask);
            assert_eq!(
                (got.has(CAP_BPF), got.has(CAP_PERFMON), got.has(CAP_SYS_ADMIN)),
                (bpf, perfmon, admin),
                "{mask}"
            );
        }
        assert_eq!(Capabilities::parse("CapEff: many"), None);
        assert_eq!(Capabilities::parse(""), None);
    }

    #[test]
    fn lockdown_is_the_word_in_brackets() {
        assert_eq!(lockdown("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(lockdown("[none] integrity confidentiality\n").as_deref(), Some("none"));
        assert_eq!(lockdown("none\n"), None);
    }
}
