//! Machines, and the next step on each.

use super::*;

const NEEDED: Release = Release(1, 93);
const WEB: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

fn rust(origin: Origin, name: &str, release: Release, llvm: u32, source: bool) -> Rust {
    Rust { origin, name: name.to_owned(), bin: "/r".into(), sysroot: name.into(), release, llvm, source }
}

fn stable(source: bool) -> Rust {
    rust(Origin::Rustup, "stable", Release(1, 95), 22, source)
}

fn nightly(llvm: u32, source: bool) -> Rust {
    rust(Origin::Nightly, "nightly", Release(1, 97), llvm, source)
}

fn system(release: Release, source: bool) -> Rust {
    rust(Origin::System, "/usr/bin/rustc", release, 22, source)
}

fn linker(path: &str, llvm: Option<u32>) -> Linker {
    Linker { path: path.into(), version: "0.13.0".to_owned(), llvm, ours: path.starts_with("target") }
}

fn llvm(major: u32) -> Llvm {
    Llvm { major, prefix: format!("/usr/lib/llvm-{major}").into() }
}

fn apt(release: Release, llvms: &[u32], updated: bool) -> Option<Option<Apt>> {
    let rust = AptRust { packages: WEB, release, llvm: 22 };
    Some(Some(Apt { rust: Some(rust), llvms: llvms.to_vec(), updated }))
}

fn linker_crate() -> Option<LinkerCrate> {
    Some(LinkerCrate { version: "0.13.0".to_owned(), llvms: vec![21, 22, 23] })
}

fn failed(names: &[&str]) -> HashMap<String, String> {
    names.iter().map(|name| ((*name).to_owned(), "no answer".to_owned())).collect()
}

fn install(packages: &[&str]) -> Step {
    Step::Install(packages.iter().map(ToString::to_string).collect())
}

/// A machine with all that can be asked for known, and nothing there.
fn known() -> Machine {
    Machine { apt: apt(Release(1, 96), &[14, 22], true), linker_crate: linker_crate(), ..Machine::default() }
}

#[track_caller]
fn check(machine: &Machine, step: &Step) {
    assert_eq!(next(machine, NEEDED).as_ref(), Ok(step), "{machine:#?}");
}

#[track_caller]
fn refused(machine: &Machine) -> String {
    next(machine, NEEDED).expect_err("no way").join("; ")
}

#[test]
fn what_is_there_is_used_at_once() {
    let used = linker("target/llvm-22", Some(22));
    let machine = |rusts: &[Rust]| Machine {
        rusts: rusts.to_vec(),
        linkers: vec![used.clone()],
        // Neither apt nor the registry is asked.
        ..Machine::default()
    };
    let (chosen_stable, chosen_nightly) = (stable(true), nightly(22, true));
    let chosen_system = system(Release(1, 96), true);
    for (rusts, chosen) in [
        (vec![chosen_stable.clone(), chosen_nightly.clone(), chosen_system.clone()], &chosen_nightly),
        (vec![chosen_stable.clone(), chosen_system.clone()], &chosen_stable),
        (vec![chosen_system.clone()], &chosen_system),
        // Before something that must be fetched.
        (vec![nightly(22, false), stable(false), chosen_system.clone()], &chosen_system),
    ] {
        check(&machine(&rusts), &Step::Ready(chosen.clone(), used.clone()));
    }
}

#[test]
fn a_linker_must_read_what_the_compiler_writes() {
    let (old, exact, newer, silent) = (
        linker("/bin/old", Some(21)),
        linker("/bin/exact", Some(22)),
        linker("/bin/newer", Some(23)),
        linker("/bin/silent", None),
    );
    let ours = linker("target/llvm-22", Some(22));
    let machine = |linkers: &[&Linker], bad: &[&str]| Machine {
        rusts: vec![stable(true)],
        linkers: linkers.iter().map(|linker| (*linker).clone()).collect(),
        llvms: vec![llvm(14), llvm(22), llvm(23)],
        failed: failed(bad),
        ..known()
    };
    let build = Step::BuildLinker(llvm(22));
    for (linkers, bad, step) in [
        (vec![&exact], vec![], Step::Ready(stable(true), exact.clone())),
        (vec![&newer], vec![], Step::Ready(stable(true), newer.clone())),
        // It does not tell: the build will.
        (vec![&silent], vec![], Step::Ready(stable(true), silent.clone())),
        (vec![&silent], vec!["/bin/silent"], build.clone()),
        (vec![&silent, &ours], vec![], Step::Ready(stable(true), ours.clone())),
        (vec![&old], vec![], build.clone()),
        (vec![&old, &ours], vec![], Step::Ready(stable(true), ours.clone())),
        (vec![], vec![], build),
    ] {
        check(&machine(&linkers, &bad), &step);
    }
}

