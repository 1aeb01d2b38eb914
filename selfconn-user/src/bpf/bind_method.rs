//! The methods that detect a failed TCP bind, as data: what the user can ask for, and what was attached.

use super::attach::Refusal;

/// A method that detects a failed bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindMethod {
    /// The return of `inet_csk_get_port`, which every bind of a TCP socket calls. Other sockets have no
    /// overhead.
    Fexit,
    /// The system call `bind`, of sockets of any protocol.
    Perf,
}

impl BindMethod {
    /// All methods, in the order of preference.
    pub const ALL: [Self; 2] = [Self::Fexit, Self::Perf];

    /// The name in events and options.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fexit => "fexit",
            Self::Perf => "perf",
        }
    }

    /// The help of the option.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::Fexit => "By fexit on inet_csk_get_port",
            Self::Perf => "By the tracepoint of the system call bind",
        }
    }
}

/// The methods that may be tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestedBindMethod {
    /// The first method that can be attached.
    #[default]
    Auto,
    /// Only this method.
    Only(BindMethod),
    /// No method: failed binds are not detected.
    Off,
}

/// The result of the attempts to attach.
#[derive(Debug, Default)]
pub struct BindChoice {
    /// The attached method.
    pub live: Option<BindMethod>,
    /// The methods that were tried and are not attached, with the reasons.
    pub refused: Vec<(BindMethod, Refusal)>,
}
