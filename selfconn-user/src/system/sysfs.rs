//! Finds out if the kernel lacks something below /sys, or a mount hides it from this process.

use std::path::Path;

use rustix::fs::{FsWord, statfs};

/// The type of the file system (include/uapi/linux/magic.h at v5.10).
const SYSFS_MAGIC: FsWord = 0x6265_6572;

/// What to do about a mount that hides a part of sysfs.
pub const MASKED_HINT: &str = "unmount what covers it, or run where the host's sysfs is mounted on /sys";

/// Why this path of sysfs is not visible here although the kernel may have it. `None`: nothing hides it.
#[must_use]
pub fn masked(path: &str) -> Option<String> {
    // The first that exists: a mount that covers it, or one of the directories above it.
    let visible = Path::new(path).ancestors().find_map(|at| Some((at, statfs(at).ok()?.f_type)));
    match visible {
        Some((_, SYSFS_MAGIC)) | None => None,
        Some((at, _)) if Path::new("/sys").starts_with(at) => {
            Some("masked: sysfs is not mounted on /sys here".to_owned())
        }
        Some((at, _)) => {
            let at = at.display();
            Some(format!("masked: something that is not of the kernel is mounted on {at} here"))
        }
    }
}

/// Why this path of sysfs does not exist: that it is masked, or else `absent`.
#[must_use]
pub fn why_missing(path: &str, absent: &str) -> String {
    masked(path).unwrap_or_else(|| absent.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sysfs_lacks_is_not_masked() {
        assert_eq!(masked("/sys/kernel"), None);
        assert_eq!(why_missing("/sys/kernel/no-such-thing/at-all", "absent"), "absent");
        // procfs stands for a mount over a part of sysfs.
        assert!(masked("/proc/self/no-such-thing").unwrap().contains("mounted on /proc/self here"));
        assert_eq!(masked("/no-such-thing").unwrap(), "masked: sysfs is not mounted on /sys here");
    }
}
