//! What `cargo xtask service` runs in its guest, started by systemd when the system is up: the life of the Debian
//! package, a line for each step, a verdict, and the end of the machine.

use std::{
    env, fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::termios::tcdrain;

use self::plan::{DEADLINE, VOICE};

#[path = "../../plan.rs"]
#[expect(dead_code, reason = "of what the host and its guests agree on, the words are enough here")]
mod plan;
#[path = "../../serial.rs"]
mod serial;
mod steps;
mod system;

fn main() -> ExitCode {
    let deadline = env::args().nth(1).and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let Some(deadline) = deadline.filter(|_| fs::exists(steps::FIRST).unwrap_or(false)) else {
        eprintln!("this installs and purges packages, and powers off the machine it runs on: not this one");
        return ExitCode::from(2);
    };
    let passed = serial::speak().and_then(|()| {
        thread::spawn(move || {
            thread::sleep(deadline);
            println!("\n{DEADLINE} of {} s has passed", deadline.as_secs());
            system::tell_state();
            end(false)
        });
        live()
    });
    if let Err(error) = &passed {
        println!("{VOICE}{error:#}");
    }
    end(passed.is_ok())
}

/// All steps in order. One that fails does not keep the rest from being looked at.
fn live() -> Result<()> {
    let (mut life, mut failed) = (steps::Life::default(), Vec::new());
    for (name, step) in steps::STEPS {
        let began = Instant::now();
        match step(&mut life) {
            Ok(detail) => {
                println!("{VOICE}{name}: passed in {:.1} s: {detail}", began.elapsed().as_secs_f64());
            }
            Err(error) => {
                println!("{VOICE}{name}: FAILED: {error:#}");
                system::tell_state();
                failed.push(name);
            }
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// The verdict, and the end. Nothing here has to be kept, so nothing is stopped in order.
fn end(passed: bool) -> ExitCode {
    println!("{}", plan::verdict(passed));
    // Fails where there is no terminal, and then nobody listens.
    let _ = tcdrain(std::io::stdout());
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    ExitCode::FAILURE
}
