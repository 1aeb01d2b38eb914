//! Programs of the system that packages are made with: run to their end, and quoted when they fail.

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};

/// What it says.
pub(super) fn run(command: Command) -> Result<String> {
    let name = name(&command);
    String::from_utf8(run_for_bytes(command)?).with_context(|| format!("{name}: output"))
}

/// What it writes to its stdout.
pub(super) fn run_for_bytes(mut command: Command) -> Result<Vec<u8>> {
    let name = name(&command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    checked(&name, output)
}

/// What it makes of this.
pub(super) fn filter(mut command: Command, input: &[u8]) -> Result<Vec<u8>> {
    let name = name(&command);
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("start {name}"))?;
    let mut stdin = child.stdin.take().with_context(|| format!("{name}: no stdin"))?;
    // Beside the reading, for neither side waits when its pipe is full. If it stops reading, its status tells why.
    let output = thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    });
    checked(&name, output.with_context(|| format!("wait for {name}"))?)
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn checked(name: &str, output: Output) -> Result<Vec<u8>> {
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&said).trim());
    }
    Ok(output.stdout)
}
