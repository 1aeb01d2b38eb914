//! `cargo xtask image`: builds the container image from the files of the tarball with buildah, and runs it with podman
//! as the DaemonSet would: with its capabilities, mounts and limits, and no others. A process of the host connects to
//! itself, and the container's log must name it. Then the same with the guard's component, which must refuse it.

mod check;
mod containers;
mod pod;

use std::{fs, time::Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use self::{containers::Containers, pod::Pod};
use crate::{
    dist::{self, Unpacked},
    operations::kubernetes::Validator,
    packages,
    run::{self, say, seconds_since},
    workspace::{Workspace, here},
};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    packages::must_be_root("the daemon needs root", "image")?;
    let validator = Validator::find_or_install(workspace)?;
    let objects = |name: &str| validator.objects(&workspace.root.join("packaging/kubernetes").join(name));
    let pod = Pod::of_daemon_set(&objects("daemonset.yaml")?)?;
    let guarded = pod.with_guard(&objects("guard/patch.yaml")?)?;
    let containers = Containers::find_or_fetch(workspace)?;
    let unpacked = dist::unpacked(workspace)?;

    let start = Instant::now();
    // The archive is what stays. The rest is removed with `containers`.
    let archive =
        format!("selfconn-{}-{}.oci.tar", unpacked.release.version, unpacked.release.architecture.name);
    let archive = workspace.target.join("image").join(archive);
    let _ = fs::remove_file(&archive);
    let image = build(&containers, &unpacked)?;
    check::runs_as_in_a_pod(&containers, &image, &pod, &unpacked)?;
    check::guards_the_host(&containers, &image, &guarded, &unpacked)?;
    let to = format!("oci-archive:{}:{image}", archive.display());
    run::output(containers.buildah("push").args([&image, &to]))?;
    say(format!("{}: done in {}", here(&archive), seconds_since(start)));
    Ok(())
}

/// Builds the image and checks what it says about itself. Returns its name.
fn build(containers: &Containers, unpacked: &Unpacked) -> Result<String> {
    let release = &unpacked.release;
    let image = format!("selfconn:{}", release.version);
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
