//! A line of a log, perhaps of a newer version, perhaps damaged: what people are shown of it is harmless, and the journal
//! takes it for what it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::log_line(bytes));
