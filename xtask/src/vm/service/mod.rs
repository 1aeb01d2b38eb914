//! `cargo xtask service`: the Debian package under the real systemd. A small Debian system boots in QEMU,
//! wholly in memory; `guest.sh` installs, rotates, kills, upgrades, removes and purges there, and prints a
//! line for each step.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    PROGRAMS,
    boot::{Boot, Ending},
    emulator::Emulator,
    guest,
    rows::last_lines,
    stock::KernelStock,
};
use crate::{
    architecture::Architecture,
    dist::{Deb, ReleaseParts, Tree},
    packages,
    run::{say, seconds_since},
    workspace::{Workspace, here},
};

mod rootfs;

/// Options of `cargo xtask service`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServiceArgs {
    /// A kernel image, a kernel package, or a version
    #[arg(long, value_name = "PATH|VERSION", default_value = "6.1")]
    kernel: String,
    /// How long the machine may take
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    deadline: u64,
}

/// The script that systemd runs in the guest.
pub(super) const GUEST: &str = include_str!("guest.sh");

/// Nobody logs in, and without udev the units of terminals would wait for their devices.
const KERNEL_ARGS: [&str; 2] = ["systemd.mask=getty.target", "systemd.mask=serial-getty@ttyS0.service"];

/// The whole system is in memory, and during the boot also its archive.
const MEMORY_MIB: u32 = 2048;

/// PID 1 until systemd: loads modules, and moves to a root that systemd can pivot from, as it does for
/// services with their own view of the file system. The root of an initramfs can't be pivoted from
/// (`pivot_root` in `fs/namespace.c` at v6.1); a bind mount of it that is moved over it can.
pub(super) const INIT: &str = "\
#!/bin/sh
mount -t proc proc /proc
while read -r module; do insmod \"/modules/$module\" || echo \"$module was refused\"; done </modules/order
umount /proc
mount --bind / /mnt
cd /mnt
mount --move . /
exec chroot . /lib/systemd/systemd
";

/// Builds the package twice with different revisions, boots, and reports.
pub(crate) fn run(args: &ServiceArgs, workspace: &Workspace) -> Result<()> {
    let start = Instant::now();
    packages::install_programs(&[&PROGRAMS[..], &[("mmdebstrap", "mmdebstrap")]].concat())?;
    let architecture = Architecture::named(None)?;
    let emulator = Emulator::find_or_fetch(workspace, architecture)?;
    let directory = workspace.target.join("service");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let wanted = std::slice::from_ref(&args.kernel);
    let stock = KernelStock::get_all(wanted, architecture, &super::directory(workspace))?;
    let kernel = stock.kernels.first().context("no kernel")?;
    let parts = ReleaseParts::build(workspace, architecture)?;
    let system = rootfs::get(&directory)?;

    let overlay = Tree::empty(&directory.join("overlay"))?;
    overlay.write("init", 0o755, INIT.as_bytes())?;
    guest::add_modules(&overlay, kernel)?;
    for (revision, name) in [(1, "packages/first.deb"), (2, "packages/second.deb")] {
        overlay.copy(name, 0o644, &Deb::build(workspace, &parts, revision, &directory)?.file)?;
    }
    for name in ["selfconn-reserve.service", "remedy.conf", "guard.conf"] {
        let example = workspace.root.join("packaging/systemd/examples").join(name);
        overlay.copy(&format!("packages/{name}"), 0o644, &example)?;
    }
    overlay.write("usr/sbin/selfconn-service-guest", 0o755, GUEST.as_bytes())?;
    let units = "etc/systemd/system";
    let unit = format!(
        "[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/usr/sbin/selfconn-service-guest {}\n",
        args.deadline
    );
    overlay.write(&format!("{units}/selfconn-service-guest.service"), 0o644, unit.as_bytes())?;
    let wanted = "[Unit]\nWants=selfconn-service-guest.service\n";
    overlay.write(&format!("{units}/multi-user.target.d/guest.conf"), 0o644, wanted.as_bytes())?;
    let initramfs = directory.join("initramfs.cpio");
    // The kernel unpacks both archives, one after another.
    let bytes = [read(&system)?, guest::cpio(&overlay)?].concat();
    fs::write(&initramfs, bytes).with_context(|| format!("write {}", initramfs.display()))?;

    say(format!("booting a Debian system with kernel {} in memory", kernel.version));
    let (log, console) = (directory.join("log"), directory.join("console.log"));
    let boot = Boot {
        emulator: &emulator,
        kernel,
        initramfs: &initramfs,
        kernel_args: &KERNEL_ARGS,
        cpus: kernel.emulation().max_cpus,
        memory_mib: MEMORY_MIB,
        deadline: Duration::from_secs(args.deadline),
    };
    let result = boot.run(&log, &console)?;
    fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    print!("{}", result.output);
    if result.ending != Ending::Passed {
        eprint!("--- the end of {}\n{}---\n", here(&console), last_lines(&result.console, 40));
        bail!("the service did not pass: {:?}: the output is in {}", result.ending, here(&log));
    }
    let steps = result.output.lines().filter(|line| line.contains(": passed: ")).count();
    ensure!(steps > 0, "the guest passed without a step");
    say(format!("{steps} steps passed under systemd, in {}", seconds_since(start)));
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
