//! Reports binds of TCP ports that fail with EADDRINUSE. User space finds out whether a self-connection holds
//! the port.
//!
//! One program is attached to `inet_csk_get_port`, which every bind of a TCP socket calls, and gets the
//! socket as an argument. If it cannot be attached, two programs observe the system call `bind()`, and find
//! the socket by its file descriptor.

use aya_ebpf::{
    EbpfContext,
    helpers::{
        bpf_probe_read_user,
        generated::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_boot_ns},
    },
    macros::map,
    maps::{LruHashMap, RingBuf},
    programs::TracePointContext,
};
use selfconn_ebpf::{
    BindOptions, Endpoint, Field, IPPROTO_MPTCP, IPPROTO_TCP,
    bind_failure::{BindFailure, REPORT_INTERVAL_NS},
    counter, family, tag,
};

use super::{
    counters::count,
    held_ports,
    kernel_read::KernelRead,
    owners, ring_buffer,
    sock::{self, Sock, v4_mapped},
    task,
};

/// Key of [`LAST_REPORTS`]: the process, and the address and port that it requests.
#[repr(C)]
#[derive(Clone, Copy)]
struct BindAttempt {
    /// Of any family.
    endpoint: Endpoint,
    /// 64 bits, because a key must not have padding.
    pid: u64,
}

/// The last report of a key, and the failures since.
#[repr(C)]
#[derive(Clone, Copy)]
struct LastReport {
    at_ns: u64,
    failures: u64,
}

/// Recent reports: they limit the rate, so that a server that retries in a loop does not fill the ring
/// buffer. An LRU is safe here, because an evicted entry only causes one additional report.
#[map]
static LAST_REPORTS: LruHashMap<BindAttempt, LastReport> = LruHashMap::with_max_entries(1_024, 0);

/// Failed binds have a ring buffer of their own, so that they delay no transition. It holds two thousand.
#[map]
static BIND_RECORDS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

/// What a `bind()` requests, and of its socket what decides whether it may share the port.
#[repr(C)]
#[derive(Clone, Copy)]
struct RequestedBind {
    /// When the call began.
    at_ns: u64,
    endpoint: Endpoint,
    sock_uid: u32,
    options: BindOptions,
    /// A value of a map must not have padding.
    padding: [u8; 3],
}

impl RequestedBind {
    #[inline(always)]
    fn new<M: KernelRead>(sock: Sock<M>, family: u8, addr: [u32; 4], port: u16) -> Self {
        Self {
            // SAFETY: the helper takes no arguments.
            at_ns: unsafe { bpf_ktime_get_boot_ns() },
            endpoint: sock.endpoint(family, addr, port),
            sock_uid: sock.get(Field::SockUid),
            options: sock.bind_options(),
            padding: [0; 3],
        }
    }
}

/// The last `bind()` of each thread that began while a port was held. It is not removed when the call returns, because
/// nearly every call succeeds, and then its end should cost nothing.
#[map]
static REQUESTED_BINDS: LruHashMap<u64, RequestedBind> = LruHashMap::with_max_entries(1_024, 0);

/// The longest time between the entry and the exit of a failed `bind()`. What is older is of an earlier call.
const LONGEST_BIND_NS: u64 = 1_000_000_000;

/// Handles the exit of `inet_csk_get_port(sk, port)`. The kernel calls it to reserve a port for a TCP socket,
/// in `bind()` and again in `listen()`. It fails only because the port is in use. At its exit the address of
/// the socket is set, and not yet cleared after the failure (`__inet_bind`, net/ipv4/af_inet.c at v5.10).
#[inline(always)]
pub(crate) fn on_get_port_exit<M: KernelRead>(sock: Sock<M>, port: u16, result: i32) {
    // With port 0 the kernel chooses the port.
    if result == 0 || port == 0 || sock.protocol() != IPPROTO_TCP {
        return;
    }
    let Some((family, addr)) = sock.source_address() else { return };
    report_failure(&RequestedBind::new(sock, family, addr, port));
}

/// Handles the entry of `bind(fd, address, length)`. Nothing is read while no port is held, which is the rule. In the
/// record, each argument has eight bytes, from offset 16 on. User space has compared this layout with the kernel's
/// `format` file.
#[inline(always)]
pub(crate) fn on_bind_enter(ctx: TracePointContext) {
    if held_ports::is_any_held() {
        store_requested_bind(ctx);
    }
}

