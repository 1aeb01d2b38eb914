//! The methods that detect a failed TCP bind, as data: what the user can ask for, and what was attached.

use selfconn_ebpf::names;

use super::refusal::Refusal;

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

    /// The names of its programs.
    #[must_use]
    pub const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Fexit => &[names::BIND_FEXIT],
            Self::Perf => &[names::BIND_ENTER, names::BIND_EXIT],
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

impl BindChoice {
    /// The choice among the outcomes of all methods.
    #[must_use]
    pub fn of(outcomes: &[(BindMethod, Result<(), Refusal>)]) -> Self {
        let live = outcomes.iter().find(|(_, outcome)| outcome.is_ok()).map(|(method, _)| *method);
        let refused = |(method, outcome): &(BindMethod, Result<(), Refusal>)| {
            outcome.clone().err().map(|why| (*method, why))
        };
        Self { live, refused: outcomes.iter().filter_map(refused).collect() }
    }

    /// What is missed if no method is attached, as text for people. `None`: one is, or none was asked for.
    #[must_use]
    pub fn limit(&self) -> Option<String> {
        let is_missed = self.live.is_none() && !self.refused.is_empty();
        is_missed.then(|| "failed binds are not observed, so `blocked` is not reported".to_owned())
    }

    /// Checks that the user's request is met; the error says why not.
    ///
    /// # Errors
    /// If the requested method is not attached.
    pub fn satisfies(&self, requested: RequestedBindMethod) -> Result<(), String> {
        match requested {
            RequestedBindMethod::Only(method) if self.live != Some(method) => {
                let reason = self.refused.iter().find(|(refused, _)| *refused == method);
                let reason = reason.map_or("it was not tried".to_owned(), |(_, why)| why.to_string());
                Err(format!(
                    "failed binds cannot be observed by {} ({reason}); without --bind-method another is tried",
                    method.name()
                ))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_no_method_is_attached_is_a_limit_unless_none_was_asked_for() {
        let no = |method| (method, Err(Refusal::Unsupported("too old".to_owned())));
        let limit = "failed binds are not observed, so `blocked` is not reported";
        for (outcomes, live, refused, expected) in [
            (vec![no(BindMethod::Fexit), no(BindMethod::Perf)], None, 2, Some(limit)),
            (vec![no(BindMethod::Fexit), (BindMethod::Perf, Ok(()))], Some(BindMethod::Perf), 1, None),
            (vec![(BindMethod::Fexit, Ok(())), no(BindMethod::Perf)], Some(BindMethod::Fexit), 1, None),
            (vec![], None, 0, None),
        ] {
            let choice = BindChoice::of(&outcomes);
            assert_eq!((choice.live, choice.refused.len()), (live, refused), "{outcomes:?}");
            assert_eq!(choice.limit().as_deref(), expected, "{outcomes:?}");
        }
    }

    #[test]
    fn only_a_method_that_was_named_must_be_attached() {
        let refused = || vec![(BindMethod::Fexit, Refusal::Unsupported("too old".to_owned()))];
        let by_perf = BindChoice { live: Some(BindMethod::Perf), refused: refused() };
        let by_none = BindChoice { live: None, refused: refused() };
        for (choice, requested, error) in [
            (&by_perf, RequestedBindMethod::Auto, None),
            (&by_perf, RequestedBindMethod::Only(BindMethod::Perf), None),
            (&by_none, RequestedBindMethod::Auto, None),
            (&by_none, RequestedBindMethod::Off, None),
            (
                &by_none,
                RequestedBindMethod::Only(BindMethod::Fexit),
                Some(
                    "failed binds cannot be observed by fexit (unsupported: too old); without --bind-method another \
                     is tried",
                ),
            ),
        ] {
            assert_eq!(choice.satisfies(requested).err().as_deref(), error, "{choice:?} {requested:?}");
        }
    }
}
