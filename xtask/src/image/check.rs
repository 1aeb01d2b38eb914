//! Runs the image as a pod would, and checks what its daemon does.

use std::{
    cell::Cell,
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    process::{ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use super::{
    containers::Containers,
    pod::{NODE, Pod},
};
use crate::{
    dist::Unpacked,
    environment::plain,
    operations::http_get,
    run::{self, say, seconds_since},
};

const NAME: &str = "selfconn";

/// Much longer than the few seconds that it takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// A running container.
struct Container<'a> {
    containers: &'a Containers,
    pid: u32,
    metrics: SocketAddr,
    /// What podman knows about it.
    inspected: Value,
}

/// The daemon in the container tests itself, sees a self-connection of the host, and ends within the grace period.
pub(super) fn runs_as_in_a_pod(
    containers: &Containers,
    image: &str,
    pod: &Pod,
    unpacked: &Unpacked,
) -> Result<()> {
    let container = Container::start(containers, image, pod)?;
    let bounding: Vec<String> = serde_json::from_value(container.inspected["BoundingCaps"].clone())?;
    let mut bounding: Vec<&str> = bounding.iter().filter_map(|name| name.strip_prefix("CAP_")).collect();
    bounding.sort_unstable();
    ensure!(bounding == pod.capabilities, "the container has other capabilities: {bounding:?}");
    container.wait_until("a self-test has passed", || {
        let (_, text) = container.get("/metrics")?;
        let passed =
            text.lines().find_map(|line| line.strip_prefix("selfconn_self_tests_total{result=\"passed\"} "));
        Ok(passed.is_some_and(|count| count != "0"))
    })?;
    let started = container.event("started", |_| true)?;
    ensure!(started["version"] == unpacked.release.version && started["host"] == NODE, "started: {started}");
    say(format!("with {} alone, the daemon is healthy and its self-test has passed", bounding.join(", ")));

    let program = unpacked.directory.join("selfconn");
    let seen = container.sees_a_self_connection(&program)?;
    say(format!("a self-connection of the host is seen: pid {}, exe {}", seen["pid"], seen["exe"]));
    container.ends_within(pod.grace_seconds)
}

/// With the guard's component the same client of the host is refused, with its process in the event, and it isn't any
/// more after the end.
pub(super) fn guards_the_host(
    containers: &Containers,
    image: &str,
    pod: &Pod,
    unpacked: &Unpacked,
) -> Result<()> {
    let container = Container::start(containers, image, pod)?;
    let program = unpacked.directory.join("selfconn");
    // The container's own network namespace is guarded at the start, the host's soon after it.
    let refused = Cell::new(None);
    container.wait_until("selfconn repro is refused on the host", || {
        let (pid, status) = connect_to_self(&program)?;
        refused.set((!status.success()).then_some(pid));
        Ok(!status.success())
    })?;
    let pid = refused.get().context("nothing was refused")?;
    let event = container.event("prevented", |event| event["pid"] == pid)?;
    // The client ends at once when it is refused, often before its executable is looked up.
    ensure!(
        event["comm"] == NAME && event["netns"] == host_netns()?,
        "the event has another program or namespace: {event}"
    );
    say(format!("the guard has refused a connect of the host to itself: pid {pid}, comm {}", event["comm"]));
    container.ends_within(pod.grace_seconds)?;
    let (_, status) = connect_to_self(&program)?;
    ensure!(status.success(), "after the guard's end: selfconn repro: {status}");
    Ok(())
}

/// A process of the host connects to itself, in the host's network namespace. Returns its id and how it ended.
fn connect_to_self(program: &Path) -> Result<(u32, ExitStatus)> {
    let mut repro = plain(program);
    repro.args(["repro", "--mode", "bind"]);
    let mut child = repro
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start selfconn repro")?;
    Ok((child.id(), child.wait().context("wait for selfconn repro")?))
}

/// The event has the program and the network namespace of the host's process.
fn is_of_the_host(event: &Value, program: &Path) -> Result<()> {
    ensure!(
        event["exe"] == program.to_string_lossy().as_ref() && event["netns"] == host_netns()?,
        "the event has another program or namespace: {event}"
    );
    Ok(())
}

/// The inode of the host's network namespace.
fn host_netns() -> Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/net").context("our network namespace")?.ino())
}

