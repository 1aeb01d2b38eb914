//! `cargo bench --bench cost`: measures what selfconn costs, compares it with its targets, and prints a
//! table. `cargo xtask bench` prepares and runs it. It needs root.
//!
//! The binary is also the programs that it starts: traffic generators, holders of sockets, and empty eBPF
//! programs to compare with. All traffic is in network namespaces of its own.

mod bind;
mod churn;
mod empty;
mod generate;
mod groups;
mod guard;
mod load;
mod log;
mod measure;
mod net;
mod pairs;
mod proc;
mod programs;
mod report;
mod run_time;
mod scan;
mod socket_crowd;
mod tracer;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::LinkOrder;
use clap::{Parser, Subcommand};
use selfconn::bpf::{attach::Method, bind_method::BindMethod};

use groups::GROUPS;
use measure::Measurement;
use report::{Samples, TargetOutcome};

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct CostCli {
    #[command(subcommand)]
    helper: Option<CostHelper>,
    /// The daemon to measure
    #[arg(long, default_value = env!("CARGO_BIN_EXE_selfconn"))]
    daemon: PathBuf,
    /// Fewer and shorter rounds
    #[arg(long)]
    quick: bool,
    /// Print one JSON object with the rows instead of the table
    #[arg(long)]
    json: bool,
    /// Print only the samples, as one line of JSON
    #[arg(long, conflicts_with_all = ["json", "write"])]
    samples: bool,
    /// Compare the samples in this file, which were taken in a virtual machine, too
    #[arg(long, value_name = "FILE")]
    vm_samples: Option<PathBuf>,
    /// The kernel's version for the table, instead of the running one
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// Write report.json and cost.svg into this directory
    #[arg(long, value_name = "DIRECTORY")]
    report: Option<PathBuf>,
    /// Write the table into docs/benchmarks.md, and the chart into docs/cost.svg
    #[arg(long)]
    write: bool,
    /// cargo bench sets this
    #[arg(long, hide = true)]
    bench: bool,
    /// Only these groups
    #[arg(value_parser = GROUPS.map(|(name, _)| name))]
    groups: Vec<String>,
}

#[derive(Subcommand)]
enum CostHelper {
    /// Make traffic
    Generate(generate::GenerateArgs),
    /// Hold this number of sockets
    Hold { count: usize },
    /// Attach empty programs by these methods; bind-METHOD is one of bind(), lo-first and lo-last on lo
    Empty { methods: Vec<String> },
}

fn main() -> ExitCode {
    let cli = CostCli::parse();
    let result = match &cli.helper {
        Some(CostHelper::Generate(args)) => generate::run(args),
        Some(CostHelper::Hold { count }) => socket_crowd::hold(*count),
        Some(CostHelper::Empty { methods }) => {
            let is_named = |method: &Method| methods.iter().any(|name| name == method.name());
            let is_bind_named =
                |method: &BindMethod| methods.iter().any(|name| *name == bind::bind_method(method.name()));
            empty::run(
                &Method::ALL.into_iter().filter(is_named).collect::<Vec<_>>(),
                BindMethod::ALL.into_iter().find(is_bind_named),
                [(guard::EMPTY_FIRST, LinkOrder::first()), (guard::EMPTY_LAST, LinkOrder::last())]
                    .into_iter()
                    .find_map(|(named, order)| methods.iter().any(|name| name == named).then_some(order)),
            )
        }
        None => measure_and_report(&cli),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cost: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure_and_report(cli: &CostCli) -> Result<()> {
    let start = Instant::now();
    // Logs go into memory, so that no disk is measured.
    let memory = Some(PathBuf::from("/dev/shm")).filter(|path| path.exists()).unwrap_or_else(env::temp_dir);
    let scratch = tempfile::tempdir_in(memory).context("make a directory for logs")?;
    let mut measurement = Measurement::new(&cli.daemon, cli.quick, scratch.path());
    groups::measure(&mut measurement, &cli.groups)?;
    let mut samples = measurement.samples;
    samples.facts.insert("kernel".to_owned(), kernel(cli)?);
    if cli.samples {
        println!("{}", serde_json::to_string(&samples)?);
        return Ok(());
    }
    let vm_samples = cli.vm_samples.as_deref().map(read_samples).transpose()?;
    let rows = report::rows_of(&samples, vm_samples.as_ref());
    ensure!(!rows.is_empty(), "nothing was measured");
    let machine = machine(&samples)?;
    let (table, chart) = (report::markdown(&machine, &samples, &rows), report::svg(&rows));
    let json =
        serde_json::json!({ "machine": machine, "rows": rows, "samples": samples, "vm_samples": vm_samples });
    if let Some(directory) = &cli.report {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        write(&directory.join("report.json"), &serde_json::to_string_pretty(&json)?)?;
        write(&directory.join("cost.svg"), &chart)?;
    }
    if cli.write {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let page = docs.join("benchmarks.md");
        let text = fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))?;
        let text = report::with_section(&text, &format!("\n{table}\n"));
        write(&page, &text.context("docs/benchmarks.md has no markers cost:begin and cost:end")?)?;
        write(&docs.join("cost.svg"), &chart)?;
    }
    if cli.json {
        println!("{json}");
    } else {
        print!("{table}");
    }
    let count = |outcome| rows.iter().filter(|row| row.outcome == outcome).count();
    eprintln!(
        "cost: {} met, {} not met, {} undecided, {} skipped, in {} s",
        count(TargetOutcome::Met),
        count(TargetOutcome::NotMet),
        count(TargetOutcome::Undecided),
        count(TargetOutcome::Skipped),
        start.elapsed().as_secs(),
    );
    Ok(())
}

fn read_samples(file: &Path) -> Result<Samples> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", file.display()))
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

fn kernel(cli: &CostCli) -> Result<String> {
    let running = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    Ok(cli.kernel.clone().unwrap_or_else(|| report::short_version(running.trim()).to_owned()))
}

/// The machine, for the table.
fn machine(samples: &Samples) -> Result<String> {
    let fact = |name: &str| samples.facts.get(name).map(String::as_str);
    let cpus = thread::available_parallelism().context("count the CPUs")?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |model| model.trim_start_matches(['\t', ':', ' ']));
    let methods = fact("methods").map_or(String::new(), |methods| format!(", {methods} attached"));
    Ok(format!("kernel {}, {cpus} CPUs ({model}){methods}", fact("kernel").unwrap_or("unknown")))
}
