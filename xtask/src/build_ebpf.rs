//! `cargo xtask build-ebpf`: compiles and links the eBPF programs, and puts them without DWARF into `bpf/` of
//! the target directory, with the fingerprint of their sources.

use std::{env, fs, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    environment, fingerprint,
    remap::{self, utf8},
    run::{self, say},
    strip,
    toolchain::{self, BPF_LINKER, Linker, Rust},
    workspace::{Workspace, here, write_if_changed},
};

/// BPF has the byte order of the kernel, which is this host's.
const TARGET: &str = if cfg!(target_endian = "little") { "bpfel-unknown-none" } else { "bpfeb-unknown-none" };

/// The daemon's object, and an object with programs for tests and measurements.
const OBJECTS: [&str; 2] = ["selfconn-hooks", "selfconn-test-programs"];

/// Builds the objects, or finds them up to date.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let start = Instant::now();
    // The fingerprint is taken before the compiler runs, so that an edit meanwhile makes the object stale.
    let sources =
        fingerprint::of_sources(&workspace.root).context("take the fingerprint of the eBPF sources")?;
    let (rust, linker) = toolchain::setup::ready(workspace)?;
    say(format!(
        "eBPF by {} ({}), bpf-linker {BPF_LINKER} with LLVM {}",
        rust.name, rust.version, linker.llvm
    ));
    let target_dir = workspace.target.join("ebpf");
    let mut cargo = environment::other(rust.bin.join("cargo"));
    cargo
        .args(["build", "--package", "selfconn-ebpf", "--bins", "--profile", "ebpf"])
        .args(["-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .current_dir(&workspace.root)
        .env("RUSTC", rust.bin.join("rustc"))
        // build-std and the BPF target are unstable. With this a stable compiler accepts them.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(workspace, &rust, &linker)?.join("\x1f"));
    run::step("compiling the eBPF programs", &mut cargo)?;
    for name in OBJECTS {
        let linked = target_dir.join(TARGET).join("ebpf").join(name);
        let raw = fs::read(&linked).with_context(|| format!("read {}", linked.display()))?;
        let object = strip::without_dwarf(&raw)?;
        let path = workspace.object(name);
        write_if_changed(&path, &object)?;
        let (size, hash) = (object.len().div_ceil(1024), &fingerprint::of_bytes(&object)[..12]);
        say(format!("{}: {size} KiB, sha256 {hash}", here(&path)));
    }
    write_if_changed(&workspace.object("source"), format!("{sources}\n").as_bytes())?;
    say(format!("eBPF: ready, {}", run::seconds_since(start)));
    Ok(())
}

fn rustflags(workspace: &Workspace, rust: &Rust, linker: &Linker) -> Result<Vec<String>> {
    let mut flags = vec![
        format!("-Clinker={}", utf8(&linker.path)?),
        "-Clink-arg=--btf".to_owned(),
        // For aya-ebpf: the architecture whose registers a kprobe reads.
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
    ];
    // BTF contains the paths of source files.
    flags.extend(remap::flags(&workspace.root, &rust.sysroot)?);
    Ok(flags)
}
