//! Machines on which tests may change what belongs to the whole machine. `cargo xtask vm` emulates them.

use std::time::Duration;

/// True on such a machine.
pub(crate) fn is_emulated() -> bool {
    std::env::var_os("SELFCONN_OWN_MACHINE").is_some()
}

/// True if the tests may change the clock and the CPUs of this machine. A test that may not is skipped.
pub(crate) fn is_dedicated_machine() -> bool {
    if !is_emulated() {
        println!("skipped: this machine is not dedicated to this test; `cargo xtask vm` has such machines");
    }
    is_emulated()
}

/// How long something may take, and how long in an emulator.
pub(crate) fn time_limit(usual: Duration, emulated: Duration) -> Duration {
    if is_emulated() { emulated } else { usual }
}
