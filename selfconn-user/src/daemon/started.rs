//! What `started` says of the hooks.

use crate::{
    event::{BindStatus, HookStatus, Refused, Started},
    kernel::{
        attach::{Choice, Hook, Method},
        host::Host,
        tracer::binds::{BindMethod, Binds},
    },
};

pub(super) fn started(host: &Host, methods: &Choice<()>, binds: &Binds) -> Started {
    let refused = |hook| {
        let told = |(method, why): &(Method, _)| Refused { method: method.name(), why: format!("{why}") };
        methods.refused_of(hook).map(told).collect::<Vec<_>>()
    };
    let mut hooks = Vec::new();
    for hook in Hook::ALL {
        let mut refused = refused(hook);
        for method in methods.live_of(hook) {
            let refused = std::mem::take(&mut refused);
            hooks.push(HookStatus { hook: hook.name(), method: Some(method.name()), refused });
        }
        if methods.live_of(hook).next().is_none() {
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
                .map(|(method, why)| Refused { method: method.name(), why: why.to_string() })
                .collect(),
        },
        limits: host.limits(),
    }
}
