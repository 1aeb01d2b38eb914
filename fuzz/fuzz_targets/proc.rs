//! Text from `/proc` about processes, sockets and mounts. A process can choose some parts of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::proc_text(bytes));
