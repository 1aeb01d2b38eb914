//! The programs that see a TCP bind fail: which of them loads, and why the others don't. A host on which none does is
//! watched all the same.

use aya::{
    Btf, Ebpf,
    programs::{FExit, Program, ProgramError, TracePoint, fexit::FExitLink, trace_point::TracePointLink},
};
use selfconn_ebpf::names;

use super::{
    Options, load,
    methods::{KernelBtf, refusal},
    raise_memlock,
};
use crate::kernel::{
    attach::{Refusal, Wanted},
    host::Host,
    tracefs,
};

/// How a failed bind is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindMethod {
    /// The return of `inet_csk_get_port`, through which every bind of a TCP socket goes: nothing else pays for it.
    Fexit,
    /// The system call, of any socket.
    Perf,
}

impl BindMethod {
    /// In the order of preference.
    pub const ALL: [Self; 2] = [Self::Fexit, Self::Perf];

    /// As events and options have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fexit => "fexit",
            Self::Perf => "perf",
        }
    }
}

/// Which methods may be tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WantedBinds {
    /// Whatever loads.
    #[default]
    Auto,
    /// This one.
    Only(BindMethod),
    /// None.
    Off,
}

/// What became of the attempts.
#[derive(Debug, Default)]
pub struct Binds {
    /// The live method.
    pub live: Option<BindMethod>,
    /// Those that were tried and are not live.
    pub refused: Vec<(BindMethod, Refusal)>,
}

/// Live links; dropping them detaches the programs.
#[expect(dead_code, reason = "held for what dropping it does")]
pub(super) enum Links {
    Fexit(FExitLink),
    Perf([TracePointLink; 2]),
}

/// Attaches the first that loads. tracefs must be visible to this thread.
pub(super) fn choose(
    ebpf: &mut Ebpf,
    wanted: WantedBinds,
    host: &Host,
    kernel_btf: &KernelBtf<'_>,
) -> (Binds, Option<Links>) {
    let mut binds = Binds::default();
    for method in BindMethod::ALL {
        match wanted {
            WantedBinds::Off => continue,
            WantedBinds::Only(only) if only != method => continue,
            WantedBinds::Only(_) | WantedBinds::Auto => {}
        }
        match attach(ebpf, method, host, kernel_btf) {
            Ok(links) => {
                binds.live = Some(method);
                return (binds, Some(links));
            }
            Err(why) => {
                if let Refusal::Broken(why) = &why {
                    let method = method.name();
                    log::warn!(
                        "{method} for binds should work on this kernel and doesn't; please report it: {why}"
                    );
                }
                binds.refused.push((method, why));
            }
        }
    }
    (binds, None)
}

/// Attaches each method for a moment, to learn whether it can be.
#[must_use]
pub fn rehearse(host: &Host) -> Vec<(BindMethod, Result<(), Refusal>)> {
    raise_memlock();
    let options = Options {
        wanted: Wanted::default(),
        binds: WantedBinds::Auto,
        ring_bytes: 1 << 16,
        dials: 8,
        refusals: 8,
        states: false,
        log: false,
    };
    let mut ebpf = match load(host, options) {
        Ok(ebpf) => ebpf,
        Err(error) => {
            let why = format!("{error:#}");
            let refused = |method| (method, host.permits().and(Err(Refusal::Refused(why.clone()))));
            return BindMethod::ALL.map(refused).into();
        }
    };
    tracefs::with(|| {
        let kernel_btf = KernelBtf::of(host);
        let outcome = |method| (method, attach(&mut ebpf, method, host, &kernel_btf).map(drop));
        BindMethod::ALL.into_iter().map(outcome).collect()
    })
}

fn attach(
    ebpf: &mut Ebpf,
    method: BindMethod,
    host: &Host,
    kernel_btf: &KernelBtf<'_>,
) -> Result<Links, Refusal> {
    host.offers_binds(method)?;
    match method {
        BindMethod::Fexit => match ebpf.program_mut(names::BIND_FEXIT) {
            Some(Program::FExit(program)) => {
                attach_fexit(program, kernel_btf.get()?).map(Links::Fexit).map_err(|error| refusal(&error))
            }
            _ => Err(missing(names::BIND_FEXIT)),
        },
        BindMethod::Perf => {
            // The end first: a call of which only the beginning is seen would be remembered for nothing.
            let mut one = |name, event| match ebpf.program_mut(name) {
                Some(Program::TracePoint(program)) => {
                    attach_perf(program, event).map_err(|error| refusal(&error))
                }
                _ => Err(missing(name)),
            };
            let end = one(names::BIND_EXIT, "sys_exit_bind")?;
            Ok(Links::Perf([one(names::BIND_ENTER, "sys_enter_bind")?, end]))
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
