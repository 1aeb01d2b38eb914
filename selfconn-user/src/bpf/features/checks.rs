//! Checks of what a method needs, before anything is loaded for it, and the reasons why it is not available.

use std::env::consts::ARCH;

use rustix::thread::CapabilitySet;
use selfconn_ebpf::{ABSENT, Field, names};

use super::{KernelFeatures, LOCKDOWN_PATH, METHOD_TARGETS, NAMESPACE_TARGET};
use crate::{
    bpf::{
        attach::Method,
        bind_method::BindMethod,
        refusal::Refusal,
        tracefs::{self, format},
    },
    system::capabilities,
};

/// The fields that the iterator over descriptors cannot do without.
const DESCRIPTOR_FIELDS: [Field; 9] = [
    Field::SocketSk,
    Field::TaskTgid,
    Field::TaskPid,
    Field::GroupLeader,
    Field::StartBoottime,
    Field::FileInode,
    Field::InodeNumber,
    Field::InodeSuperBlock,
    Field::FilesystemMagic,
];

/// What a kernel without it answers.
const WITHOUT_TRACING: &str = "the kernel was built without CONFIG_BPF_EVENTS";

/// The fields that the iterator over network namespaces cannot do without.
const NAMESPACE_FIELDS: [Field; 5] =
    [Field::TaskNsproxy, Field::NsproxyNet, Field::NetList, Field::NetOps, Field::NetnsInum];

impl KernelFeatures {
    /// Checks that this process has the capabilities to load and attach programs.
    ///
    /// # Errors
    /// [`Refusal::Denied`], which names the missing capability.
    pub fn check_capabilities(&self) -> Result<(), Refusal> {
        match capabilities::names(self.missing_capabilities()).first() {
            None => Ok(()),
            Some(name) => {
                Err(Refusal::Denied(format!("needs {name} (or CAP_SYS_ADMIN): run as root, or grant it")))
            }
        }
    }

    /// The capabilities to load and attach programs that this process does not have.
    #[must_use]
    pub fn missing_capabilities(&self) -> CapabilitySet {
        capabilities::ATTACH.difference(self.capabilities)
    }

    /// Checks that everything that a method needs is available, before anything is loaded for it. The check
    /// of the perf method opens the tracepoint's `format` file, so tracefs must be visible to this thread.
    ///
    /// # Errors
    /// The reason why the method is not available.
    pub fn check_method(&self, method: Method) -> Result<(), Refusal> {
        self.check_capabilities()?;
        match method {
            Method::TpBtf | Method::Fentry => self.check_target(method),
            Method::Perf => {
                // This check comes first: under lockdown=confidentiality tracefs has no events either, and
                // the error must name the policy.
                self.check_probe_read()?;
                let text = tracefs::read_format("sock/inet_sock_set_state").map_err(Refusal::Unsupported)?;
                format::check(&text, format::SET_STATE).map_err(Refusal::Unsupported)
            }
            Method::Kprobe => {
                check_kprobe_program(ARCH)?;
                self.kprobes.clone().map_err(Refusal::Unsupported)?;
                self.check_offsets()?;
                self.check_probe_read()
            }
        }
    }

