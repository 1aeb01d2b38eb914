//! What `/proc` says about processes, sockets and mounts, some of it in words that a process chose.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::proc_text(bytes));
