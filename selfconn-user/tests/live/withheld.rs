//! Transitions that a kernel keeps from every program. Some let none run while a thread of process 1 is the current
//! task, whom a softirq may interrupt: seen on the 6.18 of a sandbox, by every method, and counted nowhere. The
//! tracepoint fires all the same, so ftrace has them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use selfconn::kernel::tracefs::{self, Tracefs};

/// ftrace's own record of `inet_sock_set_state` on top of the threads of process 1, as long as it lives.
pub(crate) struct Withheld {
    instance: String,
}

impl Withheld {
    /// Begins to record. `None` on a kernel under test, where nothing is withheld, and where there is no tracefs.
    pub(crate) fn watch() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let own = Self { instance: format!("selfconn-test-{}-{number}", std::process::id()) };
        if std::env::var_os("SELFCONN_KERNEL").is_some() {
            return None;
        }
        own.within(|at| {
            fs::create_dir(at)?;
            let tasks =
                fs::read_dir("/proc/1/task")?.map(|task| Ok(task?.file_name().into_string().unwrap()));
            let tasks: Vec<_> = tasks.collect::<io::Result<_>>()?;
            // Those that it starts from now on, too.
            fs::write(at.join("options/event-fork"), "1")?;
            fs::write(at.join("set_event_pid"), tasks.join(" "))?;
            fs::write(at.join("events/sock/inet_sock_set_state/enable"), "1")
        })?
        .unwrap();
        Some(own)
    }

    /// How many transitions of loopback addresses that begin like this came to a state whose name begins like that.
    pub(crate) fn count(&self, addresses: &str, state: &str) -> usize {
        let trace = self.within(|at| fs::read_to_string(at.join("trace"))).unwrap().unwrap();
        let is_it = |line: &&str| {
            line.contains(&format!(" saddr={addresses}")) && line.contains(&format!(" newstate=TCP_{state}"))
        };
        trace.lines().filter(is_it).count()
    }

    /// Runs `work` where tracefs can be seen. `None`: nowhere.
    fn within<T: Send>(&self, work: impl FnOnce(&Path) -> T + Send) -> Option<T> {
        tracefs::with(|| match tracefs::find() {
            Tracefs::At(at) => Some(work(&[at, "instances", &self.instance].iter().collect::<PathBuf>())),
            Tracefs::NotMounted | Tracefs::Absent => None,
        })
    }
}

impl Drop for Withheld {
    fn drop(&mut self) {
        let _ = self.within(|at| {
            fs::write(at.join("events/sock/inet_sock_set_state/enable"), "0")
                .and_then(|()| fs::remove_dir(at))
        });
    }
}
