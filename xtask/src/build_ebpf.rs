//! `cargo xtask build-ebpf`: the eBPF programs, compiled, linked, without DWARF, at `bpf/selfconn-hooks` in the target
//! directory, with the fingerprint of their sources beside it.

use std::{env, fs, path::Path, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    environment, fingerprint,
    progress::{self, say},
    strip,
    toolchain::{self, Linker, Machine, Rust},
    workspace::{Workspace, here, write_if_changed},
};

/// The byte order of this host, which is that of its kernel's BPF.
const TARGET: &str = if cfg!(target_endian = "little") { "bpfel-unknown-none" } else { "bpfeb-unknown-none" };

/// Builds the object, or finds it up to date.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let began = Instant::now();
    // Before the compiler reads them: what is edited meanwhile makes the object stale.
    let sources =
        fingerprint::of_sources(&workspace.root).context("take the fingerprint of the eBPF sources")?;
    let mut machine = Machine::default();
    let object = loop {
        let (rust, linker) = toolchain::setup::ready(workspace, &mut machine)?;
        let (path, llvm) = (here(&linker.path), rust.llvm);
        say(format!("eBPF by {} ({}), {path} {}", rust.name, rust.release, linker.version));
        match compile(workspace, &rust, &linker)? {
            Ok(object) => break object,
            Err(why) => {
                say(format!("not {path}: it can't link what a rustc with LLVM {llvm} makes: {why}"));
                machine.failed.insert(linker.path.display().to_string(), why);
            }
        }
    };
    let path = workspace.object();
    write_if_changed(&path, &object)?;
    write_if_changed(&path.with_extension("source"), format!("{sources}\n").as_bytes())?;
    let (size, took) = (object.len().div_ceil(1024), progress::seconds(began.elapsed()));
    say(format!("{}: {size} KiB, sha256 {}, {took}", here(&path), &fingerprint::of_bytes(&object)[..12]));
    Ok(())
}

/// The object without DWARF. The inner error: this linker, of which we knew no better, is not fit for this compiler.
fn compile(workspace: &Workspace, rust: &Rust, linker: &Linker) -> Result<Result<Vec<u8>, String>> {
    const WHAT: &str = "compiling the eBPF programs";
    let target_dir = workspace.target.join("ebpf");
    let mut cargo = environment::other(rust.bin.join("cargo"));
    cargo
        .args(["build", "--package", "selfconn-ebpf", "--bin", "selfconn-hooks", "--profile", "ebpf"])
        .args(["-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .current_dir(&workspace.root)
        .env("RUSTC", rust.bin.join("rustc"))
        // What build-std and the BPF target need is unstable; a nightly minds this no more than a stable compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(workspace, rust, linker)?.join("\x1f"));
    let finished = progress::run(WHAT, cargo, None)?;
    if !finished.succeeded() && !linker.ours && finished.output.contains("linking with `") {
        return Ok(Err(finished.why()));
    }
    finished.must_have_succeeded(WHAT)?;
    finished.show_warnings();
    let linked = target_dir.join(TARGET).join("ebpf/selfconn-hooks");
    let raw = fs::read(&linked).with_context(|| format!("read {}", linked.display()))?;
    match strip::dwarf(&raw) {
        Err(why) if !linker.ours => Ok(Err(format!("{why:#}"))),
        stripped => stripped.map(Ok),
    }
}

fn rustflags(workspace: &Workspace, rust: &Rust, linker: &Linker) -> Result<Vec<String>> {
    let utf8 = |path: &Path| {
        path.to_str().map(ToOwned::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
    };
    let mut flags = vec![
        format!("-Clinker={}", utf8(&linker.path)?),
        "-Clink-arg=--btf".to_owned(),
        // aya-ebpf: whose registers a kprobe reads.
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
    ];
    // The same sources give the same object wherever they lie: BTF has the names of source files.
    let library = rust.sysroot.join("lib/rustlib/src/rust");
    let mut remaps = vec![(workspace.root.clone(), "."), (library.clone(), "/rust")];
    // A distribution's link to where its sources really are.
    remaps.extend(fs::canonicalize(&library).ok().map(|real| (real, "/rust")));
    let cargo_home =
        env::var_os("CARGO_HOME").map(Into::into).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let registries = cargo_home.map(|home| home.join("registry/src"));
    for registry in registries.iter().flat_map(fs::read_dir).flatten().flatten() {
        remaps.push((registry.path(), "/cargo"));
    }
    for (from, to) in remaps {
        flags.push(format!("--remap-path-prefix={}={to}", utf8(&from)?));
    }
    Ok(flags)
}
