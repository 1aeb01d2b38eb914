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

/// The duration that decides whether all of these are short enough: the longest one, and in an emulator the middle one.
/// The CPUs of an emulator take turns, of up to 100 ms each, and client, daemon and test may be on different ones
/// (`TCG_KICK_PERIOD`, accel/tcg/tcg-accel-ops-rr.c of QEMU at v7.2.0). There one event may wait for several turns.
pub(crate) fn decisive(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations[if is_emulated() { durations.len() / 2 } else { durations.len() - 1 }]
}

/// How long something may take, and how long in an emulator.
pub(crate) fn time_limit(usual: Duration, emulated: Duration) -> Duration {
    if is_emulated() { emulated } else { usual }
}
