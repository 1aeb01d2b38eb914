//! Daemons that are shared by consecutive tests of a module. Starting a daemon reads the kernel's BTF and has every
//! program verified, which takes seconds on an emulated kernel. Most tests do not depend on the start or the
//! end of a daemon. But an idle daemon also reports everything that other tests do, so it ends with its module.

use std::{
    io,
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    sync::{
        Mutex, OnceLock,
        mpsc::{Sender, channel},
    },
    thread,
};

use rustix::{
    process::{Signal, set_parent_process_death_signal},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::{
    daemon::{HookVariant, TestDaemon},
    machine,
};

/// The options that a pooled daemon was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolKey {
    variant: HookVariant,
    options: Vec<String>,
}

impl PoolKey {
    pub(crate) fn of(variant: &HookVariant, options: &[&str]) -> Self {
        Self {
            variant: variant.clone(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }
}

/// Daemons that no test uses at the moment.
static IDLE: Mutex<Vec<(PoolKey, TestDaemon)>> = Mutex::new(Vec::new());

pub(crate) fn take_idle(key: &PoolKey) -> Option<TestDaemon> {
    machine::occupy();
    let mut idle = IDLE.lock().unwrap();
    let index = idle.iter().position(|(idle_key, _)| idle_key == key)?;
    Some(idle.swap_remove(index).1)
}

pub(crate) fn put_idle(key: PoolKey, daemon: TestDaemon) {
    IDLE.lock().unwrap().push((key, daemon));
}

/// Ends the idle daemons if they are of another module than the calling test: if the first two parts of its path are
/// others. Does nothing on the threads that a test starts.
pub(super) fn begin_test() {
    static MODULE: Mutex<String> = Mutex::new(String::new());
    let thread = thread::current();
    let Some(path) = thread.name().filter(|name| name.contains("::")) else { return };
    let depth = path.matches("::").count().min(2);
    let module = path.split("::").take(depth).collect::<Vec<_>>().join("::");
    let mut last = MODULE.lock().unwrap();
    if *last != module {
        *last = module;
        IDLE.lock().unwrap().clear();
    }
}

type SpawnRequest = (Command, Sender<io::Result<Child>>);

/// Starts a process that ends when the test process does, however that ends. PR_SET_PDEATHSIG fires when the
/// thread that started the process ends (`reparent_leader`, `kernel/exit.c` at v6.12), so this must be a
/// thread that stays. That thread is in a network namespace of its own, so that the processes keep no test's
/// namespace alive.
pub(crate) fn spawn(command: &mut Command) -> Child {
    static SPAWNER: OnceLock<Sender<SpawnRequest>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, receiver) = channel::<SpawnRequest>();
        thread::spawn(move || {
            // SAFETY: only the flag FILES could take descriptors away from other threads, and it is not set.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            for (mut command, reply) in receiver {
                reply.send(command.spawn()).unwrap();
            }
        });
        requests
    });
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: only prctl is called between fork and exec.
    unsafe { copy.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    let (reply, response) = channel();
    spawner.send((copy, reply)).unwrap();
    response.recv().unwrap().unwrap()
}
