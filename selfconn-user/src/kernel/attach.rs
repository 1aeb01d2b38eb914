//! Which programs to attach, as data: the methods of each hook, the pairs worth having in order, and what a refusal
//! means. Pure but for the attempts it is handed, so every decision is tested without a kernel.

use std::fmt;

use selfconn_ebpf::names;

/// Where in the kernel a transition is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// The tracepoint `sock:inet_sock_set_state`.
    InetSockSetState,
    /// The function `tcp_set_state`.
    TcpSetState,
}

impl Hook {
    /// Both hooks, in the order they are told.
    pub const ALL: [Self; 2] = [Self::InetSockSetState, Self::TcpSetState];

    /// The kernel's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InetSockSetState => "inet_sock_set_state",
            Self::TcpSetState => "tcp_set_state",
        }
    }

    /// The methods of this hook, in the order of preference.
    #[must_use]
    pub const fn candidates(self) -> &'static [Method] {
        match self {
            Self::InetSockSetState => &[Method::TpBtf, Method::Perf],
            Self::TcpSetState => &[Method::Fentry, Method::Kprobe],
        }
    }
}

/// How a program is attached to its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// BTF-typed raw tracepoint.
    TpBtf,
    /// Tracepoint through a perf event.
    Perf,
    /// Trampoline at the function's entry.
    Fentry,
    /// Breakpoint or ftrace probe at the function's entry.
    Kprobe,
}

impl Method {
    /// Every method, in the order of [`names::PROGRAMS`].
    pub const ALL: [Self; 4] = [Self::TpBtf, Self::Perf, Self::Fentry, Self::Kprobe];

    /// As events, options and metrics have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
            Self::Perf => "perf",
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
        }
    }

    /// The hook that it is a method of.
    #[must_use]
    pub const fn hook(self) -> Hook {
        match self {
            Self::TpBtf | Self::Perf => Hook::InetSockSetState,
            Self::Fentry | Self::Kprobe => Hook::TcpSetState,
        }
    }

    /// The program that implements it, where a socket's addresses are where [`selfconn_ebpf::USUAL`] has them, or not.
    #[must_use]
    pub const fn program(self, is_usual: bool) -> &'static str {
        match self {
            Self::TpBtf if is_usual => names::TP_BTF,
            Self::TpBtf => names::TP_BTF_ANY,
            Self::Perf => names::PERF,
            Self::Fentry if is_usual => names::FENTRY,
            Self::Fentry => names::FENTRY_ANY,
            Self::Kprobe if is_usual => names::KPROBE,
            Self::Kprobe => names::KPROBE_ANY,
        }
    }

    /// What keeps a program from running inside itself, and so loses transitions: programs with [`Guard::Shared`] also
    /// stand aside for every other agent's kprobe, tracepoint and perf event programs on the same CPU
    /// (`trace_call_bpf`, `kernel/trace/bpf_trace.c` at v6.12).
    #[must_use]
    pub const fn guard(self) -> Guard {
        match self {
            Self::TpBtf | Self::Fentry => Guard::Own,
            Self::Perf | Self::Kprobe => Guard::Shared,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// See [`Method::guard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// One counter for each program and CPU.
    Own,
    /// One counter for each CPU.
    Shared,
}

/// Two witnesses lose nothing together as long as they don't share a guard: what interrupts or preempts one doesn't
/// stop the other. One that can't be preempted comes before two that can, both hooks before both methods of one;
/// ARCHITECTURE.md has the measurements. The last pair shares a guard, and is for those who ask for just that.
const PAIRS: [[Method; 2]; 6] = [
    [Method::TpBtf, Method::Kprobe],
    [Method::Fentry, Method::Perf],
    [Method::TpBtf, Method::Perf],
    [Method::Fentry, Method::Kprobe],
    [Method::TpBtf, Method::Fentry],
    [Method::Perf, Method::Kprobe],
];

/// Where no pair is to be had. The non-preemptible methods lose least on kernels from v7.1 on, but read no kernel
/// memory under lockdown=confidentiality; by then they are refused, and the others are next.
const SINGLES: [Method; 4] = [Method::TpBtf, Method::Fentry, Method::Perf, Method::Kprobe];

/// Why a method is not live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// This kernel doesn't have it.
    Unsupported(String),
    /// This kernel has it, and its policy refuses it to a process with every capability it asks for.
    Refused(String),
    /// This process lacks a capability. No other method would fare better.
    Denied(String),
    /// Our program was refused by a kernel that has all it needs: a bug of ours.
    Broken(String),
    /// Not asked for.
    NotWanted,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(why) => write!(f, "unsupported: {why}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Denied(why) => write!(f, "denied: {why}"),
            Self::Broken(why) => write!(f, "broken: {why}"),
            Self::NotWanted => write!(f, "not wanted"),
        }
    }
}

