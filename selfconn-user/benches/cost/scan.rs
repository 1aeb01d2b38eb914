//! How long a scan and a snapshot take, and how that grows with sockets and network namespaces.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Result, ensure};

use crate::{measure::Measurement, net::NetNamespace, socket_crowd::SocketHelpers};

/// The duration of a scan, compared with `ss`, and how it grows with the number of sockets.
pub(crate) fn scan(measurement: &mut Measurement) -> Result<()> {
    let time = |command: &mut Command| -> Result<f64> {
        let began = Instant::now();
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        // 1: it found a self-connection of another program.
        ensure!(matches!(status.code(), Some(0 | 1)), "{status}");
        Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    let daemon = measurement.daemon.clone();
    let scan = || time(Command::new(&daemon).arg("scan"));
    let net = NetNamespace::new()?;
    for sockets in [1_000, 10_000, 100_000] {
        let crowd = SocketHelpers::new(&net, sockets)?;
        for _ in 0..measurement.rounds(10) {
            measurement.sample(&format!("scan.sockets.{sockets}"), scan()?);
            let mut ss = Command::new("ss");
            net.enter(ss.arg("-tanH"));
            measurement.sample(&format!("scan.ss.{sockets}"), time(&mut ss)?);
        }
        snapshots(measurement, &format!("snapshot.sockets.{sockets}"))?;
        drop(crowd);
    }
    drop(net);
    let mut nets = Vec::new();
    for namespaces in [1, 10, 100] {
        while nets.len() < namespaces {
            let net = NetNamespace::new()?;
            let crowd = SocketHelpers::new(&net, 20)?;
            nets.push((crowd, net));
        }
        for _ in 0..measurement.rounds(20) {
            measurement.sample(&format!("scan.namespaces.{namespaces}"), scan()?);
        }
        snapshots(measurement, &format!("snapshot.namespaces.{namespaces}"))?;
    }
    Ok(())
}

/// CPU time of a snapshot of the socket table by the daemon.
fn snapshots(measurement: &mut Measurement, name: &str) -> Result<()> {
    let tracer = measurement.start(&["--reconcile", "1", "-vv"])?;
    for _ in 0..measurement.rounds(5) {
        let time = tracer.cpu_time_of_snapshots(1)?;
        measurement.sample(name, time.as_secs_f64() * 1e3);
    }
    tracer.stop()
}
