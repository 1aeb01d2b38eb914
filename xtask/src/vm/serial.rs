//! The serial line by which the programs in a guest speak to the host.

use std::fs;

use anyhow::{Context as _, Result};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// The kernel's console is another one: a message of the kernel in the middle of a test's line would make both unreadable.
const LINE: &str = "/dev/ttyS1";

/// Makes it our standard output and that of our children, byte for byte as written.
pub(crate) fn speak() -> Result<()> {
    let line = fs::File::options().write(true).open(LINE).with_context(|| format!("open {LINE}"))?;
    let mut settings = tcgetattr(&line).context("read the serial line's settings")?;
    settings.make_raw();
    tcsetattr(&line, OptionalActions::Now, &settings).context("set the serial line")?;
    rustix::stdio::dup2_stdout(&line).context("redirect the output")?;
    rustix::stdio::dup2_stderr(&line).context("redirect the error output")?;
    Ok(())
}
