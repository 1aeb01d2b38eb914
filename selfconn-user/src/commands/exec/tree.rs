//! Whose a process is, where there can be no control group: the command's, if one of its ancestors is this process.

use std::{fs, io, process};

use rustix::process::{getpid, set_child_subreaper};

/// The longest chain of ancestors that is followed.
const MAX_ANCESTORS: usize = 64;

/// What this way can miss.
pub(super) fn limits(why: Option<&str>) -> String {
    format!(
        "only processes that could still be asked for their parents are known as the command's ({})",
        why.unwrap_or("there is no control group")
    )
}

/// Makes orphans among the descendants children of this process, so that their ancestors still lead to it.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn adopt_orphans() -> io::Result<()> {
    Ok(set_child_subreaper(Some(getpid()))?)
}

/// True if one of the ancestors of a process is this process. `None`: the process has exited.
pub(super) fn is_ours(pid: u32) -> Option<bool> {
    let mut pid = pid;
    for _ in 0..MAX_ANCESTORS {
        if pid == process::id() {
            return Some(true);
        }
        match parent(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)? {
            0 => return Some(false),
            parent => pid = parent,
        }
    }
    Some(false)
}

/// The fourth field of proc(5), behind the name, which may contain anything.
fn parent(stat: &str) -> Option<u32> {
    stat.get(stat.rfind(')')? + 1..)?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_hide_the_parent() {
        assert_eq!(parent("7 (a) R 1 (b)) S 42 7 7 0 -1"), Some(42));
        assert_eq!(parent("7 (a"), None);
        assert_eq!(is_ours(process::id()), Some(true));
        assert_eq!(is_ours(1), Some(false));
    }
}
