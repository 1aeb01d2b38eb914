//! One boot: the virtual machine from its start to its power-off, and how it ended.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{kernel::Kernel, plan};

/// The emulator, and the package it comes in.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// How much longer than the guest's own deadline the machine may take: for a kernel that has stopped, which has no
/// deadline of its own.
const GRACE: Duration = Duration::from_secs(30);

/// A machine and what it starts with.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    /// The kernel.
    pub(super) kernel: &'a Kernel,
    /// The file of the initramfs.
    pub(super) initramfs: &'a Path,
    /// Added to the kernel's command line.
    pub(super) kernel_args: &'a [&'a str],
    /// How many CPUs it has.
    pub(super) cpus: u32,
    /// How much memory.
    pub(super) memory_mib: u32,
    /// After so long the guest gives up.
    pub(super) deadline: Duration,
}

/// What a machine left behind.
#[derive(Debug)]
pub(super) struct Remains {
    /// The guest's output, tests and all.
    pub(super) output: String,
    /// The kernel's own messages.
    pub(super) console: String,
    /// How it ended.
    pub(super) ending: Ending,
    /// From start to power-off.
    pub(super) took: Duration,
}

/// How a boot ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Ending {
    /// Everything ran and passed.
    Passed,
    /// Everything ran, and not everything passed.
    Failed,
    /// The kernel died, with this message.
    Panicked(String),
    /// It was not over at the deadline; the last line it said.
    Hung(String),
    /// The emulator failed, for this reason.
    NotRun(String),
    /// It powered off without a verdict; the last line it said.
    Silent(String),
}

impl Boot<'_> {
    /// Runs the machine; its output and its console go to these files.
    pub(super) fn run(&self, output: &Path, console: &Path) -> Result<Remains> {
        // What an earlier boot left must not be taken for this one's.
        for file in [output, console] {
            fs::write(file, "").with_context(|| format!("write {}", file.display()))?;
        }
        let started = Instant::now();
        let mut qemu = self
            .command(output, console)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {QEMU}"))?;
        let status = loop {
            if let Some(status) = qemu.try_wait().context("wait for the machine")? {
                break Some(status);
            }
            if started.elapsed() > self.deadline + GRACE {
                qemu.kill().context("end the machine")?;
                qemu.wait().context("wait for the machine")?;
                break None;
            }
            thread::sleep(Duration::from_millis(20));
        };
        let took = started.elapsed();
        let complaint = qemu.stderr.take().map(std::io::read_to_string).transpose()?.unwrap_or_default();
        let [output, console] = [output, console].map(|file| {
            // A console is bytes, not always text.
            let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
            Ok::<_, anyhow::Error>(String::from_utf8_lossy(&bytes).replace('\r', ""))
        });
        let (output, console) = (output?, console?);
        let ending = match status {
            Some(status) if !status.success() => Ending::NotRun(format!("{status}: {}", complaint.trim())),
            status => ending(&output, &console, status.is_some()),
        };
        Ok(Remains { output, console, ending, took })
    }

    fn command(&self, output: &Path, console: &Path) -> Command {
        let emulation = self.kernel.emulation();
        let mut command = Command::new(QEMU);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-m").arg(self.memory_mib.to_string());
        command.args(["-accel", "tcg,thread=multi", "-cpu", emulation.cpu, "-smp", &self.cpus.to_string()]);
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(self.initramfs);
        // An oops is a panic, and a panic a reboot, which QEMU takes for the end.
        let kernel_args = ["console=ttyS0", "loglevel=5", "oops=panic", "panic=-1"];
        command.arg("-append").arg([&kernel_args, self.kernel_args].concat().join(" "));
        for line in [console, output] {
            command.arg("-serial").arg(format!("file:{}", line.display()));
        }
        command
    }
}

