//! Who fails to bind a TCP port. Whether a self-connection holds it is user space's to find out.
//!
//! One program sees the function that every bind of a TCP socket calls, and is handed the socket. Where that can't be
//! attached, two see the system call, and find the socket by its descriptor.

use aya_ebpf::{
    EbpfContext,
    helpers::{
        bpf_probe_read_user,
        generated::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_boot_ns},
    },
    macros::map,
    maps::LruHashMap,
    programs::TracePointContext,
};
use selfconn_ebpf::{
    IPPROTO_TCP,
    bind::{AGAIN_NS, FailedBind},
    family,
};

use crate::{
    report,
    sock::{self, Memory, Sock, mapped},
};

/// Who tries which address and port.
#[repr(C)]
#[derive(Clone, Copy)]
struct Attempt {
    addr: [u32; 4],
    netns: u32,
    pid: u32,
    port: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Told {
    at_ns: u64,
    failures: u64,
}

/// What was told lately: a server that tries in a loop must not fill the ring buffer. An LRU may evict, for that only
/// tells one more.
#[map]
static TOLD: LruHashMap<Attempt, Told> = LruHashMap::with_max_entries(1_024, 0);

/// What a system call that is under way wants, by its thread.
#[map]
static WANTED: LruHashMap<u64, Wanted> = LruHashMap::with_max_entries(1_024, 0);

#[repr(C)]
#[derive(Clone, Copy)]
struct Wanted {
    addr: [u32; 4],
    netns: u32,
    port: u16,
    family: u16,
}

/// `inet_csk_get_port(sk, port)` has returned: it takes a port for a TCP socket, for `bind()` and again for `listen()`,
/// and fails only because the port is in use. The socket's address is set by then, and not yet taken back
/// (`__inet_bind`, net/ipv4/af_inet.c at v5.10).
#[inline(always)]
pub(crate) fn got_port<M: Memory>(sock: Sock<M>, port: u16, failed: i32) {
    // To port 0 the kernel chooses.
    if failed == 0 || port == 0 || sock.protocol() != IPPROTO_TCP {
        return;
    }
    let Some((family, addr)) = sock.source_address() else { return };
    tell(&Wanted { addr, netns: sock.netns(), port, family: family.into() });
}

/// `bind(fd, address, length)` begins. The record has every argument in eight bytes from the sixteenth on; user space
/// compared that with the kernel's `format` file.
#[inline(always)]
pub(crate) fn bind_begins(ctx: &TracePointContext) {
    let record = ctx.as_ptr().cast_const().cast::<u8>();
    // SAFETY: the record has 40 bytes, each field is aligned in it, and the verifier checks every load.
    let (fd, address) =
        unsafe { (record.add(16).cast::<u64>().read(), record.add(24).cast::<*const u8>().read()) };
    let Some(sock) = sock::of_descriptor(fd as u32) else { return };
    if sock.protocol() != IPPROTO_TCP {
        return;
    }
    // `struct sockaddr_in` and `sockaddr_in6` begin alike.
    // SAFETY: the helper copies or fails; it never faults.
    let Ok([own_family, port_be, a, b]) = (unsafe { bpf_probe_read_user(address.cast::<[u16; 4]>()) }) else {
        return;
    };
    let port = u16::from_be(port_be);
    if port == 0 {
        return;
    }
    let addr = if own_family == u16::from(family::INET) {
        mapped(u32::from(a) | u32::from(b) << 16)
    } else if own_family == u16::from(family::INET6) {
        // SAFETY: as above.
        match unsafe { bpf_probe_read_user(address.wrapping_add(8).cast::<[u32; 4]>()) } {
            Ok(addr) => addr,
            Err(_) => return,
        }
    } else {
        return;
    };
    // SAFETY: no arguments.
    let thread = unsafe { bpf_get_current_pid_tgid() };
    let _ = WANTED.insert(&thread, &Wanted { addr, netns: sock.netns(), port, family: own_family }, 0);
}

/// And ends.
#[inline(always)]
pub(crate) fn bind_ends(ctx: &TracePointContext) {
    const EADDRINUSE: i64 = 98;
    // SAFETY: as in `bind_begins`; this record has 24 bytes.
    let outcome = unsafe { ctx.as_ptr().cast_const().cast::<u8>().add(16).cast::<i64>().read() };
    // SAFETY: no arguments.
    let thread = unsafe { bpf_get_current_pid_tgid() };
    if outcome == -EADDRINUSE
        && let Some(wanted) = WANTED.get_ptr(&thread)
    {
        // SAFETY: the entry is this thread's own; at worst it is evicted, and stays memory of the map.
        tell(&unsafe { *wanted });
    }
    let _ = WANTED.remove(&thread);
}

#[inline(always)]
fn tell(wanted: &Wanted) {
    // SAFETY: no arguments.
    let (at_ns, uid) = unsafe { (bpf_ktime_get_boot_ns(), bpf_get_current_uid_gid() as u32) };
    let (task, start_ns) = sock::current();
    let attempt = Attempt { addr: wanted.addr, netns: wanted.netns, pid: task.pid, port: wanted.port.into() };
    let mut failures = 1;
    if let Some(told) = TOLD.get_ptr_mut(&attempt) {
        // SAFETY: as in `bind_ends`; of what two threads of one process count at once, one may be lost.
        let told = unsafe { &mut *told };
        failures += told.failures;
        if at_ns.saturating_sub(told.at_ns) < AGAIN_NS {
            told.failures = failures;
            return;
        }
    }
    let &Wanted { addr, netns, port, family } = wanted;
    let failed =
        FailedBind { at_ns, start_ns, addr, netns, port, family, task, failures: failures as u32, uid };
    if report::tell(&failed) {
        let _ = TOLD.insert(&attempt, &Told { at_ns, failures: 0 }, 0);
    }
}