/// Which hooks to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hooks {
    /// Whatever loads.
    #[default]
    Auto,
    /// Both, or fail.
    Both,
    /// `inet_sock_set_state` only.
    Tracepoint,
    /// `tcp_set_state` only.
    Function,
}

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Which hooks.
    pub hooks: Hooks,
    /// The one method for `inet_sock_set_state`; `None`: any.
    pub tracepoint: Option<Method>,
    /// The one method for `tcp_set_state`; `None`: any.
    pub function: Option<Method>,
}

impl Wanted {
    fn allows(self, method: Method) -> bool {
        let (hook, forced) = match method.hook() {
            Hook::InetSockSetState => (self.hooks != Hooks::Function, self.tracepoint),
            Hook::TcpSetState => (self.hooks != Hooks::Tracepoint, self.function),
        };
        hook && forced.is_none_or(|forced| forced == method)
    }

    /// Whether nothing but both of these will do.
    fn demands(self, pair: [Method; 2]) -> bool {
        let is_forced = |method| self.tracepoint == Some(method) || self.function == Some(method);
        self.hooks == Hooks::Both || pair.into_iter().all(is_forced)
    }

    /// Whether this pair may be chosen.
    fn allows_pair(self, pair: [Method; 2]) -> bool {
        let share_a_guard = pair.iter().all(|method| method.guard() == Guard::Shared);
        let one_hook = pair[0].hook() == pair[1].hook();
        (!share_a_guard || self.demands(pair)) && !(one_hook && self.hooks == Hooks::Both)
    }
}

/// What became of the attempts.
#[derive(Debug)]
pub struct Choice<T> {
    /// The live methods.
    pub live: Vec<(Method, T)>,
    /// Every other method that was tried, and why it isn't live.
    pub refused: Vec<(Method, Refusal)>,
}

impl<T> Choice<T> {
    /// Why the methods of a hook that were tried aren't live.
    pub fn refused_of(&self, hook: Hook) -> impl Iterator<Item = &(Method, Refusal)> {
        self.refused.iter().filter(move |(method, _)| method.hook() == hook)
    }

    /// The live methods of a hook.
    pub fn live_of(&self, hook: Hook) -> impl Iterator<Item = Method> {
        self.live.iter().map(|(method, _)| *method).filter(move |method| method.hook() == hook)
    }

    /// Whether this is what was asked for; `Err` is what is missing.
    ///
    /// # Errors
    /// When nothing is live, a forced method isn't, or `both` hooks were asked for and one is dead.
    pub fn satisfies(&self, wanted: Wanted) -> Result<(), String> {
        let reasons = |hook: Option<Hook>| {
            let of = |method: Method| hook.is_none_or(|hook| hook == method.hook());
            let told =
                |(method, why): &(Method, Refusal)| format!("{}: {method} {why}", method.hook().name());
            let reasons: Vec<_> = self
                .refused
                .iter()
                .filter(|(method, why)| of(*method) && *why != Refusal::NotWanted)
                .map(told)
                .collect();
            if reasons.is_empty() { "no method was tried".to_owned() } else { reasons.join("; ") }
        };
        for (hook, forced) in
            [(Hook::InetSockSetState, wanted.tracepoint), (Hook::TcpSetState, wanted.function)]
        {
            if let Some(forced) = forced
                && wanted.allows(forced)
                && !self.live_of(hook).any(|method| method == forced)
            {
                return Err(format!("{} cannot be attached ({})", forced.name(), reasons(Some(hook))));
            }
            if wanted.hooks == Hooks::Both && self.live_of(hook).next().is_none() {
                return Err(format!("{} cannot be attached ({})", hook.name(), reasons(Some(hook))));
            }
        }
        if self.live.is_empty() {
            return Err(format!("no hook can be attached ({})", reasons(None)));
        }
        Ok(())
    }
}

