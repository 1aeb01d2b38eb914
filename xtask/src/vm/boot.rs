//! One boot of a virtual machine, and how it ended.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{emulator::Emulator, kernel::Kernel};

/// Lines that begin with this are the guest's own (`init.sh`, `service/guest.sh`); the others are printed by
/// tests.
pub(super) const GUEST_PREFIX: &str = "selfconn-guest: ";

/// The guest's last line if everything passed, and if not.
const ALL_PASSED: &str = "selfconn-guest: all passed";
const NOT_ALL_PASSED: &str = "selfconn-guest: not all passed";

/// The beginning of the guest's line at its deadline.
const DEADLINE_PASSED: &str = "selfconn-guest: the deadline";

/// The host waits this much longer than the guest's own deadline, because a stopped kernel does not keep one.
const GRACE: Duration = Duration::from_secs(30);

/// A machine.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    pub(super) emulator: &'a Emulator,
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    /// Added to the kernel's command line.
    pub(super) kernel_args: &'a [&'a str],
    pub(super) cpus: u32,
    pub(super) memory_mib: u32,
    /// The guest's own deadline.
    pub(super) deadline: Duration,
}

/// The result of a boot.
#[derive(Debug)]
pub(super) struct BootResult {
    /// The output of the guest and its tests.
    pub(super) output: String,
    /// The kernel's messages.
    pub(super) console: String,
    pub(super) ending: Ending,
    pub(super) duration: Duration,
}

/// How a boot ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ending {
    /// Everything ran and passed.
    Passed,
    /// Everything ran, and something failed.
    Failed,
    /// The kernel crashed with this message.
    Panicked(String),
    /// The deadline passed; the last line of output.
    Hung(String),
    /// QEMU failed for this reason.
    EmulatorFailed(String),
    /// The machine powered off without a verdict; the last line of output.
    NoVerdict(String),
}

impl Boot<'_> {
    /// Runs the machine. Its output and its console go to these files.
    pub(super) fn run(&self, output: &Path, console: &Path) -> Result<BootResult> {
        // An earlier boot may have left files.
        for file in [output, console] {
            fs::write(file, "").with_context(|| format!("write {}", file.display()))?;
        }
        let start = Instant::now();
        let mut qemu = self
            .command(output, console)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start QEMU")?;
        let status = loop {
            if let Some(status) = qemu.try_wait().context("wait for the machine")? {
                break Some(status);
            }
            if start.elapsed() > self.deadline + GRACE {
                qemu.kill().context("end the machine")?;
                qemu.wait().context("wait for the machine")?;
                break None;
            }
            thread::sleep(Duration::from_millis(20));
        };
        let duration = start.elapsed();
        let errors = qemu.stderr.take().map(std::io::read_to_string).transpose()?.unwrap_or_default();
        let [output, console] = [output, console].map(|file| {
            // A console may print bytes that are not UTF-8.
            let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
            Ok::<_, anyhow::Error>(String::from_utf8_lossy(&bytes).replace('\r', ""))
        });
        let (output, console) = (output?, console?);
        let ending = match status {
            Some(status) if !status.success() => {
                Ending::EmulatorFailed(format!("{status}: {}", errors.trim()))
            }
            status => ending(&output, &console, status.is_some()),
        };
        Ok(BootResult { output, console, ending, duration })
    }

    fn command(&self, output: &Path, console: &Path) -> Command {
        let (emulation, architecture) = (self.kernel.emulation(), self.kernel.flavour.architecture);
        let mut command = self.emulator.command();
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(architecture.machine).arg("-m").arg(self.memory_mib.to_string());
        command.args(["-accel", emulation.threads_for(self.cpus).accelerator()]);
        command.args(["-cpu", emulation.cpu, "-smp", &self.cpus.to_string()]);
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(self.initramfs);
        // An oops becomes a panic, and a panic a reboot, at which QEMU exits.
        let console_arg = format!("console={}", architecture.console);
        let kernel_args = [&console_arg, "loglevel=5", "oops=panic", "panic=-1"];
        command.arg("-append").arg([&kernel_args, self.kernel_args].concat().join(" "));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        // QEMU separates options by commas.
        let path = output.display().to_string().replace(',', ",,");
        command.arg("-chardev").arg(format!("file,id=output,path={path}")).args(architecture.output_line);
        command
    }
}

/// How a boot ended, by its output and whether it powered off.
fn ending(output: &str, console: &str, powered_off: bool) -> Ending {
    let last_line = || {
        let text = if output.trim().is_empty() { console } else { output };
        text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("no output").to_owned()
    };
    let has_line = |wanted: &str| output.lines().any(|line| line == wanted);
    if has_line(ALL_PASSED) {
        Ending::Passed
    } else if let Some((before, _)) = output.split_once(DEADLINE_PASSED) {
        let last = before.lines().map(str::trim).rfind(|line| !line.is_empty());
        Ending::Hung(last.unwrap_or("no output").to_owned())
    } else if has_line(NOT_ALL_PASSED) {
        Ending::Failed
    } else if let Some(message) = crash_message(console) {
        Ending::Panicked(message.to_owned())
    } else if powered_off {
        Ending::NoVerdict(last_line())
    } else {
        Ending::Hung(last_line())
    }
}

