use super::*;
use Method::*;

const ANY: RequestedHooks = RequestedHooks { hooks: Hooks::Auto, tracepoint: None, function: None };

fn attach_only(methods: &[Method]) -> impl FnMut(Method) -> Result<Method, Refusal> + '_ {
    |method| {
        if methods.contains(&method) { Ok(method) } else { Err(Refusal::Unsupported("not here".into())) }
    }
}

fn live(choice: &Choice<Method>) -> Vec<Method> {
    choice.live.iter().map(|(method, _)| *method).collect()
}

#[test]
fn the_default_pair_never_shares_a_recursion_guard() {
    for bits in 0..1_u32 << Method::ALL.len() {
        let these: Vec<_> = Method::ALL.into_iter().filter(|m| bits & 1 << *m as u32 != 0).collect();
        let live = live(&choose(ANY, attach_only(&these)));
        let shared = |these: &[Method]| {
            these.iter().filter(|method| method.recursion_guard() == RecursionGuard::PerCpu).count()
        };
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
        assert_eq!(live(&choose(ANY, attach_only(these))), expected, "{these:?}");
    }
}

#[test]
fn a_hook_without_an_attached_method_has_a_reason_for_each_method() {
    let of_tracepoint = Hook::InetSockSetState.candidates();
    let choice = choose(ANY, attach_only(of_tracepoint));
    assert_eq!(choice.refused_on(Hook::TcpSetState).count(), Hook::TcpSetState.candidates().len());
    assert_eq!(choice.refused_on(Hook::InetSockSetState).count(), 0);
}

#[test]
fn each_known_architecture_has_kprobe_programs_of_its_own_and_no_other_has_one() {
    for uses_static_offsets in [true, false] {
        let [x86, arm64] = ["x86_64", "aarch64"].map(|arch| names::kprobe(arch, uses_static_offsets));
        assert!(x86.is_some() && arm64.is_some() && x86 != arm64, "{x86:?} {arm64:?}");
        for unknown in ["riscv64", "x86", "", "x86_64_"] {
            assert_eq!(names::kprobe(unknown, uses_static_offsets), None, "{unknown}");
        }
    }
    assert_ne!(names::kprobe("x86_64", true), names::kprobe("x86_64", false));
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
fn no_method_is_attempted_twice_or_without_request() {
    let mut attempts = Vec::new();
    let requested = RequestedHooks { hooks: Hooks::Tracepoint, ..ANY };
    let _ = choose::<()>(requested, |method| {
        attempts.push(method);
        Err(Refusal::Unsupported(String::new()))
    });
    assert_eq!(attempts, Hook::InetSockSetState.candidates());
}

#[test]
fn a_requested_method_that_is_not_attached_is_an_error() {
    let all = [TpBtf, Perf, Fentry, Kprobe];
    let forced = |tracepoint, function| RequestedHooks { hooks: Hooks::Auto, tracepoint, function };
    for (requested, these, expected) in [
        (forced(Some(Perf), None), &all[..], Ok(&[Perf, Fentry][..])),
        (forced(Some(TpBtf), Some(Fentry)), &all, Ok(&[TpBtf, Fentry])),
        (forced(Some(Perf), Some(Kprobe)), &all, Ok(&[Perf, Kprobe])),
        (forced(Some(TpBtf), None), &[Perf, Kprobe], Err("tp_btf cannot be attached")),
        (
            RequestedHooks { hooks: Hooks::Both, ..ANY },
            &[TpBtf, Perf],
            Err("tcp_set_state cannot be attached"),
        ),
        (RequestedHooks { hooks: Hooks::Both, ..ANY }, &all, Ok(&[TpBtf, Kprobe])),
        (RequestedHooks { hooks: Hooks::Both, ..ANY }, &[Perf, Kprobe], Ok(&[Perf, Kprobe])),
        (RequestedHooks { hooks: Hooks::Function, ..ANY }, &all, Ok(&[Fentry, Kprobe])),
        (RequestedHooks { hooks: Hooks::Function, ..ANY }, &[TpBtf], Err("no hook can be attached")),
    ] {
        let choice = choose(requested, attach_only(these));
        match (choice.satisfies(requested), expected) {
            (Ok(()), Ok(methods)) => assert_eq!(live(&choice), methods, "{requested:?}"),
            (Err(why), Err(says)) => assert!(why.contains(says), "{why}"),
            (got, _) => panic!("{requested:?} on {these:?}: {got:?}, live {:?}", live(&choice)),
        }
    }
}
