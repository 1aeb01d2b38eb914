//! `cargo xtask service`: the Debian package under the real systemd. A Debian system of the kind that this machine is
//! boots in QEMU, wholly in memory; a program in it installs the package, lives through a year in a minute (a
//! self-connection, a rotation, a kill, an upgrade), removes and purges it, and says a line for each step.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    binaries,
    boot::{Boot, Ending},
    initramfs::Initramfs,
    stock::Stock,
};
use crate::{
    dist::{Deb, Kit},
    environment::is_in_path,
    packages,
    progress::{say, seconds},
    workspace::{Workspace, here},
};

mod rootfs;

/// What to boot.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A kernel image, a kernel package, or a version
    #[arg(long, value_name = "PATH|VERSION", default_value = "6.1")]
    kernel: String,
    /// How long the machine may take
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    deadline: u64,
}

/// Beside what `vm` takes.
const TOOLS: [(&str, &str); 2] = [("mmdebstrap", "mmdebstrap"), ("bsdtar", "libarchive-tools")];

/// The program in the guest, and where it is started from.
const GUEST: &str = "selfconn-service-guest";
const UNIT: &str = "/etc/systemd/system/selfconn-service-guest.service";
const WANTED: &str = "/etc/systemd/system/multi-user.target.d/selfconn-service-guest.conf";

/// Where the package lies in the guest, and the one that follows it.
const IN_GUEST: [&str; 2] = ["/packages/first.deb", "/packages/second.deb"];

/// Nobody logs in, and without udev no terminal would ever be said to be there.
const KERNEL_ARGS: [&str; 2] = ["systemd.mask=getty.target", "systemd.mask=serial-getty@ttyS0.service"];

/// The whole system is in it, once as an archive while it starts.
const MEMORY_MIB: u32 = 2048;

/// Builds the package, boots, and judges.
pub(crate) fn run(args: &Args, workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    super::set_up()?;
    let missing = TOOLS.into_iter().filter(|(tool, _)| !is_in_path(tool));
    let missing: Vec<String> = missing.map(|(_, package)| package.to_owned()).collect();
    if !missing.is_empty() {
        packages::install(&missing)?;
    }
    let vm = workspace.target.join("vm");
    let directory = workspace.target.join("service");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let stock = Stock::get(std::slice::from_ref(&args.kernel), &vm)?;
    let kernel = stock.kernels.first().context("no kernel")?;
    let kit = Kit::for_deb(workspace)?;
    let debs = [1, 2].map(|revision| Deb::build(&kit, revision, &directory));
    let guest =
        binaries::build(workspace, &vm.join("build"), &["build", "--package", "xtask", "--bin", GUEST])?;
    let guest = guest.into_iter().find(|program| program.name == GUEST).context("cargo built no guest")?;
    let system = rootfs::get(&directory)?;

    let mut own = Initramfs::new();
    own.file("/init", INIT.as_bytes());
    for module in &kernel.modules {
        own.file(&format!("/modules/{}", file_name(module)), &read(module)?);
    }
    // Numbered, for their order counts: insmod resolves nothing.
    let order: String =
        kernel.modules.iter().map(|module| format!("/modules/{}\n", file_name(module))).collect();
    own.file("/modules/order", order.as_bytes());
    for (name, deb) in IN_GUEST.into_iter().zip(debs) {
        own.file(name, &read(&deb?.file)?);
    }
    own.file(&format!("/usr/sbin/{GUEST}"), &guest.content);
    let unit = format!(
        "[Unit]\nAfter=multi-user.target\n[Service]\nType=simple\nExecStart=/usr/sbin/{GUEST} {}\n",
        args.deadline
    );
    own.file(UNIT, unit.as_bytes());
    own.file(WANTED, format!("[Unit]\nWants={GUEST}.service\n").as_bytes());
    let initramfs = directory.join("initramfs.cpio");
    let bytes = [read(&system)?, own.finish()].concat();
    fs::write(&initramfs, bytes).with_context(|| format!("write {}", initramfs.display()))?;

    say(format!("booting Debian's {} in memory", kernel.version));
    let (log, console) = (directory.join("log"), directory.join("console.log"));
    let remains = Boot {
        kernel,
        initramfs: &initramfs,
        kernel_args: &KERNEL_ARGS,
        cpus: kernel.emulation().most_cpus,
        memory_mib: MEMORY_MIB,
        deadline: Duration::from_secs(args.deadline),
    }
    .run(&log, &console)?;
    fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    print!("{}", remains.output);
    if remains.ending != Ending::Passed {
        eprint!("--- the end of {}\n{}---\n", here(&console), last_lines(&remains.console, 40));
        bail!("the service did not pass: {:?}: all of it is in {}", remains.ending, here(&log));
    }
    let steps = remains.output.lines().filter(|line| line.contains(": passed")).count();
    ensure!(steps > 0, "the guest passed without a step");
    say(format!("{steps} steps passed under systemd, in {}", seconds(started.elapsed())));
    Ok(())
}

/// The first program: loads modules, and hands over to systemd on a root that can be pivoted from. That of an
/// initramfs can't (`pivot_root` in `fs/namespace.c` at v6.1), and systemd does so for every service with a view of the
/// file system of its own; a bind mount of it, moved over it, can.
const INIT: &str = "\
#!/bin/sh
mount -t proc proc /proc
while read -r module; do insmod \"$module\" || echo \"$module was refused\"; done </modules/order
umount /proc
mount --bind / /mnt
cd /mnt
mount --move . /
exec chroot . /lib/systemd/systemd
";

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(count);
    lines.get(from..).unwrap_or_default().iter().map(|line| format!("{line}\n")).collect()
}
