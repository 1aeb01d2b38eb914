//! buildah and podman from the distribution's packages, unpacked and not installed. They use only directories below
//! target/image. Everything that they made is removed at the end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use rustix::process::{Resource, getrlimit};

use crate::{dist::Tree, environment::plain, packages, run::say, workspace::Workspace};

/// The programs. runc, because crun 1.8 refuses control groups of both versions side by side. The last has the usual
/// seccomp profile.
const PACKAGES: [&str; 5] = ["podman", "buildah", "runc", "conmon", "golang-github-containers-common"];

/// The parent of the containers' control groups.
const CGROUP: &str = "selfconn-image";

/// The cache that both programs keep, whatever the configuration says, and the directories that they make for it.
const CACHE: [&str; 3] = [
    "/var/lib/containers/cache/blob-info-cache-v1.boltdb",
    "/var/lib/containers/cache",
    "/var/lib/containers",
];

pub(super) struct Containers {
    /// The unpacked packages.
    tools: PathBuf,
    /// Storage, configuration and state.
    home: PathBuf,
    /// Nobody has used containers as root here before.
    is_cache_ours: bool,
}

impl Containers {
    pub(super) fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        let directory = workspace.target.join("image");
        let (tools, home) = (directory.join("tools"), directory.join("home"));
        let unfinished = directory.join("tools.unfinished");
        if !tools.is_dir() {
            let mut names = packages::missing_with_dependencies(&PACKAGES)?;
            names.extend(PACKAGES.map(str::to_owned));
            names.sort();
            names.dedup();
            packages::unpack(&names.iter().map(String::as_str).collect::<Vec<_>>(), &unfinished)?;
            fs::rename(&unfinished, &tools).with_context(|| format!("rename {}", unfinished.display()))?;
        }
        let containers = Self { tools, home, is_cache_ours: !Path::new(CACHE[0]).exists() };
        // A run that was killed has left something.
        containers.remove();
        containers.configure()?;
        Ok(containers)
    }

    /// Writes the configuration. podman starts conmon and runc without our environment, so scripts give them the
    /// libraries.
    fn configure(&self) -> Result<()> {
        let tree = Tree::empty(&self.home)?;
        let libraries = self.libraries();
        let script = |program: &str, options: &str| {
            let program = self.tools.join(program);
            format!("#!/bin/sh\nLD_LIBRARY_PATH={libraries:?} exec {program:?} {options} \"$@\"\n")
        };
        tree.write("conmon", 0o755, script("usr/bin/conmon", "").as_bytes())?;
        let state = format!("--root {:?}", self.home.join("runc-state"));
        tree.write("runc", 0o755, script("usr/sbin/runc", &state).as_bytes())?;
        let seccomp = self.tools.join("usr/share/containers/seccomp.json");
        let home = self.home.display();
        let engine = format!(
            "[containers]\nseccomp_profile = {seccomp:?}\nlog_driver = \"k8s-file\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nlock_type = \"file\"\n\
             tmp_dir = \"{home}/tmp\"\nconmon_path = [\"{home}/conmon\"]\nruntime = \"runc\"\n\
             [engine.runtimes]\nrunc = [\"{home}/runc\"]\n\
             [network]\nnetwork_backend = \"cni\"\nnetwork_config_dir = \"{home}/cni\"\n"
        );
        tree.write("containers.conf", 0o644, engine.as_bytes())?;
        let storage =
            format!("[storage]\ndriver = \"vfs\"\ngraphroot = \"{home}/graph\"\nrunroot = \"{home}/run\"\n");
        tree.write("storage.conf", 0o644, storage.as_bytes())?;
        // Signatures are about images from elsewhere.
        tree.write("policy.json", 0o644, b"{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}")
    }

    fn libraries(&self) -> String {
        let folders = ["usr/lib", "lib"].map(|folder| packages::libraries_in(&self.tools.join(folder)));
        folders.map(|path| path.display().to_string()).join(":")
    }

    pub(super) fn program(&self, name: &str) -> Command {
        let mut command = plain(self.tools.join("usr/bin").join(name));
        command.env("LD_LIBRARY_PATH", self.libraries()).env("TMPDIR", &self.home);
        command.env("CONTAINERS_CONF", self.home.join("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.home.join("storage.conf"));
        command.env("CONTAINERS_REGISTRIES_CONF", "/dev/null");
        command
    }

    pub(super) fn podman(&self) -> Command {
        self.program("podman")
    }

    /// A command of buildah that reads or writes images.
    pub(super) fn buildah(&self, subcommand: &str) -> Command {
        let mut command = self.program("buildah");
        self.with_policy(command.arg(subcommand));
        command
    }

    /// The option with the policy about signatures.
    pub(super) fn with_policy<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.arg("--signature-policy").arg(self.home.join("policy.json"))
    }

    /// `podman run` in the background, with our limit of open files and a low one of processes: podman would raise
    /// both, which not every root may.
    pub(super) fn start(&self, name: &str) -> Command {
        let limits = getrlimit(Resource::Nofile);
        let number = |limit: Option<u64>| limit.map_or_else(|| "-1".to_owned(), |limit| limit.to_string());
        let limits = format!("--ulimit=nofile={}:{}", number(limits.current), number(limits.maximum));
        let mut command = self.podman();
        command.args(["run", "--detach", "--name", name, "--cgroup-parent", &format!("/{CGROUP}")]);
        command.args([&limits, "--ulimit=nproc=4096:4096"]);
        command
    }

    /// Removes containers, images and state.
    fn remove(&self) {
        if self.home.join("containers.conf").is_file() {
            let removed = self.podman().args(["rm", "--all", "--force", "--time", "0"]).output();
            if let Some(output) = removed.ok().filter(|output| !output.status.success()) {
                say(format!("podman rm: {}", String::from_utf8_lossy(&output.stderr).trim()));
            }
        }
        let _ = fs::remove_dir_all(&self.home);
        remove_cgroups(Path::new("/sys/fs/cgroup"), 0);
        if self.is_cache_ours {
            let [file, directories @ ..] = CACHE;
            let _ = fs::remove_file(file);
            // A directory that has something of anybody else stays.
            directories.iter().for_each(|directory| drop(fs::remove_dir(directory)));
        }
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes the empty control groups of our parent, in the hierarchies that are mounted at this place.
fn remove_cgroups(directory: &Path, depth: usize) {
    let is_ours = directory.components().any(|part| part.as_os_str() == CGROUP);
    // The parent is at the top of a hierarchy.
    if depth <= 2 || is_ours {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories.for_each(|entry| remove_cgroups(&entry.path(), depth + 1));
    }
    if is_ours {
        let _ = fs::remove_dir(directory);
    }
}