/// Attaches the first pair that is allowed and loads, else the first method that does.
///
/// `attempt` loads and attaches one method, and is called at most once for each. A method that was attached for a pair
/// which then didn't come about is dropped, and so detached. After a [`Refusal::Denied`] nothing more is tried.
pub fn choose<T>(wanted: Wanted, mut attempt: impl FnMut(Method) -> Result<T, Refusal>) -> Choice<T> {
    let mut tried: Vec<(Method, Result<T, Refusal>)> = Vec::new();
    let mut is_denied = false;
    let mut attached = |method: Method, tried: &mut Vec<(Method, Result<T, Refusal>)>| {
        if !wanted.allows(method) {
            return false;
        }
        if let Some((_, outcome)) = tried.iter().find(|(known, _)| *known == method) {
            return outcome.is_ok();
        }
        if is_denied {
            return false;
        }
        let outcome = attempt(method);
        is_denied = matches!(outcome, Err(Refusal::Denied(_)));
        tried.push((method, outcome));
        tried.last().is_some_and(|(_, outcome)| outcome.is_ok())
    };
    let pair = PAIRS
        .iter()
        .filter(|pair| wanted.allows_pair(**pair))
        .find(|pair| pair.iter().all(|method| attached(*method, &mut tried)));
    let chosen: Vec<Method> = match pair {
        Some(pair) => pair.to_vec(),
        None => SINGLES.into_iter().find(|method| attached(*method, &mut tried)).into_iter().collect(),
    };
    // A hook left without a method says why for each of its methods, tried or not so far.
    for hook in Hook::ALL {
        if !chosen.iter().any(|method| method.hook() == hook) {
            for method in hook.candidates() {
                attached(*method, &mut tried);
            }
        }
    }
    let mut choice = Choice { live: Vec::new(), refused: Vec::new() };
    for (method, outcome) in tried {
        match outcome {
            Ok(link) if chosen.contains(&method) => choice.live.push((method, link)),
            // Loads, but a better pair was found, or it would share a guard with the other.
            Ok(_) => {}
            Err(why) => choice.refused.push((method, why)),
        }
    }
    for method in Method::ALL.into_iter().filter(|method| !wanted.allows(*method)) {
        choice.refused.push((method, Refusal::NotWanted));
    }
    choice.live.sort_by_key(|(method, _)| *method);
    choice.refused.sort_by_key(|(method, _)| *method);
    choice
}

#[cfg(test)]
mod tests {
    use super::*;
    use Method::*;

    const ANY: Wanted = Wanted { hooks: Hooks::Auto, tracepoint: None, function: None };

