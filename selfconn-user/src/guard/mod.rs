//! The guard in user space: which connects it refuses (`rules`), its start (`start`), which network namespace it takes
//! next (`queue`), which ones it does not guard (`unguarded`), what it does in one of them (`netns`), and the thread
//! that does so (`work`) with the daemon's end of it (`thread`). The program is in `bpf/guard.rs`; its reports are
//! handled by `daemon/guarding.rs`.

use std::io;

use crate::{
    bpf::found_guards::{self, FoundGuard},
    system::rtnetlink,
};

mod netns;
pub mod queue;
pub mod rules;
pub mod start;
pub mod thread;
pub mod unguarded;
pub mod work;

/// What the guard does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum GuardMode {
    /// Nothing
    Off,
    /// Only report what would be refused
    DryRun,
    /// Refuse a connect to itself, as a closed port would
    Refuse,
}

impl GuardMode {
    /// What guards do in the network namespace of the calling thread, this run's and others': on the device with the
    /// least of it.
    ///
    /// # Errors
    /// If the kernel refuses to list them.
    pub fn in_this_netns() -> io::Result<Self> {
        let found = found_guards::find()?;
        let on_device = |device: &rtnetlink::LoopDevice| {
            let guards = found.iter().filter(|guard| guard.device == device.name);
            guards.map(Self::of).max().unwrap_or(Self::Off)
        };
        Ok(rtnetlink::loop_devices()?.iter().map(on_device).min().unwrap_or(Self::Off))
    }

    const fn of(found: &FoundGuard) -> Self {
        if found.refuses { Self::Refuse } else { Self::DryRun }
    }

    /// The name in events and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::DryRun => "dry-run",
            Self::Refuse => "refuse",
        }
    }

    /// One of [`selfconn_ebpf::guard::mode`].
    #[must_use]
    pub const fn number(self) -> u32 {
        use selfconn_ebpf::guard::mode;
        match self {
            Self::Off => mode::OFF,
            Self::DryRun => mode::DRY_RUN,
            Self::Refuse => mode::REFUSE,
        }
    }
}
