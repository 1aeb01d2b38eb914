//! `cargo xtask service`: the packages under the real systemd. A small Debian system boots in QEMU, wholly in memory;
//! `guest.sh` installs, rotates, kills, upgrades, removes and purges there, and prints a line for each step.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    PROGRAMS,
    boot::{Boot, Ending},
    emulator::Emulator,
    guest,
    kernel::Kernel,
    rows::last_lines,
    stock::KernelStock,
};
use crate::{
    architecture::Architecture,
    dist::{Deb, ReleaseParts, Tree, rpm},
    packages,
    run::{say, seconds_since},
    workspace::{Workspace, here},
};

mod rootfs;

/// Options of `cargo xtask service`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServiceArgs {
    /// The systems to boot; all by default
    #[arg(value_name = "SYSTEM", value_parser = SYSTEMS.map(|system| system.name))]
    systems: Vec<String>,
    /// A kernel image, a kernel package, or a version, instead of the one that the system has
    #[arg(long, value_name = "PATH|VERSION")]
    kernel: Option<String>,
    /// How long a machine may take
    #[arg(long, value_name = "SECONDS", default_value_t = 1_800)]
    deadline: u64,
}

/// The format of a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Deb,
    Rpm,
}

impl Format {
    /// The end of a package's name, which is also the name of the format for the script.
    fn extension(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Rpm => "rpm",
        }
    }
}

/// A system, and the package that is tried there.
#[derive(Debug)]
struct System {
    name: &'static str,
    /// Debian's suite.
    suite: &'static str,
    /// The series of the suite's kernel.
    kernel: &'static str,
    format: Format,
    /// That of this machine by default.
    architecture: Option<&'static str>,
}

const SYSTEMS: [System; 5] = [
    System { name: "bullseye", suite: "bullseye", kernel: "5.10", format: Format::Deb, architecture: None },
    System { name: "bookworm", suite: "bookworm", kernel: "6.1", format: Format::Deb, architecture: None },
    System { name: "trixie", suite: "trixie", kernel: "6.12", format: Format::Deb, architecture: None },
    // Debian's with rpm beside dpkg.
    System { name: "rpm", suite: "trixie", kernel: "6.12", format: Format::Rpm, architecture: None },
    System {
        name: "arm64",
        suite: "trixie",
        kernel: "6.12",
        format: Format::Deb,
        architecture: Some("aarch64"),
    },
];

/// The script that systemd runs in the guest.
pub(super) const GUEST: &str = include_str!("guest.sh");

/// Nobody logs in, and without udev the units of terminals would wait for their devices.
fn kernel_args(architecture: &Architecture) -> [String; 3] {
    let serial = |line: &str| format!("systemd.mask=serial-getty@{line}.service");
    ["systemd.mask=getty.target".to_owned(), serial(architecture.console), serial(architecture.output)]
}

/// The whole system is in memory, and during the boot also its archive.
const MEMORY_MIB: u32 = 2560;

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
if [ -e /second-stage ]; then chroot . /second-stage; fi
exec chroot . /lib/systemd/systemd
";

/// Builds the packages twice with different revisions, boots each system, and reports.
pub(crate) fn run(args: &ServiceArgs, workspace: &Workspace) -> Result<()> {
    let start = Instant::now();
    packages::install_programs(&[&PROGRAMS[..], &[("mmdebstrap", "mmdebstrap")]].concat())?;
    let directory = workspace.target.join("service");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let is_wanted =
        |system: &&System| args.systems.is_empty() || args.systems.iter().any(|wanted| wanted == system.name);
    let (mut failed, mut total, mut built) = (Vec::new(), 0, Vec::<ReleaseParts>::new());
    for system in SYSTEMS.iter().filter(is_wanted) {
        match try_system(system, args, workspace, &mut built, &directory) {
            Ok(steps) => total += steps,
            Err(error) => {
                say(format!("{}: {error:#}", system.name));
                failed.push(system.name);
            }
        }
    }
    ensure!(failed.is_empty(), "the service did not pass: {}", failed.join(", "));
    say(format!("{total} steps passed under systemd, in {}", seconds_since(start)));
    Ok(())
}

