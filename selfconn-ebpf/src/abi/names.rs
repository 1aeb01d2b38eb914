//! Names of programs, maps and globals, shared by the programs and their loader.

/// The programs that observe transitions. [`crate::Transition::probe_id`] is an index into this list.
pub const PROGRAMS: [&str; 4] = [TP_BTF, PERF, FENTRY, KPROBE];

/// The index of a program in [`PROGRAMS`]. It does not compile for another name.
#[must_use]
pub const fn probe_id(program: &str) -> u8 {
    let mut id = 0;
    while !is_equal(PROGRAMS[id].as_bytes(), program.as_bytes()) {
        id += 1;
    }
    id as u8
}

/// `==` of slices is not available in a `const fn`.
const fn is_equal(a: &[u8], b: &[u8]) -> bool {
    match (a, b) {
        ([], []) => true,
        ([a, rest_a @ ..], [b, rest_b @ ..]) => *a == *b && is_equal(rest_a, rest_b),
        _ => false,
    }
}

/// `inet_sock_set_state`, BTF-typed tracepoint.
pub const TP_BTF: &str = "selfconn_tp_btf";
/// `inet_sock_set_state`, perf tracepoint.
pub const PERF: &str = "selfconn_perf";
/// `tcp_set_state`, fentry.
pub const FENTRY: &str = "selfconn_fentry";
/// `tcp_set_state`, kprobe, on x86-64.
pub const KPROBE: &str = "selfconn_kprobe";
/// `tcp_set_state`, kprobe, on arm64.
pub const KPROBE_ARM64: &str = "selfconn_kprobe_arm64";

/// [`TP_BTF`] for kernels whose address offsets differ from [`crate::STATIC_OFFSETS`]: it reads them from
/// [`OFFSETS`].
pub const TP_BTF_OFFSETS: &str = "selfconn_tp_btf_offsets";
/// [`FENTRY`] for the same kernels.
pub const FENTRY_BTF_OFFSETS: &str = "selfconn_fentry_btf_offsets";
/// [`KPROBE`] for the same kernels.
pub const KPROBE_BTF_OFFSETS: &str = "selfconn_kprobe_btf_offsets";
/// [`KPROBE_ARM64`] for the same kernels.
pub const KPROBE_ARM64_BTF_OFFSETS: &str = "selfconn_kprobe_arm64_btf_offsets";

/// The programs that depend on the architecture: where a kprobe finds the arguments of a function. The object has
/// them for each of these, so one object is right on all. The architecture as Rust names it; the program with
/// static offsets, and the one with offsets from BTF.
pub const KPROBES: [(&str, &str, &str); 2] =
    [("x86_64", KPROBE, KPROBE_BTF_OFFSETS), ("aarch64", KPROBE_ARM64, KPROBE_ARM64_BTF_OFFSETS)];

/// The kprobe program of an architecture. `None`: the object has none for it.
#[must_use]
pub const fn kprobe(arch: &str, uses_static_offsets: bool) -> Option<&'static str> {
    let mut at = 0;
    while at < KPROBES.len() {
        let (known, with_static, with_btf) = KPROBES[at];
        if is_equal(known.as_bytes(), arch.as_bytes()) {
            return Some(if uses_static_offsets { with_static } else { with_btf });
        }
        at += 1;
    }
    None
}

/// `inet_csk_get_port`, fexit.
pub const BIND_FEXIT: &str = "selfconn_bind_fexit";
/// Entry of the system call `bind()`, perf tracepoint.
pub const BIND_ENTER: &str = "selfconn_bind_enter";
/// Exit of the system call `bind()`, perf tracepoint.
pub const BIND_EXIT: &str = "selfconn_bind_exit";

/// Iterator over the descriptors of all tasks.
pub const DESCRIPTORS: &str = "selfconn_descriptors";
/// Iterator over all tasks; it lists the network namespaces.
pub const NAMESPACES: &str = "selfconn_namespaces";

/// Egress of a loopback device: the guard.
pub const GUARD: &str = "selfconn_guard";
/// The same, if it only reports: so the kernel's list of programs shows what a guard does.
pub const GUARD_DRY_RUN: &str = "selfconn_dryrun";

