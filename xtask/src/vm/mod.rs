//! `cargo xtask vm`: the live tests on other kernels, in virtual machines without an accelerator. A row of
//! the matrix is a kernel in a variant, and one boot.

use std::{path::PathBuf, sync::Mutex, time::Instant};

use anyhow::{Context as _, Result, bail};

use self::{
    emulator::Emulator,
    kernel::Kernel,
    report::{MatrixRow, VmReport},
    rows::RowRunner,
    stock::KernelStock,
    variant::{VARIANTS, Variant},
    whole_run::WholeRun,
};
use crate::{
    architecture::{self, Architecture},
    build_ebpf, packages,
    run::{say, seconds_since},
    workspace::{Workspace, write_if_changed},
};

mod apt;
mod bench;
mod binaries;
mod boot;
mod emulator;
mod facts;
mod flavour;
mod guest;
mod kernel;
mod kernels;
pub(crate) mod reduced;
mod report;
mod rows;
pub(crate) mod service;
mod stock;
mod variant;
mod whole_run;

pub(crate) use bench::measure;

/// How long a machine may take. An emulated processor needs seconds to verify the programs, and most tests load them
/// anew: all of them took 46 minutes on 6.12, on two busy cores.
const DEADLINE_S: u64 = 3_600;

/// The same for a machine of [`SUBSET`], whose tests force the methods: they take eleven minutes on the newest kernel.
const SUBSET_DEADLINE_S: u64 = 1_800;

/// Options of `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct VmArgs {
    /// The whole matrix: every kernel and variant of x86_64, its real-time kernels, two that are not for clouds, and
    /// the kernels of aarch64. It is an error if a kernel can't be had
    #[arg(long, conflicts_with_all = ["kernel", "arch", "variant", "test_args"])]
    all: bool,
    /// Boot only the rows that have not passed in the last run of `--all`, which was stopped or in which a row failed.
    /// The daemon and its programs must be those of that run
    #[arg(long = "continue", requires = "all")]
    continues: bool,
    /// A kernel image (of aarch64: not compressed), a kernel package, or a version such as 6.12, 6.12-rt (real-time),
    /// 6.12-generic (not for clouds) or, on aarch64, 6.12-16k (pages of 16 KiB); by default the newest 5.10, 6.1, 6.12,
    /// 6.18 and 7.x that Debian has, and on aarch64 5.10, 6.1, 6.12-16k and 7.x
    #[arg(long, value_name = "PATH|VERSION")]
    kernel: Vec<String>,
    /// The architecture of the machines; by default this machine's. For another one the programs are cross-compiled
    #[arg(long, value_name = "NAME", value_parser = architecture::NAMES)]
    arch: Option<String>,
    /// How to boot the kernels and which tests to run there; by default all. `rest` is for the architecture's oldest
    /// kernel only
    #[arg(long, value_name = "NAME", value_parser = VARIANTS.map(|variant| variant.name))]
    variant: Vec<String>,
    /// How many CPUs a machine has, also more than this one; by default two, or what the emulator can do
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// How many machines run at the same time
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// How long a machine may take
    #[arg(long, value_name = "SECONDS", default_value_t = DEADLINE_S)]
    deadline: u64,
    /// A variable for the tests; SELFCONN_SCALE divides their counts (default 10; less for the load tests)
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    env: Vec<(String, String)>,
    /// Arguments of the tests, such as a part of their names
    #[arg(last = true, value_name = "TEST-ARGS")]
    test_args: Vec<String>,
}

impl VmArgs {
    /// Of a command that boots these kernels of one architecture.
    fn for_tests(kernel: Vec<String>, test_args: Vec<String>) -> Self {
        Self {
            all: false,
            continues: false,
            kernel,
            arch: None,
            variant: Vec::new(),
            cpus: None,
            jobs: 2,
            deadline: SUBSET_DEADLINE_S,
            env: Vec::new(),
            test_args,
        }
    }

    /// True if the rows are those of all tests under the usual conditions.
    fn has_documented_rows(&self) -> bool {
        self.test_args.is_empty() && self.cpus.is_none() && self.env.is_empty()
    }
}