/// Not inlined, because otherwise every entry would first save registers and set up the stack for it.
#[inline(never)]
fn store_requested_bind(ctx: TracePointContext) {
    // SAFETY: the helper takes no arguments.
    let thread = unsafe { bpf_get_current_pid_tgid() };
    // If this call is not stored, its failure must not be taken for one of the call before.
    let _ = REQUESTED_BINDS.remove(&thread);
    let record = ctx.as_ptr().cast_const().cast::<u8>();
    // SAFETY: the record has 40 bytes, each field in it is aligned, and the verifier checks every load.
    let (fd, address) =
        unsafe { (record.add(16).cast::<u64>().read(), record.add(24).cast::<*const u8>().read()) };
    let Some(sock) = sock::by_descriptor(fd as u32) else { return };
    // The socket of MPTCP has the options of its first subflow, which is bound in its place
    // (`mptcp_setsockopt`, net/mptcp/sockopt.c at v5.13).
    if !matches!(sock.protocol(), IPPROTO_TCP | IPPROTO_MPTCP) {
        return;
    }
    // `struct sockaddr_in` and `struct sockaddr_in6` both begin with family and port.
    // SAFETY: the helper copies or fails; it never faults.
    let Ok([family, port_be, a, b]) = (unsafe { bpf_probe_read_user(address.cast::<[u16; 4]>()) }) else {
        return;
    };
    let port = u16::from_be(port_be);
    if port == 0 {
        return;
    }
    let (family, addr) = if family == u16::from(family::INET) {
        (family::INET, v4_mapped(u32::from(a) | u32::from(b) << 16))
    } else if family == u16::from(family::INET6) {
        // SAFETY: as above.
        match unsafe { bpf_probe_read_user(address.wrapping_add(8).cast::<[u32; 4]>()) } {
            Ok(addr) => (family::INET6, addr),
            Err(_) => return,
        }
    } else {
        return;
    };
    let _ = REQUESTED_BINDS.insert(&thread, &RequestedBind::new(sock, family, addr, port), 0);
}

/// Handles the exit of `bind()`.
#[inline(always)]
pub(crate) fn on_bind_exit(ctx: &TracePointContext) {
    const EADDRINUSE: i64 = 98;
    // SAFETY: as in `on_bind_enter`; this record has 24 bytes.
    let result = unsafe { ctx.as_ptr().cast_const().cast::<u8>().add(16).cast::<i64>().read() };
    if result == -EADDRINUSE {
        report_requested_bind();
    }
}

/// Reports the `bind()` of the running thread. Not inlined, for the reason of [`store_requested_bind`].
#[inline(never)]
fn report_requested_bind() {
    // SAFETY: the helpers take no arguments.
    let (thread, now_ns) = unsafe { (bpf_get_current_pid_tgid(), bpf_ktime_get_boot_ns()) };
    let Some(requested) = REQUESTED_BINDS.get_ptr(&thread) else { return };
    // SAFETY: no other thread uses this entry. If it is evicted, its memory still belongs to the map.
    let requested = unsafe { *requested };
    let _ = REQUESTED_BINDS.remove(&thread);
    if now_ns.wrapping_sub(requested.at_ns) < LONGEST_BIND_NS {
        report_failure(&requested);
    }
}

/// Reports a failed bind of a port that a self-connection may hold, unless the same process was reported for the same
/// address and port a moment ago, or its owner fails more often than the rate allows.
#[inline(always)]
fn report_failure(requested: &RequestedBind) {
    let RequestedBind { endpoint, sock_uid, options, .. } = requested;
    if !held_ports::may_be_held(endpoint) {
        return;
    }
    // SAFETY: the helpers take no arguments.
    let (at_ns, uid) = unsafe { (bpf_ktime_get_boot_ns(), bpf_get_current_uid_gid() as u32) };
    let (task, start_ns) = task::current_task();
    let key = BindAttempt { endpoint: endpoint.any_family(), pid: task.pid.into() };
    let mut failures = 1;
    if let Some(last) = LAST_REPORTS.get_ptr_mut(&key) {
        // SAFETY: the memory belongs to the map. If two threads of one process count at the same time, one
        // count can be lost.
        let last = unsafe { &mut *last };
        failures += last.failures;
        if at_ns.saturating_sub(last.at_ns) < REPORT_INTERVAL_NS {
            last.failures = failures;
            return;
        }
    }
    let (arg_start, owner) = task::current_image_and_owner();
    if !owners::admits(&owner, |state, users| state.admit_bind_failure(at_ns, users)) {
        count(counter::BIND_FAILURES_OVER_RATE);
        // SAFETY: the pointer is to a value of the map.
        owners::count_loss(&owner, |state| unsafe { &raw mut (*state).lost_bind_failures });
        return;
    }
    let failure = || BindFailure {
        tag: tag::BIND_FAILURE,
        options: *options,
        padding: 0,
        uid,
        at_ns,
        start_ns,
        arg_start,
        endpoint: *endpoint,
        task,
        owner,
        failures,
        sock_uid: *sock_uid,
        more_padding: 0,
    };
    if ring_buffer::submit_to(&BIND_RECORDS, failure) {
        let _ = LAST_REPORTS.insert(&key, &LastReport { at_ns, failures: 0 }, 0);
    }
}
