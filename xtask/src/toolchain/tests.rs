//! The next step on each kind of machine.

use super::*;

const NEEDED: RustVersion = RustVersion(1, 93);
const WEB: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

fn rust(origin: RustOrigin, name: &str, version: RustVersion, llvm: u32, has_source: bool) -> Rust {
    Rust { origin, name: name.to_owned(), bin: "/r".into(), sysroot: name.into(), version, llvm, has_source }
}

fn stable(has_source: bool) -> Rust {
    rust(RustOrigin::Rustup, "stable", RustVersion(1, 95), 22, has_source)
}

fn nightly(llvm: u32, has_source: bool) -> Rust {
    rust(RustOrigin::Nightly, "nightly", RustVersion(1, 97), llvm, has_source)
}

fn system(version: RustVersion, has_source: bool) -> Rust {
    rust(RustOrigin::System, "/usr/bin/rustc", version, 22, has_source)
}

fn linker(llvm: u32) -> Linker {
    Linker { path: format!("target/llvm-{llvm}").into(), llvm }
}

fn llvm(major: u32) -> Llvm {
    Llvm { major, prefix: format!("/usr/lib/llvm-{major}").into() }
}

fn failed(names: &[&str]) -> HashMap<String, String> {
    names.iter().map(|name| ((*name).to_owned(), "no answer".to_owned())).collect()
}

fn install(packages: &[&str]) -> SetupStep {
    SetupStep::Install(packages.iter().map(ToString::to_string).collect())
}

/// A machine with nothing but apt.
fn bare() -> Machine {
    let rust = AptRust { packages: WEB, version: RustVersion(1, 96), llvm: 22 };
    Machine { apt: AptOffer { rust: Some(rust), llvms: vec![14, 22] }, ..Machine::default() }
}

#[track_caller]
fn check(machine: &Machine, step: &SetupStep) {
    assert_eq!(next_step(machine, NEEDED).as_ref(), Ok(step), "{machine:#?}");
}

#[track_caller]
fn refused(machine: &Machine) -> String {
    next_step(machine, NEEDED).expect_err("no way").join("; ")
}

#[test]
fn an_installed_toolchain_is_preferred_to_one_that_must_be_fetched() {
    let (stable_rust, nightly_rust) = (stable(true), nightly(22, true));
    let system_rust = system(RustVersion(1, 96), true);
    for (rusts, chosen) in [
        (vec![stable_rust.clone(), nightly_rust.clone(), system_rust.clone()], &nightly_rust),
        (vec![stable_rust.clone(), system_rust.clone()], &stable_rust),
        (vec![system_rust.clone()], &system_rust),
        (vec![nightly(22, false), stable(false), system_rust.clone()], &system_rust),
    ] {
        let machine = Machine { rusts, linkers: vec![linker(22)], ..bare() };
        check(&machine, &SetupStep::Ready(chosen.clone(), linker(22)));
    }
}

#[test]
fn a_linker_must_read_the_bitcode_of_the_compiler() {
    let machine = |linkers: &[u32]| Machine {
        rusts: vec![stable(true)],
        linkers: linkers.iter().copied().map(linker).collect(),
        llvms: vec![llvm(14), llvm(22), llvm(23)],
        ..bare()
    };
    let build = SetupStep::BuildLinker(llvm(22));
    for (linkers, step) in [
        (vec![22], SetupStep::Ready(stable(true), linker(22))),
        (vec![23], SetupStep::Ready(stable(true), linker(23))),
        (vec![21, 22], SetupStep::Ready(stable(true), linker(22))),
        (vec![21], build.clone()),
        (vec![], build),
    ] {
        check(&machine(&linkers), &step);
    }
}

#[test]
fn sources_come_first_then_llvm_then_the_linker() {
    let machine = Machine { rusts: vec![stable(false)], ..bare() };
    check(&machine, &SetupStep::AddSource("stable".to_owned()));
    let machine = Machine { rusts: vec![stable(true)], ..bare() };
    check(&machine, &install(&["llvm-22-dev"]));
    let machine = Machine { llvms: vec![llvm(22)], ..machine };
    check(&machine, &SetupStep::BuildLinker(llvm(22)));
}

#[test]
fn a_failed_download_leads_to_the_next_candidate() {
    let machine =
        |bad| Machine { rusts: vec![stable(false), nightly(22, false)], failed: failed(bad), ..bare() };
    check(&machine(&[]), &SetupStep::AddSource("nightly".to_owned()));
    check(&machine(&["nightly"]), &SetupStep::AddSource("stable".to_owned()));
    let all = install(&["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev"]);
    check(&machine(&["nightly", "stable"]), &all);
}

#[test]
fn only_missing_packages_are_installed() {
    let (web, all) = (install(&WEB), install(&["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev"]));
    let with_linker = |rust| Machine { rusts: vec![rust], linkers: vec![linker(22)], ..bare() };
    for (machine, step) in [
        (bare(), &all),
        (Machine { llvms: vec![llvm(22)], ..bare() }, &web),
        (Machine { linkers: vec![linker(22)], ..bare() }, &web),
        // The package of the sources may bring an update of the compiler.
        (with_linker(system(RustVersion(1, 96), false)), &web),
        (with_linker(system(RustVersion(1, 63), true)), &web),
        // An older LLVM is of no use.
        (Machine { llvms: vec![llvm(14)], ..bare() }, &all),
    ] {
        check(&machine, step);
    }
}

#[test]
fn a_nightly_too_new_for_the_linker_does_not_block_an_older_rust() {
    let machine = Machine { rusts: vec![nightly(24, true), stable(true)], llvms: vec![llvm(22)], ..bare() };
    check(&machine, &SetupStep::BuildLinker(llvm(22)));
}

#[test]
fn the_error_has_a_reason_for_each_candidate() {
    let machine = Machine {
        rusts: vec![nightly(24, true), system(RustVersion(1, 63), true), stable(false)],
        failed: failed(&["stable"]),
        llvms: vec![llvm(22), llvm(24)],
        ..Machine::default()
    };
    assert_eq!(
        refused(&machine),
        "nightly: it uses LLVM 24, which is too new for bpf-linker 0.13.0; stable: no answer; \
         /usr/bin/rustc: 1.63 is older than 1.93; the distribution's packages: no Rust with its sources"
    );
    let machine = Machine { rusts: vec![stable(true)], ..Machine::default() };
    assert_eq!(
        refused(&machine),
        "stable: the development files of LLVM 22 to build bpf-linker with are missing (llvm-22-dev); \
         the distribution's packages: no Rust with its sources"
    );
}
