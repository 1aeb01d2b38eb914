//! Who: facts about a process from `/proc`, taken only when it is still the process that the kernel saw.

use std::fs;

/// Kernel clock ticks a second as `/proc` has them: `USER_HZ`, a constant of the ABI on all of aya's architectures.
const TICKS_PER_SECOND: u64 = 100;
const TICK_NS: u64 = 1_000_000_000 / TICKS_PER_SECOND;

/// The process's name, if `pid` is still the process that started at `start_ns`; the kernel's boot-time clock.
#[must_use]
pub fn name(pid: u32, start_ns: u64) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, start_ticks) = parse_stat(&stat)?;
    (start_ns != 0 && start_ticks == start_ns / TICK_NS).then(|| name.to_owned())
}

/// Name and start, in clock ticks since boot, from the text of `/proc/PID/stat`. The name may hold anything, blanks
/// and parentheses included, so it ends at the last one.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    let start = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().nth(19)?;
    Some((name, start.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let rest = "S 1 2 2 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0";
        for name in ["sh", "a b", "(sd-pam)", ") 1 2 (", "", "a) S 1"] {
            assert_eq!(parse_stat(&format!("42 ({name}) {rest}")), Some((name, 4711)), "{name:?}");
        }
        for broken in ["", "42", "42 (", "42 )(", "42 (sh) S 1"] {
            assert_eq!(parse_stat(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_pid_that_somebody_else_has_now_has_no_name() {
        let pid = std::process::id();
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (comm, start) = parse_stat(&stat).unwrap();
        assert_eq!(name(pid, start * TICK_NS).as_deref(), Some(comm));
        assert_eq!(name(pid, (start + 1) * TICK_NS), None);
        assert_eq!(name(pid, 0), None);
    }
}
