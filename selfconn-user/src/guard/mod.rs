//! The guard in user space: which connects it refuses (`rules`), which network namespace it takes next (`queue`), which
//! ones it does not guard (`unguarded`), and the thread that attaches the program (`thread`). The program is in
//! `bpf/guard.rs`; its reports are handled by `daemon/guarding.rs`.

pub mod queue;
pub mod rules;
pub mod thread;
pub mod unguarded;

/// What the guard does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum GuardMode {
    /// Nothing
    Off,
    /// Only report what would be refused
    DryRun,
    /// Refuse a connect to itself, as a closed port would
    Refuse,
}

impl GuardMode {
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
