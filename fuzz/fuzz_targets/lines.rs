//! A log line, which can be from a newer version or damaged: its rendered text must be safe for a terminal,
//! and its journal entry must have exactly the fields of the line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::log_line(bytes));
