//! `cargo xtask build-ebpf`: compiles and links the eBPF programs, and puts them without DWARF into `bpf/` of
//! the target directory, with the fingerprint of their sources.

use std::{fs, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    architecture, environment, fingerprint,
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
    let architectures = architecture::NAMES.join(" and ");
    say(format!("eBPF: ready, the same objects for {architectures}, {}", run::seconds_since(start)));
    Ok(())
}

fn rustflags(workspace: &Workspace, rust: &Rust, linker: &Linker) -> Result<Vec<String>> {
    let mut flags = vec![
        format!("-Clinker={}", utf8(&linker.path)?),
        "-Clink-arg=--btf".to_owned(),
        // aya-ebpf asks for an architecture, for the registers that a kprobe reads. The programs read registers
        // themselves, for each architecture, so the object is the same wherever it is built.
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
    ];
    // BTF contains the paths of source files.
    flags.extend(remap::flags(&workspace.root, &rust.sysroot, "/rust")?);
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _, read::elf::ElfFile64};

    use super::*;

    /// The offsets, in order, of the first two loads of a program through its context, which is in the first register
    /// when it begins.
    fn first_loads(object: &ElfFile64<'_>, program: &str) -> Vec<i16> {
        const CLASS_LDX: u8 = 1;
        const DOUBLE_WORD: u8 = 0x79;
        let symbol = object.symbols().find(|symbol| symbol.name() == Ok(program)).expect(program);
        let section = object.section_by_index(symbol.section_index().expect("a section")).expect("a section");
        let code = section.data().expect("its code");
        let begin = symbol.address() as usize;
        let instructions = code[begin..begin + symbol.size() as usize].chunks_exact(8);
        let loads = instructions.filter(|instruction| instruction[0] & 7 == CLASS_LDX).take(2);
        loads
            .map(|load| {
                assert_eq!(load[0], DOUBLE_WORD, "{program}: {load:?}");
                i16::from_le_bytes([load[2], load[3]])
            })
            .collect()
    }

    /// With an object in which a program reads the registers of another architecture, a kprobe loads and sees
    /// nothing.
    #[test]
    fn the_object_reads_the_registers_of_each_architecture() {
        let workspace = Workspace::find().expect("the workspace");
        let bytes = fs::read(workspace.object(OBJECTS[0])).expect("the object: run cargo xtask build-ebpf");
        let object: ElfFile64<'_> = ElfFile64::parse(&*bytes).expect("the object");
        for (program, registers) in [
            ("selfconn_kprobe", [112, 104]),
            ("selfconn_kprobe_btf_offsets", [112, 104]),
            ("selfconn_kprobe_arm64", [0, 8]),
            ("selfconn_kprobe_arm64_btf_offsets", [0, 8]),
        ] {
            assert_eq!(first_loads(&object, program), registers, "{program}");
        }
    }
}
