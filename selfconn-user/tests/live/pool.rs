//! Daemons that serve test after test. A start reads the kernel's BTF and has every program verified, which takes an
//! emulated kernel a second; most tests look at nothing that the start or the end of a daemon does.

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

use crate::daemon::{Daemon, Variant};

/// How a daemon was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    variant: Variant,
    options: Vec<String>,
}

impl Place {
    pub(crate) fn of(variant: &Variant, options: &[&str]) -> Self {
        Self {
            variant: variant.clone(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }
}

/// Those that serve no test at the moment.
static IDLE: Mutex<Vec<(Place, Daemon)>> = Mutex::new(Vec::new());

pub(crate) fn take(place: &Place) -> Option<Daemon> {
    let mut idle = IDLE.lock().unwrap();
    let index = idle.iter().position(|(of, _)| of == place)?;
    Some(idle.swap_remove(index).1)
}

pub(crate) fn give_back(place: Place, daemon: Daemon) {
    IDLE.lock().unwrap().push((place, daemon));
}

/// Ends them all: for tests in which no other daemon may run beside the one that is looked at.
pub(crate) fn dismiss() {
    IDLE.lock().unwrap().clear();
}

type Order = (Command, Sender<io::Result<Child>>);

/// Starts a process that is gone when this one is, however that ends. The kernel counts the thread that started it as
/// its parent (`reparent_leader`, `kernel/exit.c` at v6.12), so that must be one that stays; it is in a network
/// namespace of its own, and no test's namespace lives on through it.
pub(crate) fn spawn(command: &mut Command) -> Child {
    static KEEPER: OnceLock<Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (orders, ordered) = channel::<Order>();
        thread::spawn(move || {
            // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            for (mut command, answer) in ordered {
                answer.send(command.spawn()).unwrap();
            }
        });
        orders
    });
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: prctl, and nothing else, is called between fork and exec.
    unsafe { copy.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    let (answer, answered) = channel();
    keeper.send((copy, answer)).unwrap();
    answered.recv().unwrap().unwrap()
}
