//! What `cargo xtask service` runs in its guest, started by systemd when the system is up: the life of the Debian
//! package, a line for each step, a verdict, and the end of the machine.

use std::{
    env, fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};

use self::plan::{DEADLINE, VOICE};

#[path = "../../plan.rs"]
#[expect(dead_code, reason = "of what the host and its guests agree on, the words are enough here")]
mod plan;
mod steps;
mod system;

/// The serial line that the host reads; the kernel's console is another one.
const OUTPUT: &str = "/dev/ttyS1";

fn main() -> ExitCode {
    let deadline = env::args().nth(1).and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let Some(deadline) = deadline.filter(|_| fs::exists(steps::FIRST).unwrap_or(false)) else {
        eprintln!("this installs and purges packages, and powers off the machine it runs on: not this one");
        return ExitCode::from(2);
    };
    let passed = speak().and_then(|()| {
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

/// Makes the line our standard output, byte for byte as written.
fn speak() -> Result<()> {
    let line = fs::File::options().write(true).open(OUTPUT).with_context(|| format!("open {OUTPUT}"))?;
    let mut settings = tcgetattr(&line).context("read the serial line's settings")?;
    settings.make_raw();
    tcsetattr(&line, OptionalActions::Now, &settings).context("set the serial line")?;
    rustix::stdio::dup2_stdout(&line).context("redirect the output")?;
    rustix::stdio::dup2_stderr(&line).context("redirect the error output")?;
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
