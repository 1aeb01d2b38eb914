//! The reasons why the kernel refuses a program, and the classification of its errors.

use std::{fmt, io};

use aya::programs::ProgramError;
use rustix::io::Errno;

/// The reason why a method is not attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// This kernel does not have the method.
    Unsupported(String),
    /// This kernel has the method, but its policy refuses it although the process has every required
    /// capability.
    Refused(String),
    /// This process lacks a capability. Every other method would fail for the same reason.
    Denied(String),
    /// The kernel has everything that the program needs and refuses the program: a bug in this project.
    Broken(String),
    /// The user did not ask for this method.
    NotRequested,
}

impl Refusal {
    /// The kind of refusal in one word.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Unsupported(_) => "unsupported",
            Self::Refused(_) => "refused",
            Self::Denied(_) => "denied",
            Self::Broken(_) => "broken",
            Self::NotRequested => "not wanted",
        }
    }

    /// The reason as text for people. `None`: the user did not ask for the method.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Unsupported(why) | Self::Refused(why) | Self::Denied(why) | Self::Broken(why) => Some(why),
            Self::NotRequested => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        self.reason().map_or(Ok(()), |why| write!(f, ": {why}"))
    }
}

/// Classifies an error by its errno and by whether the verifier wrote a log. The required capabilities have
/// already been checked: see [`super::features::KernelFeatures::check_method`].
pub(crate) fn refusal(error: &ProgramError) -> Refusal {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            log::debug!("the verifier's log: {log}");
            // The last lines have the verifier's counts.
            const COUNTS: [&str; 3] = ["processed ", "stack depth ", "verification time "];
            let is_message = |line: &&str| {
                !line.trim().is_empty() && !COUNTS.iter().any(|counts| line.starts_with(counts))
            };
            match log.lines().rfind(is_message) {
                Some(last) => Refusal::Broken(format!("{io_error}; the verifier reported: {last}")),
                None => refusal_by_errno("BPF_PROG_LOAD", io_error),
            }
        }
        ProgramError::SyscallError(error) => refusal_by_errno(error.call, &error.io_error),
        ProgramError::TracePointError(_) | ProgramError::KProbeError(_) | ProgramError::Btf(_) => {
            Refusal::Unsupported(error.to_string())
        }
        _ => Refusal::Broken(error.to_string()),
    }
}

/// `ENOTSUPP` has no text in user space. A kernel without trampolines for its architecture returns it
/// (`arch_prepare_bpf_trampoline`, kernel/bpf/trampoline.c at v5.10).
fn not_supported(call: &str, architecture: &str) -> String {
    let since =
        if architecture == "aarch64" { ": on arm64, programs on functions need Linux 6.4" } else { "" };
    format!("{call}: this kernel does not support it on {architecture}{since}")
}

/// Classifies an error by its errno.
pub(crate) fn refusal_by_errno(call: &str, error: &io::Error) -> Refusal {
    /// From `include/linux/errno.h`; it is not an errno of user space.
    const ENOTSUPP: i32 = 524;
    let why = format!("{call}: {error}");
    let errno = error.raw_os_error().unwrap_or(0);
    if errno == ENOTSUPP {
        return Refusal::Unsupported(not_supported(call, std::env::consts::ARCH));
    }
    match Errno::from_raw_os_error(errno) {
        Errno::PERM | Errno::ACCESS => {
            Refusal::Refused(format!("{why}, though this process has every capability that it needs"))
        }
        Errno::INVAL | Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::TOOBIG => {
            Refusal::Unsupported(why)
        }
        _ => Refusal::Refused(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_user_space_has_no_text_for_is_a_sentence() {
        let refusal = refusal_by_errno("BPF_LINK_CREATE", &io::Error::from_raw_os_error(524));
        let Refusal::Unsupported(why) = refusal else { panic!("{refusal:?}") };
        assert!(!why.contains("524"), "{why}");
        assert_eq!(
            not_supported("BPF_LINK_CREATE", "aarch64"),
            "BPF_LINK_CREATE: this kernel does not support it on aarch64: on arm64, programs on functions need Linux 6.4"
        );
    }
}
