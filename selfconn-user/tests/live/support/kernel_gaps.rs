//! Kernel gaps: transitions for which a kernel runs no BPF program. Some kernels run no program while a
//! thread of process 1 is the current task, which a softirq may interrupt. This was seen on the 6.18 kernel
//! of a sandbox with every method, and no counter shows it. The tracepoint still fires, so ftrace has these
//! transitions.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use selfconn::bpf::tracefs::{self, Tracefs};

/// Records `inet_sock_set_state` with ftrace on the threads of process 1, until it is dropped.
pub(crate) struct KernelGaps {
    instance: String,
}

impl KernelGaps {
    /// Begins to record. `None` on a kernel under test in a VM, which has no such gaps, and where there is no
    /// tracefs.
    pub(crate) fn record() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let gaps = Self { instance: format!("selfconn-test-{}-{number}", std::process::id()) };
        if std::env::var_os("SELFCONN_KERNEL").is_some() {
            return None;
        }
        gaps.with_instance(|at| {
            fs::create_dir(at)?;
            let tasks =
                fs::read_dir("/proc/1/task")?.map(|task| Ok(task?.file_name().into_string().unwrap()));
            let tasks: Vec<_> = tasks.collect::<io::Result<_>>()?;
            // Also record the threads that process 1 starts from now on.
            fs::write(at.join("options/event-fork"), "1")?;
            fs::write(at.join("set_event_pid"), tasks.join(" "))?;
            fs::write(at.join("events/sock/inet_sock_set_state/enable"), "1")
        })?
        .unwrap();
        Some(gaps)
    }

    /// Number of transitions to a state whose name has this prefix, on loopback addresses with this prefix.
    pub(crate) fn count(&self, addresses: &str, state: &str) -> usize {
        let trace = self.with_instance(|at| fs::read_to_string(at.join("trace"))).unwrap().unwrap();
        let is_match = |line: &&str| {
            line.contains(&format!(" saddr={addresses}")) && line.contains(&format!(" newstate=TCP_{state}"))
        };
        trace.lines().filter(is_match).count()
    }

    /// Runs `work` in a mount namespace with tracefs. `None` if there is no tracefs.
    fn with_instance<T: Send>(&self, work: impl FnOnce(&Path) -> T + Send) -> Option<T> {
        tracefs::with(|| match tracefs::find() {
            Tracefs::At(at) => Some(work(&[at, "instances", &self.instance].iter().collect::<PathBuf>())),
            Tracefs::Denied | Tracefs::NotMounted | Tracefs::Empty | Tracefs::Absent => None,
        })
    }
}

impl Drop for KernelGaps {
    fn drop(&mut self) {
        let _ = self.with_instance(|at| {
            fs::write(at.join("events/sock/inet_sock_set_state/enable"), "0")
                .and_then(|()| fs::remove_dir(at))
        });
    }
}
