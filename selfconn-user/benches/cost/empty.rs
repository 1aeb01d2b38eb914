//! Empty programs on our hooks, by our methods, attached until stdin ends. selfconn's cost is compared with
//! theirs.

use std::io::Read as _;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Btf, Ebpf,
    programs::{LinkOrder, Program, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use selfconn::bpf::{attach::Method, bind_method::BindMethod, tracefs};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-test-programs"));

/// Attaches an empty program by each method, prints a line, and waits.
pub(crate) fn run(methods: &[Method], binds: Option<BindMethod>, on_lo: Option<LinkOrder>) -> Result<()> {
    let mut ebpf = Ebpf::load(OBJECT)?;
    tracefs::with(|| {
        methods.iter().try_for_each(|method| attach(&mut ebpf, *method))?;
        binds.map_or(Ok(()), |method| attach_to_bind(&mut ebpf, method))
    })?;
    if let Some(order) = on_lo {
        attach_to_lo(&mut ebpf, order)?;
    }
    println!("live");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn attach(ebpf: &mut Ebpf, method: Method) -> Result<()> {
    let name = format!("empty_{method}");
    let btf = || Btf::from_sys_fs().map_err(|error| anyhow!("{error}"));
    let attached = match ebpf.program_mut(&name).with_context(|| format!("no program {name}"))? {
        Program::BtfTracePoint(program) => {
            program.load("inet_sock_set_state", &btf()?).and_then(|()| program.attach().map(drop))
        }
        Program::TracePoint(program) => {
            program.load().and_then(|()| program.attach("sock", "inet_sock_set_state").map(drop))
        }
        Program::FEntry(program) => {
            program.load("tcp_set_state", &btf()?).and_then(|()| program.attach().map(drop))
        }
        Program::KProbe(program) => {
            program.load().and_then(|()| program.attach("tcp_set_state", 0).map(drop))
        }
        _ => bail!("{name} is of another type"),
    };
    attached.with_context(|| format!("attach {name}"))
}

/// In this order among the programs of the device.
fn attach_to_lo(ebpf: &mut Ebpf, order: LinkOrder) -> Result<()> {
    let program: &mut SchedClassifier =
        ebpf.program_mut("empty_lo").context("no program empty_lo")?.try_into()?;
    program.load()?;
    let order = TcAttachOptions::TcxOrder(order);
    program.attach_with_options("lo", TcAttachType::Egress, order).context("attach empty_lo").map(drop)
}

fn attach_to_bind(ebpf: &mut Ebpf, method: BindMethod) -> Result<()> {
    let programs: &[_] = match method {
        BindMethod::Fexit => &[("empty_bind_fexit", "inet_csk_get_port")],
        BindMethod::Perf => &[("empty_bind_exit", "sys_exit_bind"), ("empty_bind_enter", "sys_enter_bind")],
    };
    for (name, target) in programs {
        match ebpf.program_mut(name).with_context(|| format!("no program {name}"))? {
            Program::TracePoint(program) => {
                program.load()?;
                program.attach("syscalls", target)?;
            }
            Program::FExit(program) => {
                program.load(target, &Btf::from_sys_fs()?)?;
                program.attach()?;
            }
            _ => bail!("{name} is of another type"),
        }
    }
    Ok(())
}
