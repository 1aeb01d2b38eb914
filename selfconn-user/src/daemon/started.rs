//! Builds the `started` event from the attached and refused methods.

use crate::{
    bpf::{
        attach::{Choice, Hook, Method},
        bind_method::{BindChoice, BindMethod},
        features::KernelFeatures,
    },
    event::{BindStatus, HookStatus, RefusedMethod, Started},
};

pub(super) fn started(host: &KernelFeatures, methods: &Choice<()>, binds: &BindChoice) -> Started {
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
        pid: std::process::id(),
        hooks,
        binds: BindStatus {
            method: binds.live.map(BindMethod::name),
            refused: binds
                .refused
                .iter()
                .map(|(method, why)| RefusedMethod { method: method.name(), why: why.to_string() })
                .collect(),
        },
        limits: host.limits(),
    }
}
