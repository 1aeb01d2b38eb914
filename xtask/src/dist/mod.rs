//! `cargo xtask dist`: makes the release: for each architecture packages for dpkg and rpm and a tarball around one
//! static binary, and bills of materials; and checksums of all.
//!
//! The same commit gives the same bytes on any machine with the same compiler and packages. `--check` builds
//! it again from a clone elsewhere and compares.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    architecture::{self, Architecture},
    build_ebpf,
    environment::plain,
    fingerprint, packages,
    run::{self, say, seconds_since},
    workspace::{Workspace, here},
};

pub(crate) mod binary;
mod check;
mod deb;
mod dependencies;
mod release;
pub(crate) mod rpm;
mod signing_key;
mod staged;
mod tarball;
mod tools;
mod tree;

pub(crate) use self::{deb::Deb, release::Release, tree::Tree};

/// Options of `cargo xtask dist`.
#[derive(Debug, clap::Args)]
pub(crate) struct DistArgs {
    /// Build it a second time, from a clone in another directory, and compare the checksums
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    architectures: ArchitectureArgs,
}

/// The architectures that a command builds for.
#[derive(Debug, clap::Args)]
pub(crate) struct ArchitectureArgs {
    /// The architectures to build for; by default this machine's
    #[arg(long, value_name = "NAME", value_parser = architecture::NAMES)]
    arch: Vec<String>,
}

impl ArchitectureArgs {
    /// Sorted, each once.
    pub(crate) fn all(&self) -> Result<Vec<&'static Architecture>> {
        if self.arch.is_empty() {
            return Ok(vec![Architecture::named(None)?]);
        }
        let mut names = self.arch.clone();
        names.sort();
        names.dedup();
        names.iter().map(|name| Architecture::named(Some(name))).collect()
    }
}

const LICENCES: [&str; 3] = ["LICENSE-MIT", "LICENSE-APACHE", "LICENSE-GPL2"];

/// Programs, and their packages.
const PROGRAMS: [(&str, &str); 4] =
    [("lintian", "lintian"), ("xz", "xz-utils"), ("zsh", "zsh"), ("fish", "fish")];

/// Makes the release, or checks that a second build gives the same bytes.
pub(crate) fn run(args: &DistArgs, workspace: &Workspace) -> Result<()> {
    let start = Instant::now();
    let architectures = args.architectures.all()?;
    if args.check {
        check::run(workspace, &architectures)?;
    } else {
        make(workspace, &architectures)?;
    }
    say(format!("done in {}", seconds_since(start)));
    signing_key::check(workspace)
}

fn make(workspace: &Workspace, architectures: &[&'static Architecture]) -> Result<()> {
    let directory = workspace.target.join("dist");
    Tree::empty(&directory)?;
    let mut files = Vec::new();
    for parts in ReleaseParts::build_all(workspace, architectures)? {
        let deb = Deb::build(workspace, &parts, 1, &directory)?;
        deb.lint()?;
        let rpm = rpm::build(workspace, &parts, 1, &directory)?;
        files.extend([deb.file, rpm, tarball::build(&parts, &directory)?]);
        files.extend(dependencies::bills_of_materials(workspace, &parts.release, &directory)?);
    }
    // The bill of the programs in the kernel is of no architecture.
    files.sort();
    files.dedup();

    // In the format of `sha256sum --check`.
    let mut sums = String::new();
    for file in files {
        let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        sums += &format!("{}  {name}\n", fingerprint::of_bytes(&bytes));
        say(format!("{}: {} KiB", here(&file), bytes.len().div_ceil(1024)));
    }
    fs::write(directory.join("SHA256SUMS"), sums).context("write SHA256SUMS")
}

/// The unpacked tarball, from which an image is built.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) directory: PathBuf,
    pub(crate) release: Release,
}