#[test]
fn nothing_is_fetched_before_it_is_known_to_lead_anywhere() {
    let machine = Machine { rusts: vec![stable(false)], ..Machine::default() };
    check(&machine, &Step::AskApt);
    let machine = Machine { apt: apt(Release(1, 96), &[22], false), ..machine };
    check(&machine, &Step::AskLinkerCrate);
    let machine = Machine { linker_crate: linker_crate(), ..machine };
    check(&machine, &Step::AddSource("stable".to_owned()));
    // Then its linker's LLVM.
    let machine = Machine { rusts: vec![stable(true)], ..machine };
    check(&machine, &install(&["llvm-22-dev"]));
    let machine = Machine { llvms: vec![llvm(22)], ..machine };
    check(&machine, &Step::BuildLinker(llvm(22)));
}

#[test]
fn a_download_that_fails_leads_to_the_next_candidate() {
    let machine = |bad: &[&str]| Machine {
        rusts: vec![stable(false), nightly(22, false)],
        failed: failed(bad),
        ..known()
    };
    check(&machine(&[]), &Step::AddSource("nightly".to_owned()));
    check(&machine(&["nightly"]), &Step::AddSource("stable".to_owned()));
    check(
        &machine(&["nightly", "stable"]),
        &install(&["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev"]),
    );
}

#[test]
fn only_what_is_missing_is_installed() {
    let web = install(WEB);
    let all = install(&["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev"]);
    let used = linker("/bin/bpf-linker", Some(22));
    for (machine, step) in [
        (Machine { ..known() }, &all),
        (Machine { llvms: vec![llvm(22)], ..known() }, &web),
        (Machine { linkers: vec![used.clone()], ..known() }, &web),
        // The sources, with the compiler's own update if there is one.
        (
            Machine { rusts: vec![system(Release(1, 96), false)], linkers: vec![used.clone()], ..known() },
            &web,
        ),
        (Machine { rusts: vec![system(Release(1, 63), true)], linkers: vec![used.clone()], ..known() }, &web),
        // An older LLVM is of no use.
        (Machine { llvms: vec![llvm(14)], ..known() }, &all),
    ] {
        check(&machine, step);
    }
}

#[test]
fn package_lists_are_fetched_when_those_at_hand_lead_nowhere() {
    let empty = |updated| Some(Some(Apt { updated, ..Apt::default() }));
    let machine = Machine { rusts: vec![stable(true)], apt: empty(false), ..known() };
    check(&machine, &Step::UpdateApt);
    let machine = Machine { apt: apt(Release(1, 85), &[19], false), ..machine };
    check(&machine, &Step::UpdateApt);
    let machine = Machine { apt: empty(true), ..machine };
    assert_eq!(
        refused(&machine),
        "stable: no bpf-linker with LLVM 22 or newer, nor that LLVM's development files to build one (llvm-22-dev); \
         the distribution's packages: no Rust with its sources"
    );
}

#[test]
fn every_candidate_says_why_not() {
    let machine = Machine {
        rusts: vec![nightly(24, true), system(Release(1, 63), true), stable(false)],
        apt: Some(None),
        failed: failed(&["stable"]),
        llvms: vec![llvm(22), llvm(24)],
        linker_crate: linker_crate(),
        ..Machine::default()
    };
    assert_eq!(
        refused(&machine),
        "nightly: it uses LLVM 24, and bpf-linker 0.13.0 knows only LLVM 21, 22, 23; stable: no answer; \
         /usr/bin/rustc: 1.63 is older than 1.93"
    );
    assert_eq!(refused(&Machine { apt: Some(None), ..Machine::default() }), "");
}

#[test]
fn a_nightly_beyond_all_linkers_does_not_block_an_older_rust() {
    let machine = Machine { rusts: vec![nightly(24, true), stable(true)], llvms: vec![llvm(22)], ..known() };
    check(&machine, &Step::BuildLinker(llvm(22)));
}
