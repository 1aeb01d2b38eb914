//! Damaged BTF of a kernel: the parser must accept or reject it, in bounded time and memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::bpf::btf::{Btf, Named};
use selfconn_ebpf::Field;

fuzz_target!(|bytes: &[u8]| {
    let Ok(btf) = Btf::parse(bytes) else { return };
    for (_, structure, member, _) in Field::ALL {
        let _ = btf.offset(structure, member);
    }
    for named in [Named::Struct, Named::Typedef, Named::Function] {
        let _ = btf.has(named, "tcp_set_state");
    }
    // The seed is the BTF of selfconn's own programs, which contains this structure.
    let _ = btf.offset("Transition", "opener.task.comm");
});