fn assignment(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once('=').context("not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Programs (and the file of a keyring), and their packages.
const PROGRAMS: [(&str, &str); 6] = [
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("/sbin/modprobe", "kmod"),
    ("bsdtar", "libarchive-tools"),
    (apt::KEYRING, "debian-archive-keyring"),
];

/// Runs all rows. It is an error if one did not pass.
pub(crate) fn run(args: &VmArgs, workspace: &Workspace) -> Result<()> {
    let start = Instant::now();
    packages::install_programs(&PROGRAMS)?;
    let parts = MatrixPart::of(args)?;
    let whole = match (args.all && args.has_documented_rows(), args.continues) {
        (true, true) => Some(WholeRun::of_last(&directory(workspace), workspace)?),
        (true, false) => Some(WholeRun::begin(&directory(workspace), workspace)?),
        (false, true) => bail!("--continue is for the rows of all tests under the usual conditions"),
        (false, false) => None,
    };
    let mut all = VmReport::default();
    let mut error = None;
    for part in &parts {
        match part.run(args, whole.as_ref(), workspace) {
            Ok(report) => {
                all.rows.extend(report.rows);
                all.skipped.extend(report.skipped);
            }
            // The other parts are not thrown away for it.
            Err(of_part) => {
                say(format!("{}: {of_part:#}", part.architecture.name));
                error = Some(of_part);
            }
        }
    }
    if parts.len() > 1 {
        println!("{}", all.render());
    }
    let file = directory(workspace).join("report.json");
    write_if_changed(&file, &serde_json::to_vec_pretty(&all)?)?;
    error.map_or(Ok(()), Err)?;
    all.check()?;
    if args.all {
        all.check_complete()?;
    }
    if let Some(whole) = whole {
        kernels::note_whole_run(&tables(workspace), &kernels::today()?, &whole.summary())?;
    }
    say(format!("{} rows passed in {}", all.rows.len(), seconds_since(start)));
    Ok(())
}

/// The file with the tables of the kernels.
fn tables(workspace: &Workspace) -> PathBuf {
    workspace.root.join("docs/kernels.md")
}

/// The rows of one architecture. They are booted together, so that no machine waits for the last one of another group.
struct MatrixPart {
    architecture: &'static Architecture,
    groups: Vec<KernelGroup>,
}

/// Kernels in the same variants.
struct KernelGroup {
    /// By default the architecture's.
    kernels: Vec<String>,
    variants: Vec<&'static Variant>,
}

impl MatrixPart {
    fn of(args: &VmArgs) -> Result<Vec<Self>> {
        if args.all {
            return Ok(Self::all());
        }
        let architecture = Architecture::named(args.arch.as_deref())?;
        let variants = variant::named(&args.variant);
        let groups = vec![KernelGroup { kernels: args.kernel.clone(), variants }];
        Ok(vec![Self { architecture, groups }])
    }

    /// The whole matrix.
    fn all() -> Vec<Self> {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let of = |architecture: &'static Architecture| {
            let default = vec![&VARIANTS[0]];
            let groups = [
                (architecture.kernels, variant::named(&owned(architecture.variants))),
                (architecture.real_time_kernels, default),
                (architecture.generic_kernels, vec![&variant::QUICK]),
            ];
            let groups = groups.into_iter().filter(|(kernels, _)| !kernels.is_empty());
            let group = |(kernels, variants)| KernelGroup { kernels: owned(kernels), variants };
            Self { architecture, groups: groups.map(group).collect() }
        };
        architecture::ALL.map(of).into()
    }

    /// Boots the rows that have not passed yet in the whole run. A row that passes is written to docs/kernels.md.
    fn run(&self, args: &VmArgs, whole: Option<&WholeRun>, workspace: &Workspace) -> Result<VmReport> {
        let Self { architecture, groups } = self;
        Emulator::find_or_fetch(workspace, architecture)?;
        let stock = |group: &KernelGroup| {
            let (wanted, directory) = (&group.kernels, directory(workspace));
            if args.all {
                // A kernel that can't be had is an error after all others ran.
                return Ok(KernelStock::get_available(wanted, architecture, &directory));
            }
            KernelStock::get_all(wanted, architecture, &directory)
        };
        let stocks: Vec<_> = groups.iter().map(stock).collect::<Result<_>>()?;
        let mut rows: Vec<_> =
            groups.iter().zip(&stocks).flat_map(|(group, stock)| group.rows(stock, args)).collect();
        // As they stand in the matrix, where the longest come first.
        rows.sort_by_key(|(_, variant)| variant.index());
        let passed = |(kernel, variant): &(&Kernel, &Variant)| whole?.passed(&kernel.label(), variant.name);
        let (mut results, mut left) = (Vec::new(), Vec::new());
        for row in rows {
            match passed(&row) {
                Some(result) => results.push(result),
                None => left.push(row),
            }
        }
        let skipped = stocks.iter().flat_map(|stock| stock.skipped.clone()).collect();
        if left.is_empty() && !results.is_empty() {
            return Ok(VmReport { rows: results, skipped });
        }
        let writing = Mutex::new(());
        let report = boot(args, architecture, &left, skipped, workspace, |kernel, row| {
            // One at a time, because the rows of a table are replaced by a new file.
            let _guard = writing.lock();
            whole.map_or(Ok(()), |whole| whole.add(row))?;
            // A kernel that was given as a file may be any; a row that did not pass leaves the documented one.
            if args.has_documented_rows() && kernel.is_known {
                kernels::update(&tables(workspace), &kernels::today()?, [row].into_iter())?;
            }
            Ok(())
        })?;
        results.extend(report.rows);
        Ok(VmReport { rows: results, skipped: report.skipped })
    }
}

impl KernelGroup {
    fn rows<'a>(&'a self, stock: &'a KernelStock, args: &VmArgs) -> Vec<(&'a Kernel, &'static Variant)> {
        let Self { variants, .. } = self;
        variants
            .iter()
            .flat_map(|variant| stock.kernels.iter().map(|kernel| (kernel, *variant)))
            .filter(|(kernel, variant)| !variant.repeats_one_of(variants, kernel))
            // If the user names tests, there are no other tests for the oldest kernel to run.
            .filter(|(kernel, variant)| {
                !variant.at_oldest || (kernel.is_oldest() && args.test_args.is_empty())
            })
            .collect()
    }
}

