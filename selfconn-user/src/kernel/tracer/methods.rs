//! Attaches one method of a hook, and says what it means where the kernel doesn't let it.

use std::{cell::OnceCell, io};

use aya::{
    Btf, Ebpf, Endianness,
    programs::{
        BtfTracePoint, FEntry, KProbe, Program, ProgramError, TracePoint, fentry::FEntryLink,
        kprobe::KProbeLink, tp_btf::BtfTracePointLink, trace_point::TracePointLink,
    },
};
use rustix::io::Errno;

use crate::kernel::{
    attach::{Method, Refusal},
    btf,
    host::Host,
};

/// A live link; dropping it detaches the program.
#[expect(dead_code, reason = "held for what dropping it does")]
pub(super) enum Link {
    TpBtf(BtfTracePointLink),
    Perf(TracePointLink),
    Fentry(FEntryLink),
    Kprobe(KProbeLink),
}

/// What typed programs attach to, as BTF has it.
const TYPED: [(btf::Named, &str); 3] = [
    (btf::Named::Typedef, "btf_trace_inet_sock_set_state"),
    (btf::Named::Function, "tcp_set_state"),
    (btf::Named::Function, "inet_csk_get_port"),
];

/// aya's view of the kernel's BTF, parsed when the first method asks for it.
pub(super) struct KernelBtf<'a> {
    host: &'a Host,
    parsed: OnceCell<Result<Btf, String>>,
}

impl<'a> KernelBtf<'a> {
    /// Nothing is parsed yet.
    pub(super) fn of(host: &'a Host) -> Self {
        Self { host, parsed: OnceCell::new() }
    }

    pub(super) fn get(&self) -> Result<&Btf, Refusal> {
        let parse = || {
            let bytes = self.host.btf.as_deref().map_err(Clone::clone)?;
            // aya keeps every type and member of what it parses, some 15 MiB of the kernel's BTF, and looks for these.
            let kernel = btf::Btf::parse(bytes).map_err(|error| error.to_string())?;
            Btf::parse(&kernel.excerpt(&TYPED), Endianness::default()).map_err(|error| error.to_string())
        };
        self.parsed.get_or_init(parse).as_ref().map_err(|why| Refusal::Unsupported(why.clone()))
    }
}

/// Loads and attaches one method.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    method: Method,
    host: &Host,
    kernel_btf: &KernelBtf<'_>,
) -> Result<Link, Refusal> {
    host.offers(method)?;
    let name = method.program(host.has_usual_layout);
    let Some(program) = ebpf.program_mut(name) else {
        return Err(Refusal::Broken(format!("the eBPF object has no program {name}")));
    };
    let attached = match program {
        Program::BtfTracePoint(program) => attach_tp_btf(program, kernel_btf.get()?).map(Link::TpBtf),
        Program::TracePoint(program) => attach_perf(program).map(Link::Perf),
        Program::FEntry(program) => attach_fentry(program, kernel_btf.get()?).map(Link::Fentry),
        Program::KProbe(program) => attach_kprobe(program).map(Link::Kprobe),
        _ => return Err(Refusal::Broken(format!("{name} is of another type"))),
    };
    attached.map_err(|error| refusal(&error))
}

fn attach_tp_btf(program: &mut BtfTracePoint, btf: &Btf) -> Result<BtfTracePointLink, ProgramError> {
    program.load("inet_sock_set_state", btf)?;
    let id = program.attach()?;
    program.take_link(id)
}

fn attach_perf(program: &mut TracePoint) -> Result<TracePointLink, ProgramError> {
    program.load()?;
    let id = program.attach("sock", "inet_sock_set_state")?;
    program.take_link(id)
}

fn attach_fentry(program: &mut FEntry, btf: &Btf) -> Result<FEntryLink, ProgramError> {
    program.load("tcp_set_state", btf)?;
    let id = program.attach()?;
    program.take_link(id)
}

fn attach_kprobe(program: &mut KProbe) -> Result<KProbeLink, ProgramError> {
    program.load()?;
    let id = program.attach("tcp_set_state", 0)?;
    program.take_link(id)
}

/// What an error means, by its errno and by whether the verifier had a say. The capabilities were there: see
/// [`Host::offers`].
pub(super) fn refusal(error: &ProgramError) -> Refusal {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let said = verifier_log.to_string();
            match said.lines().rfind(|line| !line.trim().is_empty()) {
                Some(last) => Refusal::Broken(format!("{io_error}; the verifier said: {last}")),
                None => refusal_by_errno("BPF_PROG_LOAD", io_error),
            }
        }
        ProgramError::SyscallError(error) => refusal_by_errno(error.call, &error.io_error),
        ProgramError::TracePointError(_) | ProgramError::KProbeError(_) | ProgramError::Btf(_) => {
            Refusal::Unsupported(error.to_string())
        }
        _ => Refusal::Broken(error.to_string()),
    }
}

fn refusal_by_errno(call: &str, error: &io::Error) -> Refusal {
    /// `include/linux/errno.h`; not among the errnos of user space.
    const ENOTSUPP: i32 = 524;
    let why = format!("{call}: {error}");
    let errno = error.raw_os_error().unwrap_or(0);
    if errno == ENOTSUPP {
        return Refusal::Unsupported(why);
    }
    match Errno::from_raw_os_error(errno) {
        Errno::PERM | Errno::ACCESS => {
            Refusal::Refused(format!("{why}, though this process has every capability that it needs"))
        }
        Errno::INVAL | Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::TOOBIG => {
            Refusal::Unsupported(why)
        }
        _ => Refusal::Refused(why),
    }
}
