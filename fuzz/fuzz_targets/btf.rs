//! A kernel's BTF, damaged: read to the end or refused, in bounded time and space.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selfconn::kernel::btf::{Btf, Named};
use selfconn_ebpf::Field;

fuzz_target!(|bytes: &[u8]| {
    let Ok(btf) = Btf::parse(bytes) else { return };
    for (_, of, member, _) in Field::ALL {
        let _ = btf.offset(of, member);
    }
    for named in [Named::Struct, Named::Typedef, Named::Function] {
        let _ = btf.has(named, "tcp_set_state");
    }
    // Of the seed, which is the BTF of our own programs.
    let _ = btf.offset("Transition", "opener.task.comm");
});