/// The rows of `cargo xtask test`: on the oldest and the newest kernel the tests that force the methods, on the newest
/// also under the strictest lockdown, and on one kernel of the other architecture. Returns what can't be had here, with
/// the reason. It is an error if a row did not pass.
pub(crate) fn run_subset(workspace: &Workspace) -> Result<Vec<String>> {
    let own = Architecture::named(None)?;
    let mut skipped = boot_subset(workspace, own, &SUBSET, true)?;
    skipped.extend(boot_subset(workspace, own.other(), &OTHER_SUBSET, false)?);
    Ok(skipped)
}

fn boot_subset(
    workspace: &Workspace,
    architecture: &'static Architecture,
    kernels: &[&str],
    lockdown: bool,
) -> Result<Vec<String>> {
    let kernels = kernels.iter().map(|kernel| (*kernel).to_owned()).collect();
    let args = VmArgs::for_tests(kernels, Vec::new());
    // If packages or kernels can't be had, the tested code is not at fault.
    let install = || {
        packages::install_programs(&PROGRAMS)?;
        binaries::prepare(architecture)?;
        Emulator::find_or_fetch(workspace, architecture)?;
        guest::busybox(workspace, architecture)
    };
    if let Err(error) = install() {
        return Ok(vec![format!("machines of {}: {error:#}", architecture.name)]);
    }
    let stock = KernelStock::get_available(&args.kernel, architecture, &directory(workspace));
    let skipped = stock.skipped.iter().map(|(kernel, why)| format!("kernel {kernel}: {why}")).collect();
    let unchanged = stock.kernels.iter().map(|kernel| (kernel, &variant::QUICK));
    let locked = stock.kernels.last().filter(|_| lockdown).map(|newest| (newest, &variant::STRICTEST));
    let rows: Vec<_> = unchanged.chain(locked).collect();
    if !rows.is_empty() {
        let ended = |_: &Kernel, _: &MatrixRow| Ok(());
        boot(&args, architecture, &rows, stock.skipped.clone(), workspace, ended)?.check()?;
    }
    Ok(skipped)
}

