//! A process that chooses every name: the JSON must stay one object on one line and contain the names
//! unchanged, and the text must not move a cursor or change the text direction.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|names: Vec<String>| fuzzing::hostile_names(&names));
