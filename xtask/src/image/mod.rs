//! `cargo xtask image`: builds the container image from the files of the tarball with buildah, and runs it with podman
//! as the DaemonSet would: with its capabilities, mounts and limits, and no others. A process of the host connects to
//! itself, and the container's log must name it. Then the same with the guard's component, which must refuse it.
//! An image for another architecture is only built; several images get a list. The digests of all are written beside
//! the packages, and a release signs them.

mod check;
mod containers;
mod digests;
mod pod;

use std::{fs, time::Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use self::{containers::Containers, digests::Digests, pod::Pod};
use crate::{
    architecture::Architecture,
    dist::{self, ArchitectureArgs, Unpacked},
    operations::kubernetes::Validator,
    packages,
    run::{self, say, seconds_since},
    workspace::{Workspace, here, write_if_changed},
};

pub(crate) fn run(args: &ArchitectureArgs, workspace: &Workspace) -> Result<()> {
    packages::must_be_root("the daemon needs root", "image")?;
    let validator = Validator::find_or_install(workspace)?;
    let objects = |name: &str| validator.objects(&workspace.root.join("packaging/kubernetes").join(name));
    let pod = Pod::of_daemon_set(&objects("daemonset.yaml")?)?;
    let guarded = pod.with_guard(&objects("guard/patch.yaml")?)?;
    let containers = Containers::find_or_fetch(workspace)?;
    let all = dist::unpacked(workspace, &args.all()?)?;

    let start = Instant::now();
    let native = Architecture::named(None)?;
    let mut images = Vec::new();
    for unpacked in &all {
        let image = build(&containers, unpacked)?;
        if unpacked.release.architecture == native {
            check::runs_as_in_a_pod(&containers, &image, &pod, unpacked)?;
            check::guards_the_host(&containers, &image, &guarded, unpacked)?;
        } else {
            say(format!("{image}: not run, because this machine is {}", native.name));
        }
        images.push(image);
    }
    // The archive is what stays. The rest is removed with `containers`.
    let version = &all.first().context("no architecture")?.release.version;
    let architectures: Vec<_> = all.iter().map(|unpacked| unpacked.release.architecture).collect();
    let names: Vec<_> = architectures.iter().map(|architecture| architecture.name).collect();
    let archive = format!("selfconn-{version}-{}.oci.tar", names.join("-"));
    let archive = workspace.target.join("image").join(archive);
    let _ = fs::remove_file(&archive);
    let to = format!("oci-archive:{}:selfconn:{version}", archive.display());
    match images.as_slice() {
        [image] => drop(run::output(containers.buildah("push").args([image, &to]))?),
        images => push_list(&containers, images, &to)?,
    }
    let digests = Digests::of_archive(&archive)?;
    if architectures.len() > 1 {
        digests.are_for(&architectures)?;
    }
    let file = workspace.target.join("dist").join(digests::FILE);
    write_if_changed(&file, digests.render(version).as_bytes())?;
    say(format!("{}: the digest is in {}", here(&archive), here(&file)));
    say(format!("done in {}", seconds_since(start)));
    Ok(())
}

/// Writes a list of the images, and all of them. The list names the platform of each, by which a node chooses.
fn push_list(containers: &Containers, images: &[String], to: &str) -> Result<()> {
    const LIST: &str = "selfconn-list";
    let manifest = |subcommand: &str| {
        let mut buildah = containers.program("buildah");
        buildah.args(["manifest", subcommand]);
        buildah
    };
    run::output(manifest("create").arg(LIST).args(images))?;
    run::output(containers.with_policy(&mut manifest("push")).args(["--all", LIST, to]))?;
    Ok(())
}

/// Builds the image and checks what it says about itself. Returns its name.
fn build(containers: &Containers, unpacked: &Unpacked) -> Result<String> {
    let release = &unpacked.release;
    let image = format!("selfconn:{}-{}", release.version, release.architecture.debian);
    let mut build = containers.buildah("build");
    build.args(["--quiet", "--timestamp", &release.epoch.to_string(), "--tag", &image]);
    run::output(build.arg(&unpacked.directory))?;
    let inspected: Value =
        serde_json::from_str(&run::output(containers.podman().args(["image", "inspect", &image]))?)
            .context("parse the output of podman image inspect")?;
    let (labels, architecture) = (&inspected[0]["Labels"], &inspected[0]["Architecture"]);
    let label = |name: &str| labels[format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default();
    ensure!(architecture == release.architecture.debian, "the image is for {architecture}");
    ensure!(label("version") == release.version && label("revision") == release.revision, "{labels}");
    for name in ["title", "description", "licenses"] {
        ensure!(!label(name).is_empty(), "the image has no {name}: {labels}");
    }
    say(format!("{image}: {architecture}, {labels}"));
    Ok(image)
}
