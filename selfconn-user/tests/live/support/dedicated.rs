//! Machines on which tests may change what belongs to the whole machine.

/// True if the tests may change the clock and the CPUs of this machine.
pub(crate) fn is_dedicated_machine() -> bool {
    let is_dedicated = std::env::var_os("SELFCONN_OWN_MACHINE").is_some();
    if !is_dedicated {
        println!("skipped: this machine is not dedicated to this test; `cargo xtask vm` has such machines");
    }
    is_dedicated
}
