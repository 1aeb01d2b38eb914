//! The options of `--guard`.

use anyhow::{Context as _, Result};

use crate::{
    bpf::guard::{GuardMethod, GuardOptions, GuardProgram},
    guard::{
        GuardMode,
        rules::{GuardRule, GuardRules},
        start::Guard,
    },
};

#[derive(Debug, clap::Args)]
pub(super) struct GuardArgs {
    /// What to do about a connect to itself, before there is a self-connection
    #[arg(long, value_enum, value_name = "MODE", default_value_t = GuardMode::Off)]
    guard: GuardMode,
    /// Guard only what matches, such as port=8000-8099, uid=1000, unit=java* or cgroup=/system.slice/*; may be repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "guard")]
    guard_only: Vec<GuardRule>,
    /// Let pass what matches; may be repeated; overrides --guard-only
    #[arg(long, value_name = "KEY=VALUE", requires = "guard")]
    guard_except: Vec<GuardRule>,
    /// Attach the guard by this method only
    #[arg(long, hide = true, value_enum, value_name = "METHOD")]
    guard_method: Option<GuardMethod>,
    /// Guard only the network namespace of the daemon
    #[arg(long, hide = true)]
    guard_own_netns: bool,
}

impl GuardArgs {
    pub(super) fn mode(&self) -> GuardMode {
        self.guard
    }

    pub(super) fn is_on(&self) -> bool {
        self.guard != GuardMode::Off
    }

    /// `group`: the id of the only control group that is guarded.
    ///
    /// # Errors
    /// If there are too many rules.
    pub(super) fn rules(&self, group: Option<u64>) -> Result<GuardRules> {
        GuardRules::new(self.guard_only.clone(), self.guard_except.clone())
            .map(|rules| rules.in_group(group))
            .map_err(|why| anyhow::anyhow!("--guard-only and --guard-except: {why}"))
    }

    /// What the program must know. `self_test`: cookie of the socket of the self-test.
    pub(super) fn options(&self, rules: &GuardRules, self_test: Option<u64>) -> GuardOptions {
        GuardOptions {
            mode: self.guard.number(),
            only: rules.required(),
            by_cgroup: rules.by_cgroup(),
            self_test: self_test.unwrap_or(0),
        }
    }

    /// Attaches the loaded program in this process's network namespace.
    ///
    /// # Errors
    /// If this host can't be guarded.
    pub(super) fn start(&self, program: Option<GuardProgram>, rules: GuardRules) -> Result<Option<Guard>> {
        let start = |program| Guard::start(program, self.guard_method, rules, self.guard_own_netns);
        program.map(start).transpose().with_context(|| format!("--guard {}", self.guard.name()))
    }
}
