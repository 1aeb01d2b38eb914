//! `cargo xtask test`: everything that must pass, in order, each with its time. A failure does not keep the rest from
//! being looked at.

use std::{
    io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _},
    ops::AddAssign,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build_ebpf, environment, operations, packages,
    progress::{self, say, seconds},
    vm,
    workspace::Workspace,
};

/// Tests that pass, fail and are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u32,
    failed: u32,
    ignored: u32,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// One thing that must pass.
struct Check {
    name: &'static str,
    cargo: &'static [&'static str],
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Quiet when it passes.
    Lint,
    /// Its lines are the result.
    Test { root: bool },
}

/// Real programs that tests run against: the program, and its package.
const PROGRAMS: [(&str, &str); 2] = [("logrotate", "logrotate"), ("journalctl", "systemd")];

const CHECKS: [Check; 4] = [
    Check { name: "format", cargo: &["fmt", "--check"], kind: Kind::Lint },
    Check {
        name: "lints",
        cargo: &["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"],
        kind: Kind::Lint,
    },
    Check {
        name: "unit tests",
        cargo: &["test", "--no-fail-fast", "--workspace", "--lib", "--bins"],
        kind: Kind::Test { root: false },
    },
    Check {
        name: "live tests and CLI tests",
        cargo: &["test", "--no-fail-fast", "--package", "selfconn-user", "--test", "*"],
        kind: Kind::Test { root: true },
    },
];

/// Runs all checks, or only the tests with `filter` in their name; all of them with `kernels` in virtual machines, too.
pub(crate) fn test(workspace: &Workspace, filter: Option<&str>, kernels: bool) -> Result<()> {
    if filter.is_none() {
        add_components()?;
    }
    build_ebpf::build(workspace)?;

    let (mut count, mut times, mut failed, mut left_out) =
        (Count::default(), Vec::new(), Vec::new(), Vec::new());
    for check in &CHECKS {
        let (is_test, needs_root) = match check.kind {
            Kind::Lint => (false, false),
            Kind::Test { root } => (true, root),
        };
        if filter.is_some() && !is_test {
            continue;
        }
        if needs_root && !packages::may_install() {
            left_out.push(check.name);
            continue;
        }
        if needs_root {
            add_programs()?;
        }
        let mut cargo = environment::cargo();
        cargo.args(check.cargo).current_dir(&workspace.root);
        let began = Instant::now();
        let passed = if is_test {
            say(check.name);
            cargo.args(filter);
            let (passed, counted) = run_tests(cargo).with_context(|| format!("run the {}", check.name))?;
            count += counted;
            passed
        } else {
            lint(check.name, cargo)?
        };
        let took = seconds(began.elapsed());
        say(format!("{}: {}, {took}", check.name, if passed { "passed" } else { "FAILED" }));
        times.push(format!("{} {took}", check.name));
        if !passed {
            failed.push(check.name);
        }
    }

    if filter.is_none() && packages::may_install() {
        const NAME: &str = "what operators get";
        say(NAME);
        let began = Instant::now();
        match operations::check(workspace) {
            Ok(outcome) => {
                count.passed += outcome.passed;
                count.failed += u32::try_from(outcome.failed.len()).unwrap_or(u32::MAX);
                failed.extend(outcome.failed);
            }
            Err(error) => {
                say(format!("{NAME}: FAILED: {error:#}"));
                failed.push(NAME);
            }
        }
        times.push(format!("{NAME} {}", seconds(began.elapsed())));
    }

    if kernels && filter.is_none() && packages::may_install() {
        const NAME: &str = "live tests on other kernels";
        say(NAME);
        let began = Instant::now();
        let outcome = vm::subset(workspace);
        let took = seconds(began.elapsed());
        times.push(format!("{NAME} {took}"));
        match outcome {
            Ok(skipped) => {
                say(format!(
                    "{NAME}: {}, {took}",
                    if skipped.is_empty() { "passed" } else { "passed in part" }
                ));
                skipped.iter().for_each(|what| say(format!("{NAME}: skipped: {what}")));
            }
            Err(error) => {
                say(format!("{NAME}: FAILED: {error:#}, {took}"));
                failed.push(NAME);
            }
        }
    }

    say(times.join(", "));
    let Count { passed, failed: failures, ignored } = count;
    println!("xtask: {passed} passed, {failures} failed, {ignored} skipped");
    if !failed.is_empty() {
        bail!("failed: {}: what they said is above", failed.join(", "));
    }
    if !left_out.is_empty() {
        bail!(
            "not run, for they need root: {}: run: sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask test",
            left_out.join(", ")
        );
    }
    if filter.is_some() && count == Count::default() {
        bail!("no test has that in its name");
    }
    Ok(())
}

