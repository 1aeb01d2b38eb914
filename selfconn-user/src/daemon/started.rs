//! Builds the `started` event from the attached and refused methods.

use selfconn_ebpf::names;

use crate::{
    bpf::{
        attach::{Hook, Method},
        bind_method::BindMethod,
        descriptors,
        features::KernelFeatures,
        loader::Tracer,
        namespaces,
        refusal::Refusal,
    },
    event::{GuardStatus, HookStatus, MethodStatus, RefusedMethod, Started},
};

pub(super) fn started(host: &KernelFeatures, tracer: &Tracer, guard: GuardStatus) -> Started {
    let (methods, binds) = (tracer.methods(), tracer.bind_choice());
    let refused = |hook| {
        let refused_method =
            |(method, why): &(Method, _)| RefusedMethod { method: method.name(), why: format!("{why}") };
        methods.refused_on(hook).map(refused_method).collect::<Vec<_>>()
    };
    let mut hooks = Vec::new();
    for hook in Hook::ALL {
        let mut refused = refused(hook);
        for method in methods.live_on(hook) {
            let refused = std::mem::take(&mut refused);
            hooks.push(HookStatus { hook: hook.name(), method: Some(method.name()), refused });
        }
        if methods.live_on(hook).next().is_none() {
            hooks.push(HookStatus { hook: hook.name(), method: None, refused });
        }
    }
    Started {
        version: env!("CARGO_PKG_VERSION"),
        kernel: host.release.clone(),
        machine: host.machine.clone(),
        object: env!("SELFCONN_OBJECT"),
        object_architectures: names::KPROBES.iter().map(|(architecture, ..)| *architecture).collect(),
        pid: std::process::id(),
        hooks,
        binds: MethodStatus {
            method: binds.live.map(BindMethod::name),
            refused: binds
                .refused
                .iter()
                .map(|(method, why)| RefusedMethod { method: method.name(), why: why.to_string() })
                .collect(),
        },
        descriptors: iterator_status(descriptors::NAME, tracer.descriptors_refusal()),
        namespaces: iterator_status(namespaces::NAME, tracer.namespaces_refusal()),
        guard,
        limits: host.limits().into_iter().chain(methods.limit()).chain(binds.limit()).collect(),
    }
}

fn iterator_status(name: &'static str, refusal: Option<&Refusal>) -> MethodStatus {
    MethodStatus {
        method: refusal.is_none().then_some(name),
        refused: refusal
            .map(|why| RefusedMethod { method: name, why: why.to_string() })
            .into_iter()
            .collect(),
    }
}
