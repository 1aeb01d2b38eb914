//! The options of the remedy, and whether it can work here.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use selfconn_ebpf::{ABSENT, Field};

use crate::{
    filter::{Rule, Selection},
    kernel::host::Host,
    remedy::{Mode, Policy, Remedy},
    sockets,
};

/// What to do about a self-connection.
#[derive(Debug, clap::Args)]
pub(super) struct RemedyArgs {
    /// What to do about a self-connection
    #[arg(long, value_enum, value_name = "MODE", default_value_t = ModeArg::Off)]
    remedy: ModeArg,
    /// Only if this field of it matches, such as comm=java* or port=8080; may be repeated
    #[arg(long, value_name = "KEY=GLOB", requires = "remedy")]
    remedy_only: Vec<Rule>,
    /// Never if this field of it matches, or is unknown; may be repeated, and wins
    #[arg(long, value_name = "KEY=GLOB", requires = "remedy")]
    remedy_except: Vec<Rule>,
    /// Only if it has lived as long: 500ms, 30s, 5m, 1h
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = time)]
    remedy_grace: Duration,
    /// How many a second at most
    #[arg(long, value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    remedy_rate: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ModeArg {
    /// Nothing
    Off,
    /// Say what would be destroyed
    DryRun,
    /// Destroy its socket
    Destroy,
}

impl RemedyArgs {
    pub(super) fn destroys(&self) -> bool {
        self.remedy == ModeArg::Destroy
    }

    /// The remedy, if one is wanted; what it can't do here goes to what the host can't.
    ///
    /// # Errors
    /// When it is to destroy, and can't at all.
    pub(super) fn prepare(&self, host: &mut Host) -> Result<Option<Remedy>> {
        let mode = match self.remedy {
            ModeArg::Off => return Ok(None),
            ModeArg::DryRun => Mode::DryRun,
            ModeArg::Destroy => Mode::Destroy,
        };
        let can_find = match host.offsets[Field::NetnsInum as usize] {
            ABSENT => {
                Err("the kernel has no usable BTF, which it takes to know a socket's network namespace"
                    .into())
            }
            _ => Ok(()),
        };
        if let Err(why) = can_find.and_then(|()| sockets::can_destroy()) {
            if mode == Mode::Destroy {
                bail!("--remedy destroy: {why}");
            }
            host.lacks.push(format!("--remedy destroy would fail: {why}"));
        }
        if let Err(why) = sockets::can_enter() {
            host.lacks.push(format!("nothing is remedied but in the daemon's own network namespace: {why}"));
        }
        let selection = Selection { only: self.remedy_only.clone(), except: self.remedy_except.clone() };
        let grace_ns = u64::try_from(self.remedy_grace.as_nanos()).unwrap_or(u64::MAX);
        Ok(Some(Remedy::new(Policy { mode, selection, grace_ns, rate: self.remedy_rate })))
    }
}

/// A number and its unit; without one, seconds.
fn time(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    let number: u64 = digits.parse().map_err(|_| "not a time such as 500ms, 30s, 5m or 1h".to_owned())?;
    let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3_600),
        _ => return Err(format!("no unit {unit}: it is one of ms, s, m, h")),
    }
    .ok_or_else(|| "too long".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_number_and_its_unit() {
        for (text, ms) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("7", Some(7_000)),
            ("500ms", Some(500)),
            ("30s", Some(30_000)),
            ("5m", Some(300_000)),
            ("1h", Some(3_600_000)),
            ("", None),
            ("s", None),
            ("-1s", None),
            ("1.5s", None),
            ("1d", None),
            ("1 s", None),
            ("99999999999999999999", None),
            ("18446744073709551615h", None),
        ] {
            assert_eq!(time(text).ok().map(|time| time.as_millis()), ms, "{text}");
        }
    }
}
