//! `cargo xtask build-ebpf`: the eBPF programs, compiled, linked, without DWARF, in `bpf/` of the target directory, with
//! the fingerprint of their sources beside them.

use std::{env, fs, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    environment, fingerprint,
    progress::{self, say},
    remap::{self, utf8},
    strip,
    toolchain::{self, Linker, Machine, Rust},
    workspace::{Workspace, here, write_if_changed},
};

/// The byte order of this host, which is that of its kernel's BPF.
const TARGET: &str = if cfg!(target_endian = "little") { "bpfel-unknown-none" } else { "bpfeb-unknown-none" };

/// The daemon's object, and the one of other agents' programs that tests and measurements need.
const OBJECTS: [&str; 2] = ["selfconn-hooks", "selfconn-test-programs"];

/// Builds the objects, or finds them up to date.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let began = Instant::now();
    // Before the compiler reads them: what is edited meanwhile makes the object stale.
    let sources =
        fingerprint::of_sources(&workspace.root).context("take the fingerprint of the eBPF sources")?;
    let mut machine = Machine::default();
    let objects = loop {
        let (rust, linker) = toolchain::setup::ready(workspace, &mut machine)?;
        let (path, llvm) = (here(&linker.path), rust.llvm);
        say(format!("eBPF by {} ({}), {path} {}", rust.name, rust.release, linker.version));
        match compile(workspace, &rust, &linker)? {
            Ok(objects) => break objects,
            Err(why) => {
                say(format!("not {path}: it can't link what a rustc with LLVM {llvm} makes: {why}"));
                machine.failed.insert(linker.path.display().to_string(), why);
            }
        }
    };
    for (name, object) in OBJECTS.into_iter().zip(objects) {
        let path = workspace.object(name);
        write_if_changed(&path, &object)?;
        let (size, hash) = (object.len().div_ceil(1024), &fingerprint::of_bytes(&object)[..12]);
        say(format!("{}: {size} KiB, sha256 {hash}", here(&path)));
    }
    write_if_changed(&workspace.object("source"), format!("{sources}\n").as_bytes())?;
    say(format!("eBPF: ready, {}", progress::seconds(began.elapsed())));
    Ok(())
}

/// The objects without DWARF. The inner error: this linker, of which we knew no better, is not fit for this compiler.
fn compile(workspace: &Workspace, rust: &Rust, linker: &Linker) -> Result<Result<Vec<Vec<u8>>, String>> {
    const WHAT: &str = "compiling the eBPF programs";
    let target_dir = workspace.target.join("ebpf");
    let mut cargo = environment::other(rust.bin.join("cargo"));
    cargo
        .args(["build", "--package", "selfconn-ebpf", "--bins", "--profile", "ebpf"])
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
    let mut objects = Vec::new();
    for name in OBJECTS {
        let linked = target_dir.join(TARGET).join("ebpf").join(name);
        let raw = fs::read(&linked).with_context(|| format!("read {}", linked.display()))?;
        match strip::dwarf(&raw) {
            Err(why) if !linker.ours => return Ok(Err(format!("{why:#}"))),
            stripped => objects.push(stripped?),
        }
    }
    Ok(Ok(objects))
}

fn rustflags(workspace: &Workspace, rust: &Rust, linker: &Linker) -> Result<Vec<String>> {
    let mut flags = vec![
        format!("-Clinker={}", utf8(&linker.path)?),
        "-Clink-arg=--btf".to_owned(),
        // aya-ebpf: whose registers a kprobe reads.
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
    ];
    // BTF has the names of source files.
    flags.extend(remap::flags(&workspace.root, &rust.sysroot)?);
    Ok(flags)
}