/// Boots a system, with what is built for its architecture. Returns how many steps passed.
fn try_system(
    system: &System,
    args: &ServiceArgs,
    workspace: &Workspace,
    built: &mut Vec<ReleaseParts>,
    directory: &Path,
) -> Result<usize> {
    let architecture = Architecture::named(system.architecture)?;
    let emulator = Emulator::find_or_fetch(workspace, architecture)?;
    let is_for = |parts: &ReleaseParts| parts.release.architecture == architecture;
    if !built.iter().any(is_for) {
        built.push(ReleaseParts::build(workspace, architecture)?);
    }
    let parts = built.iter().find(|parts| is_for(parts)).context("nothing was built")?;
    let wanted = [args.kernel.clone().unwrap_or_else(|| system.kernel.to_owned())];
    let stock = KernelStock::get_all(&wanted, architecture, &super::directory(workspace))?;
    let kernel = stock.kernels.first().context("no kernel")?;
    let initramfs = initramfs(system, kernel, args.deadline, workspace, parts, directory)?;
    boot(system, &emulator, kernel, &initramfs, args.deadline, directory)
}

/// The system with both revisions of its package and with the script.
fn initramfs(
    system: &System,
    kernel: &Kernel,
    deadline: u64,
    workspace: &Workspace,
    parts: &ReleaseParts,
    directory: &Path,
) -> Result<PathBuf> {
    let root = rootfs::get(directory, system.suite, system.format, parts.release.architecture)?;
    let overlay = Tree::empty(&directory.join("overlay"))?;
    overlay.write("init", 0o755, INIT.as_bytes())?;
    if !parts.release.architecture.is_this_machines() {
        overlay.write("second-stage", 0o755, rootfs::SECOND_STAGE.as_bytes())?;
    }
    guest::add_modules(&overlay, kernel)?;
    let format = system.format.extension();
    for (revision, name) in [(1, "first"), (2, "second")] {
        let file = match system.format {
            Format::Deb => Deb::build(workspace, parts, revision, directory)?.file,
            Format::Rpm => rpm::build(workspace, parts, revision, directory)?,
        };
        overlay.copy(&format!("packages/{name}.{format}"), 0o644, &file)?;
    }
    for name in ["selfconn-reserve.service", "remedy.conf", "guard.conf"] {
        let example = workspace.root.join("packaging/systemd/examples").join(name);
        overlay.copy(&format!("packages/{name}"), 0o644, &example)?;
    }
    overlay.write("usr/sbin/selfconn-service-guest", 0o755, GUEST.as_bytes())?;
    let units = "etc/systemd/system";
    let unit = format!(
        "[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/usr/sbin/selfconn-service-guest {deadline} \
         {format} {}\n",
        parts.release.architecture.output
    );
    overlay.write(&format!("{units}/selfconn-service-guest.service"), 0o644, unit.as_bytes())?;
    let wanted = "[Unit]\nWants=selfconn-service-guest.service\n";
    overlay.write(&format!("{units}/multi-user.target.d/guest.conf"), 0o644, wanted.as_bytes())?;
    let initramfs = directory.join("initramfs.cpio");
    // The kernel unpacks both archives, one after another.
    let bytes = [read(&root)?, guest::cpio(&overlay)?].concat();
    fs::write(&initramfs, bytes).with_context(|| format!("write {}", initramfs.display()))?;
    Ok(initramfs)
}

/// Boots it. Returns how many steps passed.
fn boot(
    system: &System,
    emulator: &Emulator,
    kernel: &Kernel,
    initramfs: &Path,
    deadline: u64,
    directory: &Path,
) -> Result<usize> {
    let name = system.name;
    say(format!(
        "{name}: booting a Debian system ({}) with kernel {} in memory",
        system.suite, kernel.version
    ));
    let kernel_args = kernel_args(kernel.flavour.architecture);
    let [log, console] = ["log", "console.log"].map(|end| directory.join(format!("{name}.{end}")));
    let boot = Boot {
        emulator,
        kernel,
        initramfs,
        kernel_args: &kernel_args.each_ref().map(String::as_str),
        cpus: kernel.emulation().max_cpus,
        memory_mib: MEMORY_MIB,
        deadline: Duration::from_secs(deadline),
    };
    let result = boot.run(&log, &console)?;
    fs::remove_file(initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    print!("{}", result.output);
    if result.ending != Ending::Passed {
        eprint!("--- the end of {}\n{}---\n", here(&console), last_lines(&result.console, 40));
        bail!("{:?}: the output is in {}", result.ending, here(&log));
    }
    let steps = result.output.lines().filter(|line| line.contains(": passed: ")).count();
    ensure!(steps > 0, "the guest passed without a step");
    say(format!("{name}: {steps} steps passed"));
    Ok(steps)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