/// What podman knows about the container.
fn inspect(containers: &Containers) -> Result<Value> {
    let text = run::output(containers.podman().args(["container", "inspect", NAME]))?;
    let mut all: Vec<Value> = serde_json::from_str(&text).context("parse the output of podman inspect")?;
    all.pop().context("podman knows no container")
}

impl<'a> Container<'a> {
    /// Runs the image as the pod, and waits for the daemon. A container of an earlier check goes.
    fn start(containers: &'a Containers, image: &str, pod: &Pod) -> Result<Self> {
        run::output(containers.podman().args(["rm", "--force", "--ignore", NAME]))?;
        let mut start = containers.start(NAME);
        start.args(&pod.options).arg(image).args(&pod.args).args(["--self-test", "1"]);
        run::output(&mut start).context("this machine does not run the container")?;
        let inspected = inspect(containers)?;
        let pid = inspected["State"]["Pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, pod.metrics_port));
        let container = Self { containers, pid: pid.context("no pid")?, metrics, inspected };
        container.wait_until("the daemon is healthy", || {
            Ok(container.get("/healthz").is_ok_and(|(status, body)| status == "200" && body == "ok\n"))
        })?;
        Ok(container)
    }

    /// An HTTP response of the daemon. A thread of its own enters the container's network namespace.
    fn get(&self, path: &str) -> Result<(String, String)> {
        let fetch = || {
            let namespace = File::open(format!("/proc/{}/ns/net", self.pid)).context("open the namespace")?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .context("enter the network namespace")?;
            http_get(self.metrics, path)
        };
        thread::scope(|scope| scope.spawn(fetch).join())
            .map_err(|_| anyhow::anyhow!("the thread panicked"))?
    }

    /// What the container has printed: JSON lines, and what went to stderr.
    fn log(&self) -> Result<String> {
        let output = self.containers.podman().args(["logs", NAME]).output().context("start podman")?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    fn wait_until(&self, what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !holds()? {
            if Instant::now() > deadline {
                bail!("it does not hold that {what}; the container's log:\n{}", self.log()?);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Waits for an event of this name.
    fn event(&self, name: &str, is_meant: impl Fn(&Value) -> bool) -> Result<Value> {
        let find = || -> Result<Option<Value>> {
            let log = self.log()?;
            let mut events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            Ok(events.find(|event| event["event"] == name && is_meant(event)))
        };
        self.wait_until(&format!("there is an event {name}"), || Ok(find()?.is_some()))?;
        find()?.context("the event is gone")
    }

    /// The event of a self-connection of the host names its process.
    fn sees_a_self_connection(&self, program: &Path) -> Result<Value> {
        let (pid, status) = connect_to_self(program)?;
        ensure!(status.success(), "selfconn repro: {status}");
        let event = self.event("established", |event| event["pid"] == pid)?;
        is_of_the_host(&event, program)?;
        Ok(event)
    }

    /// SIGTERM ends the daemon in time, and nothing was lost. podman kills it after that.
    fn ends_within(&self, seconds: u64) -> Result<()> {
        let start = Instant::now();
        run::output(self.containers.podman().args(["stop", "--time", &seconds.to_string(), NAME]))?;
        let state = &inspect(self.containers)?["State"];
        ensure!(state["ExitCode"] == 0, "the daemon did not end normally: {state}");
        let stopped = self.event("stopped", |_| true)?;
        let lost = stopped["lost"].as_object().context("stopped has no losses")?;
        ensure!(lost.values().all(|count| count == 0), "something was lost: {stopped}");
        say(format!("SIGTERM ended it in {}", seconds_since(start)));
        Ok(())
    }
}
