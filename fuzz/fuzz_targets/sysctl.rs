//! The texts of `ip_local_port_range` and `ip_local_reserved_ports`: a parser must accept or reject them, and
//! print accepted values as the kernel does.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::fuzzing;

fuzz_target!(|texts: (&str, &str)| fuzzing::sysctl_text(texts.0, texts.1));
