//! Runs the rows of the matrix: makes an initramfs for each, boots it, and reports the result.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    VmArgs, binaries,
    boot::{Boot, BootResult, Ending, KernelWarnings},
    emulator::Emulator,
    facts,
    guest::{self, GuestRun},
    kernel::Kernel,
    report::{MatrixRow, count_retries, faults, parse_tests, without_tests},
    variant::{EVERYTHING, Variant},
};
use crate::{
    architecture::Architecture,
    libtest,
    run::{say, seconds},
    workspace::{Workspace, here},
};

/// The number of lines shown of the log of a failed row.
const SHOWN_LINES: usize = 60;

/// One test at a time, because all of them use the same kernel; and with output, for the facts in it. It is not
/// captured until the end, which a machine may not reach.
const TEST_ARGS: [&str; 2] = ["--test-threads=1", "--nocapture"];

/// The program of the live tests in a machine.
const LIVE: &str = "/bin/live";

/// The tests may set this machine's clock, and take its CPUs away.
const OWN_MACHINE: (&str, &str) = ("SELFCONN_OWN_MACHINE", "1");

/// The daemon's file in the guest.
const DAEMON: &str = "/bin/selfconn";

/// What all rows have in common.
pub(super) struct RowRunner<'a> {
    args: &'a VmArgs,
    logs: PathBuf,
    emulator: Emulator,
    busybox: PathBuf,
    programs: [PathBuf; 2],
}

impl<'a> RowRunner<'a> {
    /// Builds the programs. The eBPF object must be there.
    pub(super) fn new(
        args: &'a VmArgs,
        architecture: &'static Architecture,
        workspace: &Workspace,
    ) -> Result<Self> {
        let logs = workspace.target.join("vm/logs");
        fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
        let tests = ["test", "--no-run", "--test", "live"];
        let programs = binaries::build(workspace, architecture, &tests, ["selfconn", "live"])?;
        let emulator = Emulator::find_or_fetch(workspace, architecture)?;
        let busybox = guest::busybox(workspace, architecture)?;
        Ok(Self { args, logs, emulator, busybox, programs })
    }

