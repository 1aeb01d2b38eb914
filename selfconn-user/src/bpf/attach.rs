//! Decides which programs to attach: the methods of each hook, the pairs of methods in the order of
//! preference, and the reasons why a method can be unavailable. Everything here is pure: the caller passes in
//! a function that attaches a method, so every decision is tested without a kernel.

use std::{env::consts::ARCH, fmt};

use selfconn_ebpf::names;

use super::refusal::Refusal;

/// The place in the kernel where a state transition is observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// The tracepoint `sock:inet_sock_set_state`.
    InetSockSetState,
    /// The function `tcp_set_state`.
    TcpSetState,
}

impl Hook {
    /// Both hooks, in the order in which they are reported.
    pub const ALL: [Self; 2] = [Self::InetSockSetState, Self::TcpSetState];

    /// The kernel's name of the hook.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InetSockSetState => "inet_sock_set_state",
            Self::TcpSetState => "tcp_set_state",
        }
    }

    /// The methods that attach to this hook, in the order of preference.
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

    /// The name in events, options and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
            Self::Perf => "perf",
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
        }
    }

    /// The hook that this method attaches to.
    #[must_use]
    pub const fn hook(self) -> Hook {
        match self {
            Self::TpBtf | Self::Perf => Hook::InetSockSetState,
            Self::Fentry | Self::Kprobe => Hook::TcpSetState,
        }
    }

    /// The name of the program that implements this method on this architecture, with static offsets or with
    /// offsets from BTF.
    #[must_use]
    pub const fn program(self, uses_static_offsets: bool) -> &'static str {
        match self {
            Self::TpBtf if uses_static_offsets => names::TP_BTF,
            Self::TpBtf => names::TP_BTF_OFFSETS,
            Self::Perf => names::PERF,
            Self::Fentry if uses_static_offsets => names::FENTRY,
            Self::Fentry => names::FENTRY_BTF_OFFSETS,
            Self::Kprobe => match names::kprobe(ARCH, uses_static_offsets) {
                Some(name) => name,
                // `KernelFeatures::check_method` refuses the method.
                None => "",
            },
        }
    }

    /// The kernel's protection that keeps a program from running inside itself. A program that it skips loses
    /// the transition. Programs with [`RecursionGuard::PerCpu`] are also skipped while a kprobe, tracepoint
    /// or perf event program of any other agent runs on the same CPU (`trace_call_bpf`,
    /// `kernel/trace/bpf_trace.c` at v6.12).
    #[must_use]
    pub const fn recursion_guard(self) -> RecursionGuard {
        match self {
            Self::TpBtf | Self::Fentry => RecursionGuard::PerProgram,
            Self::Perf | Self::Kprobe => RecursionGuard::PerCpu,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The scope of the kernel's recursion protection; see [`Method::recursion_guard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecursionGuard {
    /// One counter for each program on each CPU.
    PerProgram,
    /// One counter for each CPU, which all such programs of the host share.
    PerCpu,
}

/// The pairs of methods, in the order of preference. Two probes together lose nothing if they do not share a
/// recursion guard, because an interrupt or preemption that stops one probe does not stop the other.
///
/// A pair with one non-preemptible method comes before a pair with two preemptible ones. A pair on both hooks
/// comes before a pair of both methods of one hook. docs/internals.md has the measurements. The last pair
/// shares a guard; it is used only when the user asks for exactly these two methods or for both hooks.
const METHOD_PAIRS: [[Method; 2]; 6] = [
    [Method::TpBtf, Method::Kprobe],
    [Method::Fentry, Method::Perf],
    [Method::TpBtf, Method::Perf],
    [Method::Fentry, Method::Kprobe],
    [Method::TpBtf, Method::Fentry],
    [Method::Perf, Method::Kprobe],
];

/// The order of single methods, for kernels on which no pair can be attached. On kernels from v7.1 on the
/// non-preemptible methods lose least, but they cannot read kernel memory under lockdown=confidentiality. In
/// that case they have already been refused, and the other methods are tried next.
const SINGLE_METHODS: [Method; 4] = [Method::TpBtf, Method::Fentry, Method::Perf, Method::Kprobe];

/// The hooks to use. The lines are the help of `--hooks`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Hooks {
    /// The methods that this kernel accepts
    #[default]
    Auto,
    /// Both hooks; an error if one cannot be attached
    Both,
    /// inet_sock_set_state only
    Tracepoint,
    /// tcp_set_state only
    Function,
}

/// The hooks and methods that the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestedHooks {
    pub hooks: Hooks,
    /// The only method to use for `inet_sock_set_state`; `None`: any.
    pub tracepoint: Option<Method>,
    /// The only method to use for `tcp_set_state`; `None`: any.
    pub function: Option<Method>,
}

impl RequestedHooks {
    fn allows(self, method: Method) -> bool {
        let (hook, forced) = match method.hook() {
            Hook::InetSockSetState => (self.hooks != Hooks::Function, self.tracepoint),
            Hook::TcpSetState => (self.hooks != Hooks::Tracepoint, self.function),
        };
        hook && forced.is_none_or(|forced| forced == method)
    }

    /// True if the user's request can be met only by attaching both of these methods.
    fn requires_both(self, pair: [Method; 2]) -> bool {
        let is_forced = |method| self.tracepoint == Some(method) || self.function == Some(method);
        self.hooks == Hooks::Both || pair.into_iter().all(is_forced)
    }

