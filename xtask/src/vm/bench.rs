//! Runs the rows: makes each its initramfs, boots it, and tells what came of it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Args,
    binaries::Binaries,
    boot::{Boot, Remains, complaints_in},
    facts,
    initramfs::Initramfs,
    kernel::Kernel,
    plan::{self, Plan, Run},
    report::{Row, faults, parse_tests},
    variant::{EVERYTHING, Variant},
};
use crate::{progress, workspace::here};

/// How much of a guest's log is shown where it failed.
const SHOWN_LINES: usize = 60;

/// What libtest is told unless asked otherwise: one test at a time, since the kernel they look at is the same; and
/// what passing tests print, for the facts in it.
const TEST_ARGS: [&str; 2] = ["--test-threads=1", "--show-output"];

/// What is true of no other machine: its clock may be set, and its CPUs may be taken away.
const OWN_MACHINE: (&str, &str) = ("SELFCONN_OWN_MACHINE", "1");

/// What all rows have in common.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    args: &'a Args,
    directory: PathBuf,
    base: Initramfs,
    daemon: String,
    tests: String,
}

impl<'a> Bench<'a> {
    /// A bench whose logs go to this directory.
    pub(super) fn new(binaries: &Binaries, args: &'a Args, directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        let mut base = Initramfs::new();
        base.file("/init", &binaries.init.content);
        for program in [&binaries.tests, &binaries.daemon] {
            base.file(&in_guest(&program.name), &program.content);
        }
        let [daemon, tests] = [&binaries.daemon, &binaries.tests].map(|program| in_guest(&program.name));
        Ok(Self { args, directory, base, daemon, tests })
    }

    /// Runs the rows, some beside each other, and yields them in the order given.
    pub(super) fn run(&self, rows: &[(&Kernel, &Variant)]) -> Result<Vec<Row>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((kernel, variant)) = rows.get(index) else { return done };
                let row = self.row(kernel, variant);
                done.push((index, row.with_context(|| format!("{} {}", kernel.version, variant.name))));
            }
        };
        let mut done: Vec<(usize, Result<Row>)> = thread::scope(|scope| {
            let workers: Vec<_> = (0..self.args.jobs.max(1)).map(|_| scope.spawn(work)).collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
        });
        ensure!(done.len() == rows.len(), "{} of {} rows were not run", rows.len() - done.len(), rows.len());
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, row)| row).collect()
    }

    fn row(&self, kernel: &Kernel, variant: &Variant) -> Result<Row> {
        let name = format!("{}-{}", kernel.version, variant.name);
        let file = |end: &str| self.directory.join(format!("{name}.{end}"));
        let (initramfs, log, console) = (file("cpio"), file("log"), file("console.log"));
        fs::write(&initramfs, self.initramfs(kernel, variant)?)
            .with_context(|| format!("write {}", initramfs.display()))?;
        let remains = Boot {
            kernel,
            initramfs: &initramfs,
            kernel_args: variant.kernel_args,
            cpus: variant.cpus_with(kernel),
            memory_mib: 1024,
            deadline: Duration::from_secs(self.args.deadline),
        }
        .run(&log, &console)?;
        fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
        let (tests, facts) = (parse_tests(&remains.output), facts::parse(&remains.output));
        let row = Row {
            kernel: kernel.version.clone(),
            variant: variant.name.to_owned(),
            faults: faults(&remains.output, &tests, &facts),
            tests,
            facts,
            complaints: complaints_in(&remains.console),
            ending: remains.ending.clone(),
            took: remains.took,
            log,
        };
        tell(&row, &remains, &console);
        Ok(row)
    }

    fn initramfs(&self, kernel: &Kernel, variant: &Variant) -> Result<Vec<u8>> {
        let mut initramfs = self.base.clone();
        let mut modules = Vec::new();
        for module in &kernel.modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            let content = fs::read(module).with_context(|| format!("read {}", module.display()))?;
            modules.push(format!("/modules/{name}"));
            initramfs.file(&format!("/modules/{name}"), &content);
        }
        let mut env = vec![("SELFCONN_BIN".to_owned(), self.daemon.clone())];
        env.push((OWN_MACHINE.0.to_owned(), OWN_MACHINE.1.to_owned()));
        if kernel.is_known {
            env.push(("SELFCONN_KERNEL".to_owned(), kernel.version.clone()));
            env.push(("SELFCONN_LOCKDOWN".to_owned(), variant.lockdown().to_owned()));
        }
        env.extend_from_slice(&self.args.env);
        let plan = Plan { modules, env, runs: self.runs(kernel, variant), deadline_s: self.args.deadline };
        initramfs.file(plan::PATH, &serde_json::to_vec(&plan).context("write the plan")?);
        Ok(initramfs.finish())
    }

    fn runs(&self, kernel: &Kernel, variant: &Variant) -> Vec<Run> {
        let owned = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        // Its verdicts are facts of this kernel.
        let doctor = Run {
            name: "doctor".into(),
            program: self.daemon.clone(),
            args: owned(&["doctor", "--json"]),
            env: Vec::new(),
        };
        // Whoever names tests wants just those, in whatever part they are.
        let parts = if self.args.test_args.is_empty() { variant.parts } else { &[EVERYTHING] };
        let tests = parts.iter().map(|part| Run {
            name: part.name.into(),
            program: self.tests.clone(),
            args: [owned(&TEST_ARGS), owned(part.args), self.args.test_args.clone()].concat(),
            env: vec![("SELFCONN_SCALE".into(), part.scale(variant.cpus_with(kernel)).to_string())],
        });
        [doctor].into_iter().chain(tests).collect()
    }
}

/// Where a program lies in the guest.
fn in_guest(name: &str) -> String {
    format!("/bin/{name}")
}

/// A line for the row; and what the guest said last, where it did not pass.
fn tell(row: &Row, remains: &Remains, console: &Path) {
    let mut text =
        format!("{} {}: {} ({})", row.kernel, row.variant, row.summary(), progress::seconds(row.took));
    if !row.passed() {
        for (file, said) in [(console, &remains.console), (row.log.as_path(), &remains.output)] {
            let lines: Vec<&str> = said.lines().collect();
            let from = lines.len().saturating_sub(SHOWN_LINES);
            text += &format!(
                "\n--- the end of {}\n{}",
                here(file),
                lines.get(from..).unwrap_or_default().join("\n")
            );
        }
        text += "\n---";
    }
    progress::say(text);
}
