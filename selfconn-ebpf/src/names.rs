//! Names of programs, maps and globals: one spelling for the programs and their loader.

/// The programs, in the order of [`crate::Transition::witness`].
pub const PROGRAMS: [&str; 4] = [TP_BTF, PERF, FENTRY, KPROBE];

/// `inet_sock_set_state`, BTF-typed tracepoint.
pub const TP_BTF: &str = "selfconn_tp_btf";
/// `inet_sock_set_state`, perf tracepoint.
pub const PERF: &str = "selfconn_perf";
/// `tcp_set_state`, fentry.
pub const FENTRY: &str = "selfconn_fentry";
/// `tcp_set_state`, kprobe.
pub const KPROBE: &str = "selfconn_kprobe";

/// As [`TP_BTF`], where the addresses are not where [`crate::USUAL`] has them.
pub const TP_BTF_ANY: &str = "selfconn_tp_btf_any";
/// As [`FENTRY`], likewise.
pub const FENTRY_ANY: &str = "selfconn_fentry_any";
/// As [`KPROBE`], likewise.
pub const KPROBE_ANY: &str = "selfconn_kprobe_any";

/// `inet_csk_get_port`, fexit.
pub const BIND_FEXIT: &str = "selfconn_bind_fexit";
/// `bind()`, perf tracepoints.
pub const BIND_ENTER: &str = "selfconn_bind_enter";
/// And its end.
pub const BIND_EXIT: &str = "selfconn_bind_exit";

/// Ring buffer of [`crate::Record`]; owned by `report.rs`.
pub const TRANSITIONS: &str = "TRANSITIONS";
/// Per-CPU array of `u64`, indexed by [`crate::counter`]; owned by `report.rs`.
pub const COUNTERS: &str = "COUNTERS";
/// Array of [`crate::DialSet`], indexed by [`crate::set_of`]; owned by `witness.rs`.
pub const DIALS: &str = "DIALS";
/// Hash from a [`crate::risk::Target`] to its [`crate::risk::Tally`]; owned by `refusal.rs`.
pub const REFUSALS: &str = "REFUSALS";

/// Global `[u32; FIELDS]`: the offset of each [`crate::Field`].
pub const OFFSETS: &str = "OFFSETS";
/// Global `u32`: one of [`crate::task_access`].
pub const TASK_ACCESS: &str = "TASK_ACCESS";
/// Global `u32`: how many values [`DIALS`] has.
pub const DIAL_SETS: &str = "DIAL_SETS";
/// Global `u32`: one of [`crate::reported`].
pub const REPORTED: &str = "REPORTED";