    /// Checks the same for a method that detects failed binds.
    ///
    /// # Errors
    /// See [`Self::check_method`].
    pub fn check_bind_method(&self, method: BindMethod) -> Result<(), Refusal> {
        self.check_capabilities()?;
        self.check_offsets()?;
        match method {
            BindMethod::Fexit => Ok(()),
            BindMethod::Perf => {
                self.check_probe_read()?;
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

    /// Checks the same for the iterator over descriptors.
    ///
    /// # Errors
    /// See [`Self::check_method`].
    pub fn check_descriptors(&self) -> Result<(), Refusal> {
        self.check_capabilities()?;
        self.check_offsets()?;
        let unsupported = |why: String| Err(Refusal::Unsupported(why));
        if !self.is_initial_pid_ns {
            // The iterator walks the tasks of the reader's pid namespace.
            return unsupported(
                "not in the initial pid namespace, so other processes are not visited".into(),
            );
        }
        if let Some(name) = self.descriptor_targets_missing.first() {
            return unsupported(format!("the kernel's BTF has no {name}"));
        }
        self.check_fields(&DESCRIPTOR_FIELDS)
    }

    /// Checks the same for the iterator over network namespaces.
    ///
    /// # Errors
    /// See [`Self::check_method`].
    pub fn check_namespaces(&self) -> Result<(), Refusal> {
        self.check_capabilities()?;
        self.check_offsets()?;
        self.check_probe_read()?;
        if !self.has_namespace_target {
            return Err(Refusal::Unsupported(format!("the kernel's BTF has no {NAMESPACE_TARGET}")));
        }
        self.check_fields(&NAMESPACE_FIELDS)
    }

    fn check_fields(&self, fields: &[Field]) -> Result<(), Refusal> {
        match fields.iter().find(|field| self.offsets[**field as usize] == ABSENT) {
            Some(field) => {
                let (_, of, member, _) = Field::ALL[*field as usize];
                Err(Refusal::Unsupported(format!("the kernel's BTF has no {of}.{member}")))
            }
            None => Ok(()),
        }
    }

    /// Checks the same for the guard.
    ///
    /// # Errors
    /// See [`Self::check_method`].
    pub fn check_guard(&self) -> Result<(), Refusal> {
        self.check_capabilities()?;
        self.check_offsets()?;
        // Without it each socket would be root's for the rules about users.
        self.check_fields(&[Field::SockUid])?;
        // Packet programs take it (`bpf_prog_load_check_attach`, kernel/bpf/syscall.c at v5.10), and CAP_SYS_ADMIN
        // includes it there.
        if self.capabilities.intersects(CapabilitySet::NET_ADMIN) {
            return Ok(());
        }
        Err(Refusal::Denied("needs CAP_NET_ADMIN: run as root, or grant it".to_owned()))
    }

    fn check_offsets(&self) -> Result<(), Refusal> {
        if let Err(why) = &self.btf {
            return Err(Refusal::Unsupported(why.clone()));
        }
        self.offsets_missing.clone().map_or(Ok(()), |why| Err(Refusal::Unsupported(why)))
    }

    fn check_target(&self, method: Method) -> Result<(), Refusal> {
        self.check_offsets()?;
        if self.btf_targets.contains(&method) {
            return Ok(());
        }
        let name = METHOD_TARGETS.iter().find(|target| target.0 == method).map_or("it", |target| target.2);
        Err(Refusal::Unsupported(format!("the kernel's BTF has no {name}")))
    }

    /// A better reason why the kernel does not load a program, if one is known.
    pub(crate) fn explain(&self, refusal: Refusal) -> Refusal {
        if self.lacks_tracing { Refusal::Unsupported(WITHOUT_TRACING.to_owned()) } else { refusal }
    }

    fn check_probe_read(&self) -> Result<(), Refusal> {
        if self.probe_read {
            return Ok(());
        }
        Err(probe_read_refusal(self.lacks_tracing, self.lockdown.as_deref()))
    }
}

/// The object has a kprobe program for this architecture.
fn check_kprobe_program(arch: &str) -> Result<(), Refusal> {
    match names::kprobe(arch, true) {
        Some(_) => Ok(()),
        None => Err(Refusal::Unsupported(format!("the eBPF object has no kprobe program for {arch}"))),
    }
}

/// Why programs may not call `bpf_probe_read_kernel`. `lockdown` is `None` if it can't be read.
fn probe_read_refusal(lacks_tracing: bool, lockdown: Option<&str>) -> Refusal {
    let why = "bpf_probe_read_kernel may not be called";
    match (lacks_tracing, lockdown) {
        (true, _) => Refusal::Unsupported(WITHOUT_TRACING.to_owned()),
        (false, Some("confidentiality")) => Refusal::Refused(format!("{why} under lockdown=confidentiality")),
        (false, Some(_)) => Refusal::Unsupported(why.to_owned()),
        // Since v5.5 each kernel has it, and nothing else refuses it (`bpf_tracing_func_proto`,
        // kernel/trace/bpf_trace.c at v5.10).
        (false, None) => Refusal::Refused(format!(
            "{why}, as under lockdown=confidentiality; {LOCKDOWN_PATH} can't be read"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_refused_by_policy_unless_the_kernel_lacks_it() {
        let is_refused = |lacks, lockdown| matches!(probe_read_refusal(lacks, lockdown), Refusal::Refused(why) if why.contains("lockdown"));
        assert!(is_refused(false, Some("confidentiality")) && is_refused(false, None));
        assert!(!is_refused(false, Some("integrity")) && !is_refused(true, Some("confidentiality")));
    }

    #[test]
    fn kprobe_is_refused_on_an_architecture_without_a_program() {
        for arch in ["x86_64", "aarch64"] {
            assert_eq!(check_kprobe_program(arch), Ok(()));
        }
        let refused = Refusal::Unsupported("the eBPF object has no kprobe program for riscv64".to_owned());
        assert_eq!(check_kprobe_program("riscv64"), Err(refused));
    }
}
