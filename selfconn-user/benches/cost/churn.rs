//! Connections a second: untraced, with empty programs, with the daemon and with other tools, and of a command under
//! `selfconn exec`.

use std::{
    ffi::OsStr,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::Result;

use crate::{
    generate::TrafficMade,
    measure::{Measurement, PLAIN, make},
    net::{NetNamespace, output},
    report::{INSIDE, OUTSIDE},
    tracer::{Peer, TracerProcess},
};

/// Where the connections of [`churn`] lead.
#[derive(Clone, Copy)]
enum ChurnDestination {
    /// From 127.0.0.1 to 127.0.0.2.
    OtherAddress,
    /// From 127.0.0.1 to itself, to a port that connect() can't choose: the commonest connection of a host.
    OwnAddressOutside,
    /// The same, to a port that connect() can choose.
    OwnAddressInside,
}

impl ChurnDestination {
    const ALL: [Self; 3] = [Self::OtherAddress, Self::OwnAddressOutside, Self::OwnAddressInside];

    /// The group of its rows.
    fn group(self) -> &'static str {
        match self {
            Self::OtherAddress => "churn",
            Self::OwnAddressOutside => OUTSIDE,
            Self::OwnAddressInside => INSIDE,
        }
    }

    /// The options of the generator.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::OtherAddress => &["--to", "127.0.0.2"],
            Self::OwnAddressOutside => &["--to", "127.0.0.1", "--outside"],
            Self::OwnAddressInside => &["--to", "127.0.0.1"],
        }
    }
}

/// Connections a second, untraced and with each tool, to each destination.
pub(crate) fn churn(measurement: &mut Measurement) -> Result<()> {
    ChurnDestination::ALL.into_iter().try_for_each(|destination| churn_to(measurement, destination))
}

/// The kernel does not measure programs meanwhile.
fn churn_to(measurement: &mut Measurement, destination: ChurnDestination) -> Result<()> {
    let net = NetNamespace::new()?;
    let methods = measurement.methods()?;
    let name = |what: &str| format!("{}.{what}", destination.group());
    let churn = |count: u64| -> Result<f64> {
        let options = ["--count", &count.to_string(), "--cpu", "1"];
        Ok(make(&net, &[&["churn"], destination.options(), &options].concat())?.rate())
    };
    // Other work on the host can only make it slower, so the best of five is taken.
    let best = || (0..5).map(|_| churn(2_000)).try_fold(0.0, |best, rate| rate.map(|rate| rate.max(best)));
    churn(2_000)?;
    let probe = || churn(20).map(drop);
    // These two are close to each other, so they alternate: a drift affects both.
    for round in 0..measurement.rounds(40) {
        let order = if round % 2 == 0 { [true, false] } else { [false, true] };
        for ours in order {
            let tracer = if ours { measurement.start(&[])? } else { TracerProcess::empty(&methods)? };
            measurement.sample(&name(if ours { "close.ours" } else { "close.empty" }), best()?);
            tracer.stop()?;
        }
    }
    let mut peers = Vec::new();
    for peer in Peer::ALL {
        match TracerProcess::peer(peer, probe).and_then(TracerProcess::stop) {
            Ok(()) => peers.push(peer),
            Err(why) => {
                measurement.samples.skipped.insert(name(peer.name()), format!("{why:#}"));
            }
        }
    }
    for _ in 0..measurement.rounds(10) {
        measurement.sample(&name("none"), churn(5_000)?);
        let tracer = TracerProcess::empty(&methods)?;
        measurement.sample(&name("empty"), churn(5_000)?);
        tracer.stop()?;
        let tracer = measurement.start(&[])?;
        measurement.sample(&name("ours"), churn(5_000)?);
        tracer.stop()?;
        for peer in &peers {
            let tracer = TracerProcess::peer(*peer, probe)?;
            measurement.sample(&name(peer.name()), churn(5_000)?);
            tracer.stop()?;
        }
    }
    Ok(())
}

/// What a command pays for `selfconn exec`: once, and for each of its connections.
pub(crate) fn exec(measurement: &mut Measurement) -> Result<()> {
    let net = NetNamespace::new()?;
    let this = std::env::current_exe()?;
    let watched = |command: &[&OsStr]| {
        let mut exec = Command::new(&measurement.daemon);
        net.enter(exec.args(["exec", "--"]).args(command).stderr(Stdio::null()));
        exec
    };
    let generator =
        [&["generate", "churn"], ChurnDestination::OwnAddressInside.options(), &PLAIN[3..]].concat();
    let command: Vec<_> = [this.as_os_str()].into_iter().chain(generator.iter().map(OsStr::new)).collect();
    let mut samples = Vec::new();
    for _ in 0..measurement.rounds(25) {
        let began = Instant::now();
        output(watched(&["true".as_ref()]))?;
        samples.push(("exec.true", began.elapsed().as_secs_f64() * 1e3));
        for (name, command) in [("exec.with", watched(&command)), ("exec.without", net.helper(&generator))] {
            let made: TrafficMade = serde_json::from_str(&output(command)?)?;
            samples.push((name, made.rate()));
        }
    }
    samples.into_iter().for_each(|(name, value)| measurement.sample(name, value));
    Ok(())
}
