//! Attaches one method of a hook.

use std::cell::OnceCell;

use aya::{
    Btf, Ebpf, Endianness,
    programs::{
        BtfTracePoint, FEntry, KProbe, Program, ProgramError, TracePoint, fentry::FEntryLink,
        kprobe::KProbeLink, tp_btf::BtfTracePointLink, trace_point::TracePointLink,
    },
};

use super::{
    attach::Method,
    btf,
    features::KernelFeatures,
    object::{self, ObjectOptions},
    refusal::{Refusal, refusal},
    tracefs,
};

/// The link of an attached program; dropping it detaches the program.
#[expect(dead_code, reason = "dropping it detaches the program")]
pub(crate) enum Link {
    TpBtf(BtfTracePointLink),
    Perf(TracePointLink),
    Fentry(FEntryLink),
    Kprobe(KProbeLink),
}

/// The BTF types that BTF-based programs attach to.
const BTF_TARGETS: [(btf::BtfKind, &str); 5] = [
    (btf::BtfKind::Typedef, "btf_trace_inet_sock_set_state"),
    (btf::BtfKind::Function, "tcp_set_state"),
    (btf::BtfKind::Function, "inet_csk_get_port"),
    (btf::BtfKind::Function, "bpf_iter_task_file"),
    (btf::BtfKind::Function, "bpf_iter_task"),
];

/// The kernel's BTF as aya needs it. It is parsed when the first method needs it.
pub(crate) struct KernelBtf<'a> {
    features: &'a KernelFeatures,
    parsed: OnceCell<Result<Btf, String>>,
}

impl<'a> KernelBtf<'a> {
    pub(crate) fn new(features: &'a KernelFeatures) -> Self {
        Self { features, parsed: OnceCell::new() }
    }

    pub(crate) fn get(&self) -> Result<&Btf, Refusal> {
        let parse = || {
            let bytes = self.features.btf.as_deref().map_err(Clone::clone)?;
            // aya keeps every type and member that it parses, which is about 15 MiB for the kernel's BTF, but
            // needs only these types.
            let full = btf::Btf::parse(bytes).map_err(|error| error.to_string())?;
            Btf::parse(&full.excerpt(&BTF_TARGETS), Endianness::default()).map_err(|error| error.to_string())
        };
        self.parsed.get_or_init(parse).as_ref().map_err(|why| Refusal::Unsupported(why.clone()))
    }
}

/// Attaches each method for a moment to find out whether this kernel supports it.
///
/// # Errors
/// If the maps cannot be created.
pub fn probe_methods(features: &KernelFeatures) -> anyhow::Result<Vec<(Method, Result<(), Refusal>)>> {
    let mut ebpf = object::load(features, ObjectOptions::MINIMAL)?;
    Ok(tracefs::with(|| {
        let kernel_btf = KernelBtf::new(features);
        let outcome = |method| (method, attach(&mut ebpf, method, features, &kernel_btf).map(drop));
        Method::ALL.into_iter().map(outcome).collect()
    }))
}

/// Loads and attaches one method.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    method: Method,
    features: &KernelFeatures,
    kernel_btf: &KernelBtf<'_>,
) -> Result<Link, Refusal> {
    features.check_method(method)?;
    let name = method.program(features.uses_static_offsets);
    let Some(program) = ebpf.program_mut(name) else {
        return Err(Refusal::Broken(format!("the eBPF object has no program {name}")));
    };
    let attached = match program {
        Program::BtfTracePoint(program) => attach_tp_btf(program, kernel_btf.get()?).map(Link::TpBtf),
        Program::TracePoint(program) => attach_perf(program).map(Link::Perf),
        Program::FEntry(program) => attach_fentry(program, kernel_btf.get()?).map(Link::Fentry),
        Program::KProbe(program) => attach_kprobe(program).map(Link::Kprobe),
        _ => return Err(Refusal::Broken(format!("{name} has an unexpected type"))),
    };
    attached.map_err(|error| features.explain(refusal(&error)))
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
