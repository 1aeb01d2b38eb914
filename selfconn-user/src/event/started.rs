//! The event `started`: the hooks are attached. Version, kernel, attached methods, and limits.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use super::text::{EventFormat, LogRecord, Severity, escape};

/// `started`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Started {
    /// Version of selfconn.
    pub version: &'static str,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// Architecture of the kernel, as `uname -m` prints it.
    pub machine: String,
    /// Checksum of the eBPF object, as `--version` prints it.
    pub object: &'static str,
    /// The architectures for which the object has kprobes, as in `machine`.
    pub object_architectures: Vec<&'static str>,
    /// Process id of the daemon.
    pub pid: u32,
    /// One entry for each attached method, and one for each hook without a method.
    pub hooks: Vec<HookStatus>,
    /// How failed binds are observed.
    pub binds: MethodStatus,
    /// How the descriptors of all processes are read. Without a method, holders are looked up in `/proc`.
    pub descriptors: MethodStatus,
    /// How it is known which network namespaces exist.
    pub namespaces: MethodStatus,
    /// The guard of this host.
    pub guard: GuardStatus,
    /// What the daemon cannot observe on this host.
    pub limits: Vec<String>,
}

/// How connects to itself are refused.
#[derive(Debug, Serialize, JsonSchema)]
pub struct GuardStatus {
    /// `off`, `dry-run` or `refuse`.
    pub mode: &'static str,
    /// How the program is attached: `tcx` or `clsact`. Null if it is not.
    pub method: Option<&'static str>,
    /// True if another guard was there first. It refuses, and this one goes on when that one ends.
    pub is_second: bool,
}

/// Outcome of attaching one hook.
#[derive(Debug, Serialize, JsonSchema)]
pub struct HookStatus {
    /// Kernel name of the hook.
    pub hook: &'static str,
    /// How the hook is attached. Null if it is not attached.
    pub method: Option<&'static str>,
    /// The other methods that were tried.
    pub refused: Vec<RefusedMethod>,
}

/// How something else is observed.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MethodStatus {
    /// How the program is attached. Null if it is not.
    pub method: Option<&'static str>,
    /// The methods that were tried and are not attached.
    pub refused: Vec<RefusedMethod>,
}

/// A method that was tried and is not attached.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RefusedMethod {
    /// Name of the method.
    pub method: &'static str,
    /// Why it is not attached.
    pub why: String,
}

pub(super) const FORMAT: EventFormat = EventFormat {
    event: "started",
    label: "started",
    severity: Severity::Notice,
    message,
    details: Some(details),
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    write!(out, "selfconn {}", escape(record.text("version").unwrap_or("?")))?;
    if let Some(pid) = record.number("pid") {
        write!(out, " [{pid}]")?;
    }
    write!(out, " on kernel {}", escape(record.text("kernel").unwrap_or("?")))?;
    if let Some(machine) = record.text("machine") {
        write!(out, " ({})", escape(machine))?;
    }
    let Some(object) = record.text("object") else { return Ok(()) };
    write!(out, ", eBPF object {}", escape(object))?;
    let architectures = record.texts("object_architectures").collect::<Vec<_>>().join(" and ");
    if architectures.is_empty() { Ok(()) } else { write!(out, " for {}", escape(&architectures)) }
}

fn details(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let hooks: Vec<_> = record.objects("hooks").collect();
    for statuses in hooks.chunk_by(|one, next| one.text("hook") == next.text("hook")) {
        let live: Vec<_> = statuses.iter().filter_map(|status| status.text("method")).collect();
        let how = match &live[..] {
            [] => "not attached".to_owned(),
            live => format!("attached by {}", escape(&live.join(" and "))),
        };
        write!(out, "\n    {}: {how}", escape(statuses[0].text("hook").unwrap_or("?")))?;
        for status in statuses {
            refused_methods(*status, out)?;
        }
    }
    if let Some(binds) = record.object("binds") {
        match binds.text("method") {
            Some(method) => write!(out, "\n    failed binds: observed by {}", escape(method))?,
            None => write!(out, "\n    failed binds: not observed")?,
        }
        refused_methods(binds, out)?;
    }
    if let Some(descriptors) = record.object("descriptors") {
        match descriptors.text("method") {
            Some(method) => write!(out, "\n    descriptors: read by {}", escape(method))?,
            None => write!(out, "\n    descriptors: read from /proc")?,
        }
        refused_methods(descriptors, out)?;
    }
    if let Some(namespaces) = record.object("namespaces") {
        match namespaces.text("method") {
            Some(method) => write!(out, "\n    namespaces: listed by {}", escape(method))?,
            None => write!(out, "\n    namespaces: not listed")?,
        }
        refused_methods(namespaces, out)?;
    }
    if let Some(guard) = record.object("guard")
        && let Some(method) = guard.text("method")
    {
        write!(out, "\n    guard: {} by {}", escape(guard.text("mode").unwrap_or("?")), escape(method))?;
        if guard.flag("is_second") == Some(true) {
            write!(out, "; another guard refuses first, and this one goes on when that one ends")?;
        }
    }
    for limit in record.texts("limits") {
        write!(out, "\n    limit: {}", escape(limit))?;
    }
    Ok(())
}

/// The methods that are not attached, one a line.
fn refused_methods(status: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    for refused in status.objects("refused") {
        let text = |key| escape(refused.text(key).unwrap_or("?"));
        write!(out, "\n        {} {}", text("method"), text("why"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[(
            r#"{"event":"started","version":"0.1.0","pid":7,"kernel":"6.1\u001b","machine":"x86_64","object":"0a1b",
                    "object_architectures":["x86_64","aarch64"],"hooks":[{"hook":"h","method":
                    "tp_btf","refused":[]},{"hook":"h","method":"perf","refused":[]},{"hook":"g","method":null,
                    "refused":[{"method":"fentry","why":"refused"}]}],"binds":{"method":null,"refused":[{"method":
                    "perf","why":"no"}]},"descriptors":{"method":null,"refused":[{"method":"task_file","why":"old"}]},
                    "namespaces":{"method":null,"refused":[{"method":"task","why":"policy"}]},
                    "guard":{"mode":"refuse","method":"tcx","is_second":true},"limits":["one"]}"#,
            "started      selfconn 0.1.0 [7] on kernel 6.1\\u{1b} (x86_64), eBPF object 0a1b for x86_64 and \
                 aarch64\n    h: attached by tp_btf and perf\n    g: not \
                 attached\n        fentry refused\n    failed binds: not observed\n        perf no\n    descriptors: read from /proc\n        \
                 task_file old\n    namespaces: not listed\n        task policy\n    guard: refuse by tcx; another guard refuses \
                 first, and this one goes on when that one ends\n    limit: one",
        )]);
    }
}
