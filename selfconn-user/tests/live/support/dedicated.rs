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

/// How long the event of another connection may take. The CPUs of an emulator take turns, of up to 100 ms each
/// (`TCG_KICK_PERIOD`, accel/tcg/tcg-accel-ops-rr.c of QEMU at v7.2.0), and the client, the daemon and the test may be
/// on different ones.
pub(crate) fn event_limit() -> Duration {
    time_limit(Duration::from_millis(250), Duration::from_secs(1))
}