/// Judges a boot by what it said and whether it ended by itself.
fn ending(output: &str, console: &str, by_itself: bool) -> Ending {
    let last_line = || {
        let said = if output.trim().is_empty() { console } else { output };
        said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("nothing was said").to_owned()
    };
    let said = |wanted: &str| output.lines().any(|line| line == wanted);
    if said(plan::verdict(true)) {
        Ending::Passed
    } else if let Some((before, _)) = output.split_once(plan::DEADLINE) {
        let last = before.lines().map(str::trim).rfind(|line| !line.is_empty());
        Ending::Hung(last.unwrap_or("nothing was said").to_owned())
    } else if said(plan::verdict(false)) {
        Ending::Failed
    } else if let Some(message) = panic_in(console) {
        Ending::Panicked(message.to_owned())
    } else if by_itself {
        Ending::Silent(last_line())
    } else {
        Ending::Hung(last_line())
    }
}

/// The first line of the kernel's last words.
fn panic_in(console: &str) -> Option<&str> {
    const SIGNS: [&str; 6] =
        ["Oops: ", "BUG: ", "double fault: ", "general protection fault", "invalid opcode: ", "Kernel panic"];
    console.lines().map(without_time).find(|line| SIGNS.iter().any(|sign| line.contains(sign)))
}

/// Lines in which the kernel complains and lives on.
pub(super) fn complaints_in(console: &str) -> Vec<String> {
    const SIGNS: [&str; 5] = ["WARNING: ", "BUG: ", "INFO: task ", "rcu: INFO: ", "soft lockup"];
    let complaint = |line: &&str| SIGNS.iter().any(|sign| line.contains(sign));
    console.lines().map(without_time).filter(complaint).map(str::to_owned).collect()
}

/// A kernel message without the time before it.
fn without_time(line: &str) -> &str {
    match line.trim().strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((time, message)) if time.trim().parse::<f64>().is_ok() => message,
        _ => line.trim(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn tells_how_a_boot_ended() {
        let passed = format!("test a ... ok\n{}\n", plan::verdict(true));
        let failed = format!("test a ... FAILED\n{}\n", plan::verdict(false));
        let late = format!("test a ... \n{} of 9 s has passed\n{}\n", plan::DEADLINE, plan::verdict(false));
        let panic =
            "[    0.7] quiet\n[    1.5] BUG: kernel NULL pointer dereference\n[    1.5] Kernel panic - not";
        let bug = || Ending::Panicked("BUG: kernel NULL pointer dereference".into());
        for (output, console, by_itself, expected) in [
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
            ("", "[    0.7] fine\n\n", true, Ending::Silent("[    0.7] fine".into())),
            ("", "", true, Ending::Silent("nothing was said".into())),
        ] {
            assert_eq!(ending(output, console, by_itself), expected, "{output:?} {console:?} {by_itself}");
        }
    }

    #[test]
    fn finds_complaints_and_nothing_else() {
        let console = "[    0.1] x86/cpu: fine\n[   20.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!\n\
                       [   21.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1\nrcu: INFO: rcu_preempt stall\n";
        assert_eq!(
            complaints_in(console),
            [
                "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
                "WARNING: CPU: 0 PID: 1 at net/core/dev.c:1",
                "rcu: INFO: rcu_preempt stall",
            ]
        );
    }

    #[test]
    fn a_machine_is_what_the_boot_says() {
        let kernel = Kernel {
            version: "6.12.117".into(),
            image: PathBuf::from("image"),
            modules: Vec::new(),
            is_known: false,
        };
        let boot = Boot {
            kernel: &kernel,
            initramfs: Path::new("root"),
            kernel_args: &["lockdown=integrity"],
            cpus: 2,
            memory_mib: 1024,
            deadline: Duration::ZERO,
        };
        let command = boot.command(Path::new("out"), Path::new("console"));
        let args: Vec<&str> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        let after = |option: &str| args[args.iter().position(|arg| *arg == option).unwrap() + 1];
        for (option, value) in [
            ("-smp", "2"),
            ("-m", "1024"),
            ("-cpu", "qemu64,-cx16"),
            ("-kernel", "image"),
            ("-initrd", "root"),
            ("-append", "console=ttyS0 loglevel=5 oops=panic panic=-1 lockdown=integrity"),
            // The first serial line is the console.
            ("-serial", "file:console"),
        ] {
            assert_eq!(after(option), value);
        }
    }
}
