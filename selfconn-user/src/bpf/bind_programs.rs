//! Attaches the programs that detect a failed TCP bind, and records why a method is not available. The daemon
//! also runs on a host on which no method is available.

use aya::{
    Btf, Ebpf,
    programs::{FExit, Program, ProgramError, TracePoint, fexit::FExitLink, trace_point::TracePointLink},
};
use selfconn_ebpf::names;

use super::{
    bind_method::{BindChoice, BindMethod, RequestedBindMethod},
    features::KernelFeatures,
    object::{self, ObjectOptions},
    programs::KernelBtf,
    refusal::{Refusal, refusal},
    tracefs,
};

/// The links of the attached programs; dropping them detaches the programs.
#[expect(dead_code, reason = "dropping it detaches the programs")]
pub(crate) enum BindLinks {
    Fexit(FExitLink),
    Perf([TracePointLink; 2]),
}

/// Attaches the first method that can be attached. tracefs must be visible to this thread.
pub(crate) fn choose(
    ebpf: &mut Ebpf,
    requested: RequestedBindMethod,
    features: &KernelFeatures,
    kernel_btf: &KernelBtf<'_>,
) -> (BindChoice, Option<BindLinks>) {
    let mut binds = BindChoice::default();
    for method in BindMethod::ALL {
        match requested {
            RequestedBindMethod::Off => continue,
            RequestedBindMethod::Only(only) if only != method => continue,
            RequestedBindMethod::Only(_) | RequestedBindMethod::Auto => {}
        }
        match attach(ebpf, method, features, kernel_btf) {
            Ok(links) => {
                binds.live = Some(method);
                return (binds, Some(links));
            }
            Err(why) => {
                if let Refusal::Broken(why) = &why {
                    let method = method.name();
                    log::warn!(
                        "{method} for binds should work on this kernel but does not; please report it: {why}"
                    );
                }
                binds.refused.push((method, why));
            }
        }
    }
    (binds, None)
}

/// Attaches each method for a moment to find out whether this kernel supports it.
#[must_use]
pub fn probe_methods(features: &KernelFeatures) -> Vec<(BindMethod, Result<(), Refusal>)> {
    let mut ebpf = match object::load(features, ObjectOptions::MINIMAL) {
        Ok(ebpf) => ebpf,
        Err(error) => {
            let why = format!("{error:#}");
            let refused =
                |method| (method, features.check_capabilities().and(Err(Refusal::Refused(why.clone()))));
            return BindMethod::ALL.map(refused).into();
        }
    };
    tracefs::with(|| {
        let kernel_btf = KernelBtf::new(features);
        let outcome = |method| (method, attach(&mut ebpf, method, features, &kernel_btf).map(drop));
        BindMethod::ALL.into_iter().map(outcome).collect()
    })
}

fn attach(
    ebpf: &mut Ebpf,
    method: BindMethod,
    features: &KernelFeatures,
    kernel_btf: &KernelBtf<'_>,
) -> Result<BindLinks, Refusal> {
    features.check_bind_method(method)?;
    match method {
        BindMethod::Fexit => match ebpf.program_mut(names::BIND_FEXIT) {
            Some(Program::FExit(program)) => attach_fexit(program, kernel_btf.get()?)
                .map(BindLinks::Fexit)
                .map_err(|error| features.explain(refusal(&error))),
            _ => Err(missing(names::BIND_FEXIT)),
        },
        BindMethod::Perf => {
            // The exit program is attached first. Otherwise a call of which only the entry is observed would
            // leave an entry in the map that nothing removes.
            let mut attach_one = |name, event| match ebpf.program_mut(name) {
                Some(Program::TracePoint(program)) => {
                    attach_perf(program, event).map_err(|error| refusal(&error))
                }
                _ => Err(missing(name)),
            };
            let exit = attach_one(names::BIND_EXIT, "sys_exit_bind")?;
            Ok(BindLinks::Perf([attach_one(names::BIND_ENTER, "sys_enter_bind")?, exit]))
        }
    }
}

fn missing(name: &str) -> Refusal {
    Refusal::Broken(format!("the eBPF object has no program {name} of that type"))
}

fn attach_fexit(program: &mut FExit, btf: &Btf) -> Result<FExitLink, ProgramError> {
    program.load("inet_csk_get_port", btf)?;
    let id = program.attach()?;
    program.take_link(id)
}

fn attach_perf(program: &mut TracePoint, event: &str) -> Result<TracePointLink, ProgramError> {
    program.load()?;
    let id = program.attach("syscalls", event)?;
    program.take_link(id)
}