fn lint(name: &str, cargo: Command) -> Result<bool> {
    let finished = progress::run(name, cargo, None)?;
    if !finished.succeeded() {
        eprint!("{}", finished.output);
    }
    Ok(finished.succeeded())
}

/// Passes on every line, and adds up what the lines say.
fn run_tests(mut cargo: Command) -> Result<(bool, Count)> {
    if io::stdout().is_terminal() {
        // The tests see a pipe, the reader does not.
        cargo.args(["--", "--color=always"]);
    }
    let mut child = cargo.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("run cargo test")?;
    let output = child.stdout.take().context("a pipe was asked for")?;
    let mut count = Count::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("read what the tests say")?;
        count += counts(&String::from_utf8_lossy(&line));
        let mut stdout = io::stdout().lock();
        stdout.write_all(&line).and_then(|()| stdout.write_all(b"\n")).context("write what the tests say")?;
    }
    let status = child.wait().context("wait for cargo test")?;
    Ok((status.success(), count))
}

/// `test result: ok. 12 passed; 0 failed; 1 ignored; …`, of which the verdict may be coloured.
fn counts(line: &str) -> Count {
    let Some(numbers) = line.strip_prefix("test result: ") else { return Count::default() };
    let number = |what: &str| {
        let field = numbers.split(';').find_map(|field| field.trim().strip_suffix(what));
        field.and_then(|field| field.split_whitespace().last()?.parse().ok()).unwrap_or(0)
    };
    Count { passed: number("passed"), failed: number("failed"), ignored: number("ignored") }
}

/// Installs what tests run against.
fn add_programs() -> Result<()> {
    let missing: Vec<_> = PROGRAMS
        .into_iter()
        .filter(|(program, package)| !environment::is_in_path(program) && !packages::is_installed(package))
        .map(|(_, package)| package.to_owned())
        .collect();
    if missing.is_empty() { Ok(()) } else { packages::install(&missing) }
}

/// Adds what formats and lints to the toolchain at hand, or says how to.
fn add_components() -> Result<()> {
    let has = |name: &str| {
        let output = environment::cargo().args([name, "--version"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    if has("fmt") && has("clippy") {
        return Ok(());
    }
    if let Ok(toolchain) = std::env::var("RUSTUP_TOOLCHAIN") {
        let mut rustup = environment::plain("rustup");
        rustup.args(["component", "add", "rustfmt", "clippy", "--toolchain", &toolchain]);
        let what = format!("adding rustfmt and clippy to {toolchain}");
        let finished = progress::run(&what, rustup, Some(Duration::from_secs(90)))?;
        if !finished.succeeded() {
            bail!("{what} failed: {}: run: rustup component add rustfmt clippy", finished.why());
        }
        return Ok(());
    }
    if !environment::is_in_path("apt-get") {
        bail!("cargo fmt or cargo clippy is missing: install rustfmt and clippy beside your cargo");
    }
    let names = if packages::is_installed("cargo-web") {
        ["rustfmt-web", "rust-web-clippy"]
    } else {
        ["rustfmt", "rust-clippy"]
    };
    packages::install(&names.map(ToOwned::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up() {
        for (line, count) in [
            (
                "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out; finished in 0.00s",
                (12, 0, 3),
            ),
            ("test result: \u{1b}[31mFAILED\u{1b}[0m. 1 passed; 2 failed; 0 ignored; 0 measured", (1, 2, 0)),
            ("test parses_a_result ... ok", (0, 0, 0)),
            ("a test prints: 7 passed; 7 failed;", (0, 0, 0)),
        ] {
            let (passed, failed, ignored) = count;
            assert_eq!(counts(line), Count { passed, failed, ignored }, "{line}");
        }
    }
}
