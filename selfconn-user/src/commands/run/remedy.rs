//! The options of `--remedy`, and the check whether a remedy is possible on this host.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use selfconn_ebpf::{ABSENT, Field};

use crate::{
    bpf::features::KernelFeatures,
    commands::duration,
    detect::{
        filter::{Rule, Selection},
        remediation::{Remedy, RemedyMode, RemedyPolicy},
    },
    sockets,
};

#[derive(Debug, clap::Args)]
pub(super) struct RemedyArgs {
    /// What to do about a self-connection
    #[arg(long, value_enum, value_name = "MODE", default_value_t = ModeArg::Off)]
    remedy: ModeArg,
    /// Only self-connections whose field matches, such as unit=java* or port=8080; may be repeated
    #[arg(long, value_name = "KEY=GLOB", requires = "remedy")]
    remedy_only: Vec<Rule>,
    /// Exclude self-connections whose field matches or is unknown; may be repeated; overrides --remedy-only
    #[arg(long, value_name = "KEY=GLOB", requires = "remedy")]
    remedy_except: Vec<Rule>,
    /// Only self-connections at least this old: 500ms, 30s, 5m, 1h
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration::parse_seconds)]
    remedy_grace: Duration,
    /// Maximum number of remedies each second
    #[arg(long, value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    remedy_rate: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ModeArg {
    /// Nothing
    Off,
    /// Only report what would be destroyed
    DryRun,
    /// Destroy the socket
    Destroy,
}

impl RemedyArgs {
    pub(super) fn destroys(&self) -> bool {
        self.remedy == ModeArg::Destroy
    }

    /// True if a rule is about the command line.
    pub(super) fn needs_cmdline(&self) -> bool {
        self.remedy_only.iter().chain(&self.remedy_except).any(Rule::is_about_cmdline)
    }

    /// Creates the remedy, if one is requested. Limitations of the remedy are added to those of the host.
    ///
    /// # Errors
    /// If `--remedy destroy` is requested and sockets cannot be destroyed on this host.
    pub(super) fn prepare(&self, host: &mut KernelFeatures) -> Result<Option<Remedy>> {
        let mode = match self.remedy {
            ModeArg::Off => return Ok(None),
            ModeArg::DryRun => RemedyMode::DryRun,
            ModeArg::Destroy => RemedyMode::Destroy,
        };
        let can_find = match host.offsets[Field::NetnsInum as usize] {
            ABSENT => {
                Err("the kernel has no usable BTF, which is needed to find the network namespace of a socket"
                    .into())
            }
            _ => Ok(()),
        };
        if let Err(why) = can_find.and_then(|()| sockets::can_destroy()) {
            if mode == RemedyMode::Destroy {
                bail!("--remedy destroy: {why}");
            }
            host.limitations.push(format!("--remedy destroy would fail: {why}"));
        }
        if let Err(why) = sockets::can_enter() {
            host.limitations
                .push(format!("--remedy works only in the daemon's own network namespace: {why}"));
        }
        for rule in &self.remedy_except {
            if let Some(warning) = rule.warning_of_exception() {
                log::warn!("--remedy-except {rule}: {warning}");
            }
        }
        let selection = Selection { only: self.remedy_only.clone(), except: self.remedy_except.clone() };
        let grace_ns = u64::try_from(self.remedy_grace.as_nanos()).unwrap_or(u64::MAX);
        Ok(Some(Remedy::new(RemedyPolicy { mode, selection, grace_ns, rate: self.remedy_rate })))
    }
}