/// The first line of the kernel's crash message.
fn crash_message(console: &str) -> Option<&str> {
    const SIGNS: [&str; 6] =
        ["Oops: ", "BUG: ", "double fault: ", "general protection fault", "invalid opcode: ", "Kernel panic"];
    console.lines().map(without_time).find(|line| SIGNS.iter().any(|sign| line.contains(sign)))
}

/// The kernel's warnings after which it continues.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct KernelWarnings {
    /// Each different one once, with the number of times.
    pub(super) messages: Vec<String>,
    /// The first warning and the kernel's messages after it: a call trace, if it prints one.
    pub(super) first: Vec<String>,
}

impl KernelWarnings {
    /// The length of `first`. The traces of two CPUs that wait for each other fit.
    const FIRST_LINES: usize = 120;

    /// Those on a console.
    pub(super) fn parse(console: &str) -> Self {
        const SIGNS: [&str; 5] = ["WARNING: ", "BUG: ", "INFO: task ", "rcu: INFO: ", "soft lockup"];
        let is_warning = |line: &&str| SIGNS.iter().any(|sign| line.contains(sign));
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for message in console.lines().map(without_time).filter(is_warning) {
            match counts.iter_mut().find(|(known, _)| *known == message) {
                Some((_, count)) => *count += 1,
                None => counts.push((message, 1)),
            }
        }
        let messages = counts.into_iter().map(|(message, count)| match count {
            1 => message.to_owned(),
            count => format!("{message} ({count} times)"),
        });
        let first = console.lines().map(without_time).skip_while(|line| !is_warning(line));
        Self {
            messages: messages.collect(),
            first: first.take(Self::FIRST_LINES).map(str::to_owned).collect(),
        }
    }
}

/// A kernel message without its timestamp.
fn without_time(line: &str) -> &str {
    match line.trim().strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((time, message)) if time.trim().parse::<f64>().is_ok() => message,
        _ => line.trim(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_of_guests_print_what_is_expected_of_them() {
        assert!(super::super::service::INIT.starts_with("#!/bin/sh\n"));
        for script in [super::super::guest::INIT, super::super::service::GUEST] {
            assert!(script.starts_with("#!/"), "the kernel runs it");
            for line in [ALL_PASSED, NOT_ALL_PASSED, DEADLINE_PASSED] {
                let message = line.strip_prefix(GUEST_PREFIX).unwrap();
                assert!(script.contains(&format!("say \"{message}")), "{line}");
            }
            assert!(script.contains(&format!("echo \"{GUEST_PREFIX}$*\"")));
        }
    }

    #[test]
    fn the_ending_follows_from_the_output() {
        let passed = format!("test a ... ok\n{ALL_PASSED}\n");
        let failed = format!("test a ... FAILED\n{NOT_ALL_PASSED}\n");
        let late = format!("test a ... \n{DEADLINE_PASSED} of 9 s has passed\n{NOT_ALL_PASSED}\n");
        let panic =
            "[    0.7] quiet\n[    1.5] BUG: kernel NULL pointer dereference\n[    1.5] Kernel panic - not";
        let bug = || Ending::Panicked("BUG: kernel NULL pointer dereference".into());
        for (output, console, powered_off, expected) in [
            (passed.as_str(), "", true, Ending::Passed),
            (&passed, panic, true, Ending::Passed),
            (&failed, "", true, Ending::Failed),
            (&late, "", true, Ending::Hung("test a ...".into())),
            ("test a ... ", panic, true, bug()),
            ("", panic, false, bug()),
            ("", "no root\n[    0.5] Kernel panic - not syncing: VFS", true, {
                Ending::Panicked("Kernel panic - not syncing: VFS".into())
            }),
            ("test a ... ok\ntest b ... ", "[    0.7] fine", false, Ending::Hung("test b ...".into())),
            ("", "[    0.7] fine\n\n", true, Ending::NoVerdict("[    0.7] fine".into())),
            ("", "", true, Ending::NoVerdict("no output".into())),
        ] {
            assert_eq!(
                ending(output, console, powered_off),
                expected,
                "{output:?} {console:?} {powered_off}"
            );
        }
    }

    #[test]
    fn only_warnings_are_found() {
        let console = "[    0.1] x86/cpu: fine\n[   20.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!\n\
                       [   21.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1\nrcu: INFO: rcu_preempt stall\n";
        assert_eq!(
            KernelWarnings::parse(console).messages,
            [
                "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
                "WARNING: CPU: 0 PID: 1 at net/core/dev.c:1",
                "rcu: INFO: rcu_preempt stall",
            ]
        );
    }

    #[test]
    fn a_repeated_warning_is_listed_once_and_the_first_with_its_trace() {
        let stuck = "[   20.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!\n[   20.0] RIP: 0010:spin\n";
        let warnings = KernelWarnings::parse(&format!("[    0.1] fine\n{stuck}{stuck}"));
        assert_eq!(warnings.messages, ["watchdog: BUG: soft lockup - CPU#0 stuck for 22s! (2 times)"]);
        assert_eq!(warnings.first[1], "RIP: 0010:spin");
        assert_eq!(warnings.first.len(), 4);
    }
}