    /// Runs the rows, some at a time, and returns the results in their order. `ended` is called for each at its end.
    pub(super) fn run(
        &self,
        rows: &[(&Kernel, &Variant)],
        ended: impl Fn(&Kernel, &MatrixRow) -> Result<()> + Sync,
    ) -> Result<Vec<MatrixRow>> {
        ensure!(!rows.is_empty(), "nothing to boot: no kernel could be had, or the variant is not for it");
        let next = AtomicUsize::new(0);
        let worker = || {
            let mut results = Vec::new();
            while let Some((index, (kernel, variant))) = {
                let index = next.fetch_add(1, Ordering::Relaxed);
                rows.get(index).map(|row| (index, *row))
            } {
                let row = self.run_row(kernel, variant);
                let row = row.with_context(|| format!("{} {}", kernel.label(), variant.name))?;
                ended(kernel, &row)?;
                results.push((index, row));
            }
            Ok(results)
        };
        let results: Vec<Result<Vec<(usize, MatrixRow)>>> = thread::scope(|scope| {
            let workers: Vec<_> = (0..self.args.jobs.max(1)).map(|_| scope.spawn(worker)).collect();
            let join = |worker: thread::ScopedJoinHandle<'_, _>| {
                worker.join().unwrap_or_else(|_| bail!("a thread that boots machines panicked"))
            };
            workers.into_iter().map(join).collect()
        });
        let mut results =
            results.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
        results.sort_by_key(|(index, _)| *index);
        Ok(results.into_iter().map(|(_, row)| row).collect())
    }

    fn run_row(&self, kernel: &Kernel, variant: &Variant) -> Result<MatrixRow> {
        let file = |end: &str| self.logs.join(format!("{}-{}{end}", kernel.label(), variant.name));
        let (initramfs, log, console) = (file(".cpio"), file(".log"), file(".console.log"));
        let [daemon, tests] = &self.programs;
        let runs = self.runs(kernel, variant);
        guest::initramfs(&initramfs, &self.busybox, kernel, &[daemon, tests], &runs, self.args.deadline)?;
        let boot = Boot {
            emulator: &self.emulator,
            kernel,
            initramfs: &initramfs,
            kernel_args: variant.kernel_args,
            cpus: self.cpus(kernel, variant),
            memory_mib: 2048,
            deadline: Duration::from_secs(self.args.deadline),
        };
        let result = boot.run(&log, &console)?;
        fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
        let (tests, facts) = (parse_tests(&result.output), facts::parse(&result.output));
        let mut faults = faults(&result.output, &tests, &facts);
        if result.ending == Ending::Passed {
            let args = runs.iter().filter(|run| run.program == LIVE).flat_map(|run| &run.args);
            faults.extend(without_tests(args.map(String::as_str), &tests));
        }
        let row = MatrixRow {
            kernel: kernel.label(),
            variant: variant.name.to_owned(),
            faults,
            tests,
            facts,
            retries: count_retries(&result.output),
            panics: libtest::panics(&result.output),
            warnings: KernelWarnings::parse(&result.console),
            ending: result.ending.clone(),
            duration: result.duration,
            log,
        };
        report(&row, &result, &console);
        Ok(row)
    }

    fn cpus(&self, kernel: &Kernel, variant: &Variant) -> u32 {
        self.args.cpus.unwrap_or_else(|| variant.cpus_with(kernel))
    }

    fn runs(&self, kernel: &Kernel, variant: &Variant) -> Vec<GuestRun> {
        let owned = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        let variable = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let mut env = [("SELFCONN_BIN", DAEMON), OWN_MACHINE].map(variable).to_vec();
        if kernel.is_known {
            env.push(variable(("SELFCONN_KERNEL", &kernel.version)));
            env.push(variable(("SELFCONN_LOCKDOWN", variant.lockdown())));
        }
        // Its verdicts are facts of this kernel.
        let doctor = GuestRun {
            name: "doctor".into(),
            env: [env.clone(), self.args.env.clone()].concat(),
            program: DAEMON.into(),
            args: owned(&["doctor", "--json"]),
        };
        // Tests that the user names run in all variants.
        let parts = if self.args.test_args.is_empty() { variant.parts } else { &[EVERYTHING] };
        let tests = parts.iter().map(|part| {
            let scale = part.scale(self.cpus(kernel, variant)).to_string();
            GuestRun {
                name: part.name.into(),
                // The user's variables come last, so they win.
                env: [env.clone(), vec![variable(("SELFCONN_SCALE", &scale))], self.args.env.clone()]
                    .concat(),
                program: LIVE.into(),
                args: [owned(&TEST_ARGS), owned(part.args), self.args.test_args.clone()].concat(),
            }
        });
        [doctor].into_iter().chain(tests).collect()
    }
}

/// Prints a line for the row, libtest's results, and the end of the logs if the row did not pass.
fn report(row: &MatrixRow, result: &BootResult, console: &Path) {
    let mut text = format!("{} {}: {} ({})", row.kernel, row.variant, row.summary(), seconds(row.duration));
    for line in result.output.lines().filter(|line| line.starts_with("test result: ")) {
        text += &format!("\n    {line}");
    }
    if !row.passed() {
        if !row.panics.is_empty() {
            text +=
                &format!("\n--- the panics in {}\n{}", here(&row.log), last_lines(&row.panics, SHOWN_LINES));
        }
        for (file, output) in [(console, &result.console), (row.log.as_path(), &result.output)] {
            text += &format!("\n--- the end of {}\n{}", here(file), last_lines(output, SHOWN_LINES));
        }
        text += "---";
    }
    say(text);
}

/// The last lines of a text.
pub(super) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(count)..];
    shown.iter().map(|line| format!("{line}\n")).collect()
}