/// The oldest series and the newest.
const SUBSET: [&str; 2] = ["5.10", "7"];

/// Of the other architecture.
const OTHER_SUBSET: [&str; 1] = ["6.12"];

fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("vm")
}

/// Boots the rows, and prints the report. `ended` is called at the end of each.
fn boot(
    args: &VmArgs,
    architecture: &'static Architecture,
    rows: &[(&Kernel, &Variant)],
    skipped: Vec<(String, String)>,
    workspace: &Workspace,
    ended: impl Fn(&Kernel, &MatrixRow) -> Result<()> + Sync,
) -> Result<VmReport> {
    build_ebpf::build(workspace)?;
    let report = VmReport { rows: RowRunner::new(args, architecture, workspace)?.run(rows, ended)?, skipped };
    println!("{}", report.render());
    Ok(report)
}

/// The architecture, the kernel and the other arguments of the commands that boot the whole matrix, one for each kernel.
#[cfg(test)]
pub(crate) fn arguments_of_all() -> Vec<(&'static str, String, String)> {
    let mut all = Vec::new();
    for MatrixPart { architecture, groups } in MatrixPart::all() {
        for KernelGroup { kernels, variants } in groups {
            let named = variants.iter().map(|variant| format!("--variant {}", variant.name));
            let mut arguments: Vec<_> =
                if variants.len() == VARIANTS.len() { vec![] } else { named.collect() };
            // One with fewer tests than the documented variant of its name.
            let has_fewer =
                |variant: &&&Variant| variant.parts.len() < VARIANTS[variant.index().unwrap()].parts.len();
            arguments.extend(
                variants.iter().find(has_fewer).map(|quick| format!("-- {}", quick.parts[0].args.join(" "))),
            );
            all.extend(kernels.into_iter().map(|kernel| (architecture.name, kernel, arguments.join(" "))));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct VmCli {
        #[command(flatten)]
        args: VmArgs,
    }

    fn args(line: &[&str]) -> VmArgs {
        VmCli::try_parse_from([&["vm"], line].concat()).unwrap().args
    }

    #[test]
    fn only_rows_of_all_tests_under_the_usual_conditions_are_documented() {
        for (line, is_documented) in [
            ([].as_slice(), true),
            (&["--all"], true),
            (&["--kernel", "6.1", "--variant", "default"], true),
            (&["--env", "SELFCONN_SCALE=100"], false),
            (&["--cpus", "2"], false),
            (&["--", "kernel::"], false),
        ] {
            assert_eq!(args(line).has_documented_rows(), is_documented, "{line:?}");
        }
    }

    #[test]
    fn the_whole_matrix_has_each_flavour_in_its_variants() {
        let parts = MatrixPart::of(&args(&["--all"])).unwrap();
        let groups =
            parts.iter().flat_map(|part| part.groups.iter().map(|group| (part.architecture.name, group)));
        let groups: Vec<_> = groups
            .map(|(name, group)| {
                let parts = group.variants.iter().map(|variant| (variant.name, variant.parts.len()));
                (name, group.kernels.join(" "), parts.collect::<Vec<_>>())
            })
            .collect();
        let all = VARIANTS.iter().map(|variant| (variant.name, variant.parts.len())).collect::<Vec<_>>();
        let expected = [
            ("x86_64", "5.10 6.1 6.12 6.18 7", all),
            ("x86_64", "6.1-rt 6.12-rt 7-rt", vec![("default", 2)]),
            ("x86_64", "5.10-generic 7-generic", vec![("default", 1)]),
            ("aarch64", "5.10 6.1 6.12-16k 7", vec![("default", 2), ("confidentiality", 1)]),
        ];
        assert_eq!(groups, expected.map(|(name, kernels, variants)| (name, kernels.to_owned(), variants)));
    }
}