/// Ring buffer of [`crate::Record`]; owned by `ring_buffer.rs`.
pub const RECORDS: &str = "RECORDS";
/// Ring buffer of [`crate::BindFailure`](crate::bind_failure::BindFailure) records, apart from [`RECORDS`], so that
/// failed binds delay no transition; owned by `bind_failure.rs`.
pub const BIND_RECORDS: &str = "BIND_RECORDS";
/// Array of `u64`, indexed by [`crate::held_port_slot`]; owned by `held_ports.rs`.
pub const HELD_PORTS: &str = "HELD_PORTS";
/// Array of `u64`, indexed by [`crate::port_slot`]. 0: the end of a listener there is not reported. Owned by
/// `watched_ports.rs`.
pub const WATCHED_PORTS: &str = "WATCHED_PORTS";
/// Per-CPU array of `u64`, indexed by [`crate::counter`]; owned by `counters.rs`.
pub const COUNTERS: &str = "COUNTERS";
/// Array of [`crate::ConnectSet`], indexed by [`crate::set_index`]; owned by `connect_table.rs`.
pub const CONNECT_TABLE: &str = "CONNECT_TABLE";
/// Hash from an [`Endpoint`](crate::Endpoint) to its
/// [`RefusedCount`](crate::refused_connects::RefusedCount); owned by `refused_connects.rs`. The kernel
/// truncates the name to 15 characters.
pub const REFUSED_CONNECTS: &str = "REFUSED_CONNECTS";

/// Array of `u64`, indexed by [`crate::port_slot`]: when a connect was last refused there (`CLOCK_BOOTTIME`,
/// nanoseconds), or 0; owned by `refused_connects.rs`.
pub const REFUSED_AT: &str = "REFUSED_AT";
/// Hash from an [`Owner`](crate::Owner), or [`EVERYBODY`](crate::refused_connects::EVERYBODY), to the number of its
/// entries in [`REFUSED_CONNECTS`], a `u64`. User space counts them anew when it removes entries; owned by
/// `refused_connects.rs`.
pub const REFUSED_SHARES: &str = "REFUSED_SHARES";
/// LRU hash from an [`Owner`](crate::Owner) to its [`OwnerState`](crate::owner::OwnerState); owned by `owners.rs`.
pub const OWNERS: &str = "OWNERS";

/// Ring buffer of [`crate::guard::GuardRecord`]; this and the maps and globals of the guard below are owned by
/// `guard.rs`.
pub const GUARD_RECORDS: &str = "GUARD_RECORDS";
/// Array of [`crate::guard::PortRules`], indexed by port.
pub const GUARD_PORTS: &str = "GUARD_PORTS";
/// Hash from a uid to bits of [`crate::guard::rule`].
pub const GUARD_UIDS: &str = "GUARD_UIDS";
/// Hash from the id of a control group to bits of [`crate::guard::rule`].
pub const GUARD_CGROUPS: &str = "GUARD_CGROUPS";
/// Map: the network namespaces whose first connect is reported.
pub const GUARD_NAMESPACES: &str = "GUARD_NAMESPACES";
/// Global `u32`: one of [`crate::guard::mode`].
pub const GUARD_MODE: &str = "GUARD_MODE";
/// Global `u32`: bits of [`crate::guard::rule`].
pub const GUARD_ONLY: &str = "GUARD_ONLY";
/// Global `u32`: 1 if there are rules about control groups.
pub const GUARD_BY_CGROUP: &str = "GUARD_BY_CGROUP";
/// Global `u64`: cookie of the socket of the self-test.
pub const GUARD_SELF_TEST: &str = "GUARD_SELF_TEST";

/// Global `[u32; FIELDS]`: the offset of each [`crate::Field`].
pub const OFFSETS: &str = "OFFSETS";
/// Global `u32`: one of [`crate::task_access`].
pub const TASK_ACCESS: &str = "TASK_ACCESS";
/// Global `u32`: one of [`crate::cgroup_access`].
pub const CGROUP_ACCESS: &str = "CGROUP_ACCESS";
/// Global `u64`: the id of the control group whose processes are one owner's. 0: there is none.
pub const WATCHED_CGROUP: &str = "WATCHED_CGROUP";
/// Global `u32`: 1 if programs with typed pointers may call `bpf_get_socket_cookie`.
pub const SOCKET_COOKIE: &str = "SOCKET_COOKIE";
/// Global `u32`: number of values of [`CONNECT_TABLE`].
pub const CONNECT_SETS: &str = "CONNECT_SETS";
/// Global `u32`: maximum number of entries of [`REFUSED_CONNECTS`].
pub const REFUSED_SIZE: &str = "REFUSED_SIZE";
/// Global `u32`: one of [`crate::reported`].
pub const REPORTED: &str = "REPORTED";
