//! `cargo xtask dist`: what is handed to others, in `dist/` of the target directory. A Debian package, a tarball with
//! a binary that needs no libraries, a bill of materials, and the checksums of all.
//!
//! The same commit is to give the same bytes, wherever it is built, as long as compiler and packages of the builder are the
//! same; `--check` builds it a second time elsewhere and compares.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use self::{binary::Linking, release::Release, tree::Tree};
use crate::{
    build_ebpf,
    environment::{is_in_path, plain},
    fingerprint, packages,
    progress::{say, seconds},
    workspace::{Workspace, here},
};

mod binary;
mod check;
mod crates;
mod deb;
mod notices;
mod release;
mod sbom;
mod tarball;
mod tool;
mod tree;

pub(crate) use deb::Deb;

/// What to make of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Build it a second time, from a clone in another directory, and compare the checksums
    #[arg(long)]
    check: bool,
}

/// What it takes, and the packages it comes in.
const TOOLS: [(&str, &str); 6] = [
    ("dpkg-deb", "dpkg"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("lintian", "lintian"),
    ("tar", "tar"),
    ("zsh", "zsh"),
    ("fish", "fish"),
];

/// Installs what is missing, or says how to.
fn set_up() -> Result<()> {
    let missing: Vec<String> = TOOLS
        .into_iter()
        .filter(|(tool, _)| !is_in_path(tool))
        .map(|(_, package)| package.to_owned())
        .collect();
    if missing.is_empty() { Ok(()) } else { packages::install(&missing) }
}

/// Makes all of it, or checks that it is made alike elsewhere.
pub(crate) fn run(args: &Args, workspace: &Workspace) -> Result<()> {
    let began = Instant::now();
    set_up()?;
    if args.check {
        check::run(workspace)?;
    } else {
        make(workspace)?;
    }
    say(format!("done in {}", seconds(began.elapsed())));
    Ok(())
}

fn make(workspace: &Workspace) -> Result<()> {
    let kit = Kit::build(workspace, &[Linking::Dynamic, Linking::Static])?;
    let release = &kit.release;
    let directory = workspace.target.join("dist");
    Tree::empty(&directory)?;

    let deb = Deb::build(&kit, 1, &directory)?;
    deb.lint()?;
    let mut made = vec![deb.file];
    made.push(tarball::build(&kit, &directory)?);
    let bill = directory.join(format!("selfconn-{}.cdx.json", release.version));
    fs::write(&bill, sbom::of(release, &kit.crates)?).with_context(|| format!("write {}", bill.display()))?;
    made.push(bill);
    sums(&directory, &made)
}

/// `SHA256SUMS`, as `sha256sum --check` reads it.
fn sums(directory: &Path, files: &[PathBuf]) -> Result<()> {
    let mut sums = String::new();
    for file in files {
        let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        sums += &format!("{}  {name}\n", fingerprint::of_bytes(&bytes));
        say(format!("{}: {} KiB", here(file), bytes.len().div_ceil(1024)));
    }
    let path = directory.join("SHA256SUMS");
    fs::write(&path, sums).with_context(|| format!("write {}", path.display()))
}

/// All that the packages are put together of.
#[derive(Debug)]
pub(crate) struct Kit {
    pub(crate) release: Release,
    /// Of the repository.
    root: PathBuf,
    /// For what is put together here.
    work: PathBuf,
    /// With the libraries of the system.
    dynamic: PathBuf,
    /// Without any; only where it was asked for.
    alone: Option<PathBuf>,
    /// Man pages and completions.
    pages: PathBuf,
    crates: crates::Crates,
}

impl Kit {
    /// Builds the binaries and the pages.
    fn build(workspace: &Workspace, linkings: &[Linking]) -> Result<Self> {
        let release = Release::of(workspace)?;
        build_ebpf::build(workspace)?;
        let work = workspace.target.join("package");
        let mut binaries = Vec::new();
        for linking in linkings {
            binaries.push(binary::build(workspace, &release, *linking, &work)?);
        }
        let mut binaries = binaries.into_iter();
        let dynamic = binaries.next().context("no binary was asked for")?;
        let pages = binary::pages(workspace, &work)?;
        completions_are_understood(&pages)?;
        let crates = crates::Crates::of(workspace)?;
        Ok(Self {
            release,
            root: workspace.root.clone(),
            work,
            dynamic,
            alone: binaries.next(),
            pages,
            crates,
        })
    }

    /// Name and file of each man page.
    fn man_pages(&self) -> Result<Vec<(String, PathBuf)>> {
        files_in(&self.pages.join("man"))
    }

    /// Alert rules, dashboards, and what can be added to the unit: for operators to copy from.
    fn examples(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut all = Vec::new();
        for folder in ["prometheus", "grafana", "systemd/examples"] {
            let files = files_in(&self.root.join("packaging").join(folder))?;
            // The rules' tests are for us.
            let files = files.into_iter().filter(|(name, _)| !name.contains("test"));
            all.extend(files.map(|(name, path)| (format!("{folder}/{name}"), path)));
        }
        Ok(all)
    }

    /// What there is to read; the links between these files hold where they lie.
    fn documents(&self) -> Result<Vec<(String, PathBuf)>> {
        let top = ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md"];
        let mut all: Vec<_> = top.map(|name| (name.to_owned(), self.root.join(name))).into();
        let docs = files_in(&self.root.join("docs"))?;
        all.extend(docs.into_iter().map(|(name, path)| (format!("docs/{name}"), path)));
        Ok(all)
    }

    /// What the Debian package takes.
    pub(crate) fn for_deb(workspace: &Workspace) -> Result<Self> {
        set_up()?;
        Self::build(workspace, &[Linking::Dynamic])
    }
}

/// Each shell reads its own; fish also says what it would offer. What bash offers is the CLI tests' matter.
fn completions_are_understood(pages: &Path) -> Result<()> {
    let script = |name: &str| pages.join(name);
    for (shell, options, name) in [
        ("bash", &["--norc", "-n"][..], "bash/selfconn"),
        ("zsh", &["-f", "-n"], "zsh/_selfconn"),
        ("fish", &["--no-config", "-n"], "fish/selfconn.fish"),
    ] {
        let mut command = plain(shell);
        command.args(options).arg(script(name));
        tool::run(command)?;
    }
    let mut fish: Command = plain("fish");
    fish.args(["--no-config", "-c", "source $argv[1]; complete -C 'selfconn do'"])
        .arg(script("fish/selfconn.fish"));
    let offered = tool::run(fish)?;
    ensure!(offered.starts_with("doctor\t"), "fish completes `selfconn do` to {offered:?}");
    Ok(())
}

/// The files in a folder, by name.
fn files_in(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    files.sort();
    Ok(files)
}
