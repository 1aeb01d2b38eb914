//! A process that may choose every name: the JSON stays one object on one line and holds the very names, and the text
//! holds nothing that moves a cursor or turns text around.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|names: Vec<String>| fuzzing::hostile_names(&names));
