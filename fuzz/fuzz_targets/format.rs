//! The text of a tracepoint's `format` file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::kernel::format;

fuzz_target!(|text: &str| {
    let _ = format::check(text, format::SET_STATE);
});