    /// True if this pair may be chosen.
    fn allows_pair(self, pair: [Method; 2]) -> bool {
        let share_a_guard = pair.iter().all(|method| method.recursion_guard() == RecursionGuard::PerCpu);
        let one_hook = pair[0].hook() == pair[1].hook();
        (!share_a_guard || self.requires_both(pair)) && !(one_hook && self.hooks == Hooks::Both)
    }
}

/// The result of the attempts to attach.
#[derive(Debug)]
pub struct Choice<T> {
    /// The attached methods.
    pub live: Vec<(Method, T)>,
    /// Every other method that was tried, with the reason why it is not attached.
    pub refused: Vec<(Method, Refusal)>,
}

impl<T> Choice<T> {
    /// The methods of a hook that are not attached, with the reasons.
    pub fn refused_on(&self, hook: Hook) -> impl Iterator<Item = &(Method, Refusal)> {
        self.refused.iter().filter(move |(method, _)| method.hook() == hook)
    }

    /// The attached methods of a hook.
    pub fn live_on(&self, hook: Hook) -> impl Iterator<Item = Method> {
        self.live.iter().map(|(method, _)| *method).filter(move |method| method.hook() == hook)
    }

    /// What a single method misses, as text for people. `None`: there are two, or none.
    #[must_use]
    pub fn limit(&self) -> Option<String> {
        let [(only, _)] = &self.live[..] else { return None };
        let missed = match only.recursion_guard() {
            RecursionGuard::PerProgram => "its program already runs on the same CPU",
            RecursionGuard::PerCpu => {
                "a program of a kprobe, tracepoint or perf event, also of another agent, runs on the same CPU, or while a \
                 call of bpf() is preempted there"
            }
        };
        Some(format!(
            "only {only} is attached, so no other method sees a transition that comes while {missed}: a connection whose \
             beginning is missed is found by the next snapshot, if it is still open, without who connected it"
        ))
    }

    /// Checks that the user's request is met; the error says what is missing.
    ///
    /// # Errors
    /// If no method is attached, if a requested method is not attached, or if both hooks were requested and
    /// one of them has no attached method.
    pub fn satisfies(&self, requested: RequestedHooks) -> Result<(), String> {
        let reasons = |hook: Option<Hook>| {
            let is_on_hook = |method: Method| hook.is_none_or(|hook| hook == method.hook());
            let describe =
                |(method, why): &(Method, Refusal)| format!("{}: {method} {why}", method.hook().name());
            let reasons: Vec<_> = self
                .refused
                .iter()
                .filter(|(method, why)| is_on_hook(*method) && *why != Refusal::NotRequested)
                .map(describe)
                .collect();
            if reasons.is_empty() { "no method was tried".to_owned() } else { reasons.join("; ") }
        };
        for (hook, forced) in
            [(Hook::InetSockSetState, requested.tracepoint), (Hook::TcpSetState, requested.function)]
        {
            if let Some(forced) = forced
                && requested.allows(forced)
                && !self.live_on(hook).any(|method| method == forced)
            {
                return Err(format!("{} cannot be attached ({})", forced.name(), reasons(Some(hook))));
            }
            if requested.hooks == Hooks::Both && self.live_on(hook).next().is_none() {
                return Err(format!("{} cannot be attached ({})", hook.name(), reasons(Some(hook))));
            }
        }
        if self.live.is_empty() {
            return Err(format!("no hook can be attached ({})", reasons(None)));
        }
        Ok(())
    }
}

/// Attaches the first pair that is allowed and can be attached. If there is no such pair, attaches the first
/// single method that can be attached.
///
/// `attempt` loads and attaches one method; it is called at most once for each method. If only one method of
/// a pair can be attached and that method is not chosen in the end, it is dropped, which detaches it. After a
/// [`Refusal::Denied`] no further method is tried.
pub fn choose<T>(
    requested: RequestedHooks,
    mut attempt: impl FnMut(Method) -> Result<T, Refusal>,
) -> Choice<T> {
    let mut tried: Vec<(Method, Result<T, Refusal>)> = Vec::new();
    let mut is_denied = false;
    let mut can_attach = |method: Method, tried: &mut Vec<(Method, Result<T, Refusal>)>| {
        if !requested.allows(method) {
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
    let pair = METHOD_PAIRS
        .iter()
        .filter(|pair| requested.allows_pair(**pair))
        .find(|pair| pair.iter().all(|method| can_attach(*method, &mut tried)));
    let chosen: Vec<Method> = match pair {
        Some(pair) => pair.to_vec(),
        None => {
            SINGLE_METHODS.into_iter().find(|method| can_attach(*method, &mut tried)).into_iter().collect()
        }
    };
    // For a hook without an attached method, try its remaining methods too, so that the reason of each is
    // known.
    for hook in Hook::ALL {
        if !chosen.iter().any(|method| method.hook() == hook) {
            for method in hook.candidates() {
                can_attach(*method, &mut tried);
            }
        }
    }
    let mut choice = Choice { live: Vec::new(), refused: Vec::new() };
    for (method, outcome) in tried {
        match outcome {
            Ok(link) if chosen.contains(&method) => choice.live.push((method, link)),
            // This method can be attached, but a better pair was found, or it would share a guard with the
            // other method.
            Ok(_) => {}
            Err(why) => choice.refused.push((method, why)),
        }
    }
    for method in Method::ALL.into_iter().filter(|method| !requested.allows(*method)) {
        choice.refused.push((method, Refusal::NotRequested));
    }
    choice.live.sort_by_key(|(method, _)| *method);
    choice.refused.sort_by_key(|(method, _)| *method);
    choice
}

#[cfg(test)]
mod tests;