    fn loads(these: &[Method]) -> impl FnMut(Method) -> Result<Method, Refusal> + '_ {
        |method| {
            if these.contains(&method) { Ok(method) } else { Err(Refusal::Unsupported("not here".into())) }
        }
    }

    fn live(choice: &Choice<Method>) -> Vec<Method> {
        choice.live.iter().map(|(method, _)| *method).collect()
    }

    #[test]
    fn the_default_pair_never_shares_a_guard() {
        for bits in 0..16_u32 {
            let these: Vec<_> = Method::ALL.into_iter().filter(|m| bits & 1 << *m as u32 != 0).collect();
            let live = live(&choose(ANY, loads(&these)));
            let shared =
                |these: &[Method]| these.iter().filter(|method| method.guard() == Guard::Shared).count();
            assert!(shared(&live) <= 1, "{these:?} gave {live:?}");
            let disjoint = these.len() - shared(&these).saturating_sub(1);
            assert_eq!(live.len(), disjoint.min(2), "{these:?} gave {live:?}");
        }
    }

    #[test]
    fn both_hooks_are_preferred_to_both_methods_of_one() {
        for (these, expected) in [
            (&[TpBtf, Perf, Fentry, Kprobe][..], &[TpBtf, Kprobe][..]),
            (&[TpBtf, Perf, Kprobe], &[TpBtf, Kprobe]),
            (&[TpBtf, Perf, Fentry], &[Perf, Fentry]),
            (&[TpBtf, Perf], &[TpBtf, Perf]),
            (&[Fentry, Kprobe], &[Fentry, Kprobe]),
            (&[TpBtf, Fentry], &[TpBtf, Fentry]),
            (&[Perf, Kprobe], &[Perf]),
            (&[Kprobe], &[Kprobe]),
            (&[], &[]),
        ] {
            assert_eq!(live(&choose(ANY, loads(these))), expected, "{these:?}");
        }
    }

    #[test]
    fn a_hook_without_a_method_tells_the_reason_of_each() {
        let choice = choose(ANY, loads(&[TpBtf, Perf]));
        assert_eq!(choice.refused_of(Hook::TcpSetState).count(), 2);
        assert_eq!(choice.refused_of(Hook::InetSockSetState).count(), 0);
    }

    #[test]
    fn a_missing_capability_stops_the_search() {
        let mut attempts = 0;
        let choice: Choice<()> = choose(ANY, |_| {
            attempts += 1;
            Err(Refusal::Denied("CAP_BPF".into()))
        });
        assert_eq!(attempts, 1);
        assert!(choice.satisfies(ANY).unwrap_err().contains("CAP_BPF"));
    }

    #[test]
    fn no_method_is_attempted_twice_nor_unasked() {
        let mut attempts = Vec::new();
        let wanted = Wanted { hooks: Hooks::Tracepoint, ..ANY };
        let _ = choose::<()>(wanted, |method| {
            attempts.push(method);
            Err(Refusal::Unsupported(String::new()))
        });
        assert_eq!(attempts, [TpBtf, Perf]);
    }

    #[test]
    fn what_was_forced_and_is_not_live_is_an_error() {
        let all = [TpBtf, Perf, Fentry, Kprobe];
        let forced = |tracepoint, function| Wanted { hooks: Hooks::Auto, tracepoint, function };
        for (wanted, these, expected) in [
            (forced(Some(Perf), None), &all[..], Ok(&[Perf, Fentry][..])),
            (forced(Some(TpBtf), Some(Fentry)), &all, Ok(&[TpBtf, Fentry])),
            (forced(Some(Perf), Some(Kprobe)), &all, Ok(&[Perf, Kprobe])),
            (forced(Some(TpBtf), None), &[Perf, Kprobe], Err("tp_btf cannot be attached")),
            (Wanted { hooks: Hooks::Both, ..ANY }, &[TpBtf, Perf], Err("tcp_set_state cannot be attached")),
            (Wanted { hooks: Hooks::Both, ..ANY }, &all, Ok(&[TpBtf, Kprobe])),
            (Wanted { hooks: Hooks::Both, ..ANY }, &[Perf, Kprobe], Ok(&[Perf, Kprobe])),
            (Wanted { hooks: Hooks::Function, ..ANY }, &all, Ok(&[Fentry, Kprobe])),
            (Wanted { hooks: Hooks::Function, ..ANY }, &[TpBtf], Err("no hook can be attached")),
        ] {
            let choice = choose(wanted, loads(these));
            match (choice.satisfies(wanted), expected) {
                (Ok(()), Ok(methods)) => assert_eq!(live(&choice), methods, "{wanted:?}"),
                (Err(why), Err(says)) => assert!(why.contains(says), "{why}"),
                (got, _) => panic!("{wanted:?} on {these:?}: {got:?}, live {:?}", live(&choice)),
            }
        }
    }
}