/// Makes the files of each tarball without the archive.
pub(crate) fn unpacked(
    workspace: &Workspace,
    architectures: &[&'static Architecture],
) -> Result<Vec<Unpacked>> {
    let all = ReleaseParts::build_all(workspace, architectures)?.into_iter();
    all.map(|parts| Ok(Unpacked { directory: tarball::fill(&parts)?, release: parts.release })).collect()
}

/// What the packages are made of.
#[derive(Debug)]
pub(crate) struct ReleaseParts {
    pub(crate) release: Release,
    /// The repository.
    root: PathBuf,
    /// A directory for intermediate files.
    work: PathBuf,
    binary: PathBuf,
    /// The directory of man pages and completions.
    pages: PathBuf,
    /// The licences of the crates in the binary.
    notices: String,
}

impl ReleaseParts {
    pub(crate) fn build(workspace: &Workspace, architecture: &'static Architecture) -> Result<Self> {
        Self::build_all(workspace, &[architecture])?.pop().context("no architecture")
    }

    /// Those of each of these architectures.
    fn build_all(workspace: &Workspace, architectures: &[&'static Architecture]) -> Result<Vec<Self>> {
        packages::install_programs(&PROGRAMS)?;
        build_ebpf::build(workspace)?;
        let work = workspace.target.join("package");
        let pages = binary::pages(workspace, &work)?;
        check_completions(&pages)?;
        let notices = dependencies::notices(workspace)?;
        let of = |architecture: &&'static Architecture| {
            Ok(Self {
                release: Release::current(workspace, architecture)?,
                root: workspace.root.clone(),
                work: work.clone(),
                binary: binary::build(workspace, architecture, &work.join("build"))?,
                pages: pages.clone(),
                notices: notices.clone(),
            })
        };
        architectures.iter().map(of).collect()
    }

    /// Each man page: name and path.
    fn man_pages(&self) -> Result<Vec<(String, PathBuf)>> {
        files_in(&self.pages.join("man"))
    }

    /// Examples for operators: alert rules, dashboards, the mixin of both, drop-ins of the unit.
    fn examples(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut all = Vec::new();
        for folder in ["prometheus", "grafana", "mixin", "shipping", "systemd/examples"] {
            let files = files_in(&self.root.join("packaging").join(folder))?;
            // The tests of the rules are not for operators.
            let files = files.into_iter().filter(|(name, _)| !name.contains("test"));
            all.extend(files.map(|(name, path)| (format!("{folder}/{name}"), path)));
        }
        Ok(all)
    }

    /// The manifests for Kubernetes, in the same folders as in the repository.
    fn manifests(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut all = Vec::new();
        for folder in ["kubernetes", "kubernetes/guard", "kubernetes/prometheus-operator"] {
            let files = files_in(&self.root.join("packaging").join(folder))?;
            all.extend(files.into_iter().map(|(name, path)| (format!("{folder}/{name}"), path)));
        }
        Ok(all)
    }

    /// The documents, in the same folders as in the repository, so that links between them work.
    fn documents(&self) -> Result<Vec<(String, PathBuf)>> {
        let top = ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md"];
        let mut all: Vec<_> = top.map(|name| (name.to_owned(), self.root.join(name))).into();
        let docs = files_in(&self.root.join("docs"))?;
        all.extend(docs.into_iter().map(|(name, path)| (format!("docs/{name}"), path)));
        Ok(all)
    }
}

/// Each shell parses its completions. fish is also asked for one; the CLI tests ask bash.
fn check_completions(pages: &Path) -> Result<()> {
    for (shell, options, name) in [
        ("bash", &["--norc", "-n"][..], "bash/selfconn"),
        ("zsh", &["-f", "-n"], "zsh/_selfconn"),
        ("fish", &["--no-config", "-n"], "fish/selfconn.fish"),
    ] {
        run::output(plain(shell).args(options).arg(pages.join(name)))?;
    }
    let mut fish = plain("fish");
    fish.args(["--no-config", "-c", "source $argv[1]; complete -C 'selfconn do'"]);
    let completions = run::output(fish.arg(pages.join("fish/selfconn.fish")))?;
    ensure!(completions.starts_with("doctor\t"), "fish completes `selfconn do` to {completions:?}");
    Ok(())
}

/// The files in a folder, sorted by name.
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
