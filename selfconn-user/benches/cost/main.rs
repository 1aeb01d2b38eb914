//! What selfconn costs: measures, and says raw samples. `cargo xtask bench` runs it, judges and renders.

mod empty;
mod generate;
mod net;
mod programs;

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: What,
    /// What cargo adds
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum What {
    Generate(generate::Args),
    Empty { methods: Vec<String> },
    Dev { daemon: String, rounds: usize, method: Vec<String> },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        What::Generate(args) => generate::run(&args),
        What::Empty { methods } => {
            let methods: Vec<_> = selfconn::kernel::attach::Method::ALL
                .into_iter()
                .filter(|m| methods.iter().any(|n| n == m.name()))
                .collect();
            empty::run(&methods)
        }
        What::Dev { daemon, rounds, method } => dev(&daemon, rounds, &method),
    }
}

fn start(command: &mut Command) -> Result<Child> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().context("stdout")?);
    out.read_line(&mut line)?;
    std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
    Ok(child)
}

fn dev(daemon: &str, rounds: usize, methods: &[String]) -> Result<()> {
    let net = net::Net::new()?;
    let _stats = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
    let mut table: std::collections::BTreeMap<String, Vec<f64>> = Default::default();
    for _ in 0..rounds {
        for variant in ["ours", "empty"] {
            let mut child = if variant == "ours" {
                let mut command = Command::new(daemon);
                command.args(["run", "--json"]);
                for m in methods {
                    if m == "tp_btf" || m == "perf" {
                        command.args(["--hooks", "tracepoint", "--tracepoint-method", m]);
                    }
                }
                start(&mut command)?
            } else {
                let mut command = Command::new("/proc/self/exe");
                command.arg("empty");
                if methods.is_empty() {
                    command.args(["tp_btf", "perf"]);
                } else {
                    command.args(methods);
                }
                start(&mut command)?
            };
            for (name, kind, to) in [
                ("other", "churn", "127.0.0.2"),
                ("own", "churn", "127.0.0.1"),
                ("refused", "refused", "127.0.0.1"),
                ("selves", "selves", "127.0.0.1"),
            ] {
                let before = programs::of_process(child.id())?;
                let said =
                    net::output(net.own(&["generate", kind, "--to", to, "--count", "5000", "--cpu", "1"]))?;
                let made: generate::Made = serde_json::from_str(&said)?;
                let grown = programs::since(&before, programs::of_process(child.id())?);
                for a in &grown {
                    table
                        .entry(format!("{name:8} {variant:5} {} ns/run", &a.name))
                        .or_default()
                        .push(a.ns as f64 / a.runs as f64);
                }
                table
                    .entry(format!("{name:8} {variant:5} sum ns/conn"))
                    .or_default()
                    .push(grown.iter().map(|a| a.ns).sum::<u64>() as f64 / made.count as f64);
            }
            child.kill()?;
            child.wait()?;
        }
    }
    for (name, mut values) in table {
        values.sort_by(f64::total_cmp);
        println!("{name:40} min {:8.1} med {:8.1}", values[0], values[values.len() / 2]);
    }
    Ok(())
}
