//! `/proc/PID/stat`: name and start time of a process, and the program that it runs.

use std::{fs, io};

use super::{lossy, read_file};

/// What is used of `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) comm: String,
    /// Start time in clock ticks since boot.
    pub(super) start_ticks: u64,
    /// Where the process has its arguments. 0 without the right to trace the process (`do_task_stat`,
    /// fs/proc/array.c at v5.10).
    pub(super) arg_start: u64,
}

/// `folder` is [`memory_folder`] of the process: the first thread of a process has no arguments once it has ended.
pub(super) fn read_stat(pid: u32, folder: &str) -> Option<Stat> {
    let first = parse_stat(&lossy(&read_file(&format!("/proc/{pid}/stat")).ok()?))?;
    if first.arg_start != 0 {
        return Some(first);
    }
    let of_thread = read_file(&format!("{folder}/stat")).ok().and_then(|text| parse_stat(&lossy(&text)));
    Some(Stat { arg_start: of_thread.map_or(0, |stat| stat.arg_start), ..first })
}

/// The folder of a thread that has the memory of the process. That is the first thread, whose folder is that of the
/// process, or another one if the first thread has ended.
pub(super) fn memory_folder(pid: u32) -> String {
    let process = format!("/proc/{pid}");
    // A process whose first thread has ended has no `exe` here (`proc_exe_link`, fs/proc/base.c at v6.12).
    if fs::read_link(format!("{process}/exe")).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        && let Ok(threads) = fs::read_dir(format!("{process}/task"))
    {
        let threads = threads.flatten().filter_map(|thread| thread.file_name().into_string().ok());
        let folders = threads.map(|thread| format!("{process}/task/{thread}"));
        if let Some(folder) =
            folders.take(MAX_THREADS_TRIED).find(|folder| fs::read_link(format!("{folder}/exe")).is_ok())
        {
            return folder;
        }
    }
    process
}

/// Only threads that have just ended have no memory, besides the first one and those of the kernel.
const MAX_THREADS_TRIED: usize = 8;

/// The start time in the text of a `/proc/PID/stat`, in clock ticks since boot.
#[must_use]
pub fn start_ticks_in_stat(stat: &[u8]) -> Option<u64> {
    parse_stat(&lossy(stat)).map(|stat| stat.start_ticks)
}

/// Parses the text of `/proc/PID/stat`. The name may contain any character, including blanks and parentheses. It
/// therefore ends at the last closing parenthesis.
fn parse_stat(stat: &str) -> Option<Stat> {
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    // The first field after the name is number 3 in proc(5), and these are 22 and 48.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let start_ticks = fields.nth(22 - 3)?.parse().ok()?;
    let arg_start = fields.nth(48 - 22 - 1).and_then(|field| field.parse().ok()).unwrap_or(0);
    Some(Stat { comm: name.to_owned(), start_ticks, arg_start })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_contain_any_character() {
        let rest = "S 1 2 2 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0";
        for name in ["sh", "a b", "(sd-pam)", ") 1 2 (", "", "a) S 1", "\n{\"event\":\"fake\"}"] {
            let stat = Stat { comm: name.to_owned(), start_ticks: 4_711, arg_start: 0 };
            assert_eq!(parse_stat(&format!("42 ({name}) {rest}")).as_ref(), Some(&stat), "{name:?}");
            // Up to field 47, then arg_start, arg_end, env_start, env_end and exit_code.
            let rest = format!("{rest}{} 140721 5 6 7 0\n", " 9".repeat(47 - 24));
            let stat = Stat { arg_start: 140_721, ..stat };
            assert_eq!(parse_stat(&format!("42 ({name}) {rest}")), Some(stat), "{name:?}");
        }
        for broken in ["", "42", "42 (", "42 )(", "42 (sh) S 1"] {
            assert_eq!(parse_stat(broken), None, "{broken:?}");
        }
    }
}
