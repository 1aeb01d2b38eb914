//! Starts other programs. A step inherits our output, so that the user sees what the program prints; only
//! output that is parsed is captured.

use std::{
    io::{self, Write as _},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Prints a line about our own work on stderr.
pub(crate) fn say(line: impl AsRef<str>) {
    eprintln!("xtask: {}", line.as_ref());
}

/// Runs a program that must succeed. Its stdout goes to our stderr, because our stdout is for results.
pub(crate) fn step(what: &str, command: &mut Command) -> Result<()> {
    say(what);
    let name = name(command);
    let status = command.stdin(Stdio::null()).stdout(io::stderr()).status();
    let status = status.with_context(|| format!("{what}: start {name}"))?;
    if status.success() { Ok(()) } else { bail!("{what} failed: {name}: {status}") }
}

/// What a program prints on stdout. Its stderr is part of the error when it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = name(command);
    String::from_utf8(output_bytes(command)?).with_context(|| format!("{name}: output"))
}

/// The same for output that is not text.
pub(crate) fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let name = name(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    stdout_of(&name, output)
}

/// What a program prints on stdout when it reads `input` from stdin.
pub(crate) fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let name = name(command);
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("start {name}"))?;
    let mut stdin = child.stdin.take().with_context(|| format!("{name}: no stdin"))?;
    // A thread writes, because both pipes may fill up. If the program stops reading, its status says why.
    let output = thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    });
    stdout_of(&name, output.with_context(|| format!("wait for {name}"))?)
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn stdout_of(name: &str, output: Output) -> Result<Vec<u8>> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let printed = [output.stdout, output.stderr].concat();
    bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&printed).trim())
}

/// The time since then, for people.
pub(crate) fn seconds_since(start: Instant) -> String {
    seconds(start.elapsed())
}

/// A duration for people.
pub(crate) fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_captured_and_a_failure_is_quoted() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(output(&mut shell("echo fine; echo noise >&2")).unwrap(), "fine\n");
        let error = output(&mut shell("echo half; echo broken >&2; exit 3")).unwrap_err().to_string();
        assert_eq!(error, "sh: exit status: 3: half\nbroken");
        assert_eq!(filter(&mut shell("tr a-z A-Z"), b"text").unwrap(), b"TEXT");
    }
}
