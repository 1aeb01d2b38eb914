//! Any text as a tracepoint's `format` file: the check must not panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::bpf::tracefs::format;

fuzz_target!(|text: &str| {
    let _ = format::check(text, format::SET_STATE);
});
