//! `cargo xtask test`: everything that must pass. Each check prints its own output, and a failure does not
//! stop the others. The last lines are why tests failed, the result of all checks in libtest's form, and the names of
//! the failed ones.

use std::{
    cell::{Cell, RefCell},
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build_ebpf, environment,
    libtest::{PanicFinder, tests_in},
    operations,
    packages::{self, may_install},
    run::{self, say, seconds_since},
    vm,
    workspace::Workspace,
};

/// Programs that tests run against, and their packages.
const PROGRAMS: [(&str, &str); 2] = [("logrotate", "logrotate"), ("journalctl", "systemd")];

const FORMAT: &[&str] = &["fmt", "--check"];
const LINTS: &[&str] = &["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
const UNIT_TESTS: &[&str] =
    &["test", "--no-fail-fast", "--workspace", "--lib", "--bins", "--test", "bench_report"];
const LIVE_TESTS: &[&str] = &["test", "--no-fail-fast", "--package", "selfconn-user", "--test", "*"];

/// Maximum number of lines shown of the panics of all tests.
const MAX_SHOWN_LINES: usize = 60;

/// The results of the checks so far.
#[derive(Default)]
struct Summary {
    passed: usize,
    failed: Vec<String>,
    /// What could not be checked here, with the reason.
    skipped: Vec<String>,
}

impl Summary {
    /// Runs a check. Each string of its result is something that it skipped.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<Vec<String>>) {
        say(name);
        let start = Instant::now();
        match check() {
            Ok(skipped) => {
                skipped.iter().for_each(|what| say(format!("{name}: skipped: {what}")));
                let word = if skipped.is_empty() { "passed" } else { "passed in part" };
                say(format!("{name}: {word}, {}", seconds_since(start)));
                self.passed += 1;
                self.skipped.extend(skipped);
            }
            Err(error) => {
                say(format!("{name}: FAILED: {error:#}, {}", seconds_since(start)));
                self.failed.push(name.to_owned());
            }
        }
    }
}

/// Runs all checks, or only the tests with `filter` in their name. `kernels`: in virtual machines, too.
pub(crate) fn test(workspace: &Workspace, filter: Option<&str>, kernels: bool) -> Result<()> {
    let (ran, panics) = (Cell::new(0), RefCell::<Vec<String>>::default());
    let cargo = |arguments: &[&str]| -> Result<Vec<String>> {
        let mut cargo = environment::cargo();
        cargo.args(arguments).args(filter).current_dir(&workspace.root);
        cargo.stdin(Stdio::null());
        let (is_success, printed) = run_tests(&mut cargo)?;
        ran.set(ran.get() + printed.ran);
        panics.borrow_mut().extend(printed.panics);
        if is_success { Ok(Vec::new()) } else { bail!("cargo {} failed", arguments[0]) }
    };
    let mut summary = Summary::default();
    if filter.is_none() {
        add_components()?;
        summary.check("format", || cargo(FORMAT));
    }
    build_ebpf::build(workspace)?;
    if filter.is_none() {
        summary.check("lints", || cargo(LINTS));
    }
    summary.check("unit tests", || cargo(UNIT_TESTS));
    if may_install() {
        packages::install_programs(&PROGRAMS)?;
        summary.check("live tests and CLI tests", || cargo(LIVE_TESTS));
    }
    if may_install() && filter.is_none() {
        match operations::checks(workspace) {
            Ok(operations::Checks { all, skipped }) => {
                skipped.iter().for_each(|what| say(format!("skipped: {what}")));
                summary.skipped.extend(skipped);
                for (name, check) in all {
                    summary.check(name, || {
                        say(format!("{name}: {}", check()?));
                        Ok(Vec::new())
                    });
                }
            }
            Err(error) => summary.check("files for operators", || Err(error)),
        }
        if kernels {
            summary.check("live tests on other kernels", || vm::run_subset(workspace));
        }
    }

    let (word, failed) = (if summary.failed.is_empty() { "ok" } else { "FAILED" }, summary.failed.len());
    if failed > 0 {
        panics.borrow().iter().take(MAX_SHOWN_LINES).for_each(|line| println!("{line}"));
    }
    say("all checks:");
    println!(
        "test result: {word}. {} passed; {failed} failed; {} ignored; 0 measured",
        summary.passed,
        summary.skipped.len()
    );
    if failed > 0 {
        bail!("failed: {}: their output is above", summary.failed.join(", "));
    }
    if let Some(filter) = filter
        && ran.get() == 0
    {
        bail!("no test has `{filter}` in its name");
    }
    if !may_install() {
        packages::must_be_root("live tests, CLI tests and other kernels were not run", "test")?;
    }
    say(match summary.skipped.is_empty() {
        true => "everything passed".to_owned(),
        false => format!("passed, without what was skipped: {}", summary.skipped.join("; ")),
    });
    Ok(())
}

/// What cargo printed.
#[derive(Default)]
struct Printed {
    /// The number of tests that ran.
    ran: usize,
    /// The beginning of each panic.
    panics: Vec<String>,
}

/// Runs cargo with its output. Returns whether it succeeded, and what it printed.
fn run_tests(cargo: &mut Command) -> Result<(bool, Printed)> {
    /// How long the rest of the output may take. A test that failed may have left a process with the same output.
    const REST_TIMEOUT: Duration = Duration::from_secs(10);
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("start cargo")?;
    let mut stdout = BufReader::new(child.stdout.take().context("no output of cargo")?);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut line = Vec::new();
        while stdout.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            println!("{text}");
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    let status = child.wait().context("wait for cargo")?;
    let until = Instant::now() + REST_TIMEOUT;
    let (mut printed, mut finder) = (Printed::default(), PanicFinder::default());
    while let Ok(line) = lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
        printed.ran += tests_in(&line);
        if finder.is_shown(&line) {
            printed.panics.push(line);
        }
    }
    Ok((status.success(), printed))
}

/// Adds rustfmt and clippy to the toolchain that runs us.
fn add_components() -> Result<()> {
    let has = |name: &str| run::output(environment::cargo().args([name, "--version"])).is_ok();
    if has("fmt") && has("clippy") {
        return Ok(());
    }
    if let Some(toolchain) = environment::toolchain() {
        let mut rustup = environment::plain("timeout");
        rustup.args(["90", "rustup", "component", "add", "rustfmt", "clippy", "--toolchain", &toolchain]);
        return run::step("adding rustfmt and clippy", &mut rustup)
            .context("run: rustup component add rustfmt clippy");
    }
    if !environment::is_in_path("apt-get") {
        bail!("cargo fmt or cargo clippy is missing: install rustfmt and clippy beside your cargo");
    }
    packages::install(if packages::is_installed("cargo-web") {
        &["rustfmt-web", "rust-web-clippy"]
    } else {
        &["rustfmt", "rust-clippy"]
    })
}
