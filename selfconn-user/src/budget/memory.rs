//! The memory of the daemon: what each part may keep, and the sum. Every limit of a part is here, and the part itself
//! checks at compile time that an entry has no more bytes than this file says.
//!
//! The ring buffers and the tables of the eBPF programs come on top: the kernel charges them to the same control group.

/// All memory of the daemon above the ring buffers and the tables: 64 MiB.
pub const BUDGET_BYTES: usize = 64 << 20;

/// Maximum number of tracked self-connections. A hash table with 16,384 slots has room for as many.
pub const MAX_CONNECTIONS: usize = 14_336;

/// Maximum number of connections whose close is remembered while a snapshot of the socket table is read, which owners
/// share.
pub const MAX_CLOSED_DURING_SNAPSHOT: usize = 14_336;

/// Maximum number of sockets in a snapshot of the socket table.
pub const MAX_SNAPSHOT_SOCKETS: usize = 12_288;

/// Maximum number of threads that are asked for namespaces because they are openers: as many as the connect table has
/// entries.
pub const MAX_OPENER_THREADS: usize = 16_384;

/// Number of sets of ports: of untracked connections, of those since the snapshot, of what the snapshot left out with
/// its marks, of TIME_WAITs without room, and of what the last snapshot did not list.
pub const PORT_SETS: usize = 9;

/// Maximum number of holders of a socket that are kept.
pub const MAX_HOLDERS: usize = 8;

/// Maximum number of holders in a snapshot beside one of each socket, which the users of the sockets share.
pub const MAX_MORE_HOLDERS: usize = 1_280;

/// Maximum number of connections in TIME_WAIT that are kept to explain failed binds.
pub const MAX_TIME_WAITS: usize = 7_168;

/// Maximum number of servers whose failed binds are counted.
pub const MAX_BIND_FAILURES: usize = 3_584;

/// Maximum number of events that wait for a look-up. Beyond it they are emitted without what is not looked up yet.
pub const MAX_PENDING_EVENTS: usize = 7_168;

/// Maximum number of connections that wait for the remedy.
pub const MAX_REMEDIES: usize = 4_096;

/// The lists of all processes, which their owners share: 12,288 processes, at most 9,216 of one owner.
pub const PROCESS_LIST_BYTES: usize = 12_288 * LISTED_PROCESS_BYTES;

/// What the user namespaces of processes are remembered in while a list is made.
pub const USER_NAMESPACES_BYTES: usize = 64 << 10;

/// Facts of processes: paths, names, arguments, control groups.
pub const PROCESS_FACTS_BYTES: usize = 7 << 20;

/// Lines that wait for a file that refuses writes; about 10,000.
pub const LOG_QUEUE_BYTES: usize = 8 << 20;

/// Lines that wait for a slow reader of stdout, or for the journal.
pub const STDOUT_QUEUE_BYTES: usize = 4 << 20;

/// The daemon's own lines that wait for a reader of stderr.
pub const STDERR_QUEUE_BYTES: usize = 256 << 10;

/// Written bytes that a queue has not given back yet, and what an idle queue keeps.
pub const QUEUE_REST_BYTES: usize = 1 << 20;

/// Bytes of an entry, with its share of the tables that lead to it.
pub const CONNECTION_BYTES: usize = 1_024;
pub const CLOSED_DURING_SNAPSHOT_BYTES: usize = 144;
pub const SNAPSHOT_SOCKET_BYTES: usize = 616;
pub const MORE_HOLDER_BYTES: usize = 112;
pub const PORT_SET_BYTES: usize = 12 << 10;
/// What a socket of a snapshot is matched by, with the connect table and with the tracked connections.
pub const MATCHED_SOCKET_BYTES: usize = 16;
pub const MATCHED_CONNECTION_BYTES: usize = 8;
pub const LISTED_PROCESS_BYTES: usize = 128;
/// Beside its processes, of each owner of processes.
pub const LISTED_OWNER_BYTES: usize = 640;
pub const TIME_WAIT_BYTES: usize = 512;
pub const BIND_FAILURE_BYTES: usize = 256;
pub const PENDING_EVENT_BYTES: usize = 512;
pub const REMEDY_BYTES: usize = 1_536;

/// A part of the daemon that keeps something for others to cause.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPart {
    pub name: &'static str,
    /// The most that it keeps.
    pub bytes: usize,
}

/// All parts.
pub const PARTS: [MemoryPart; 13] = [
    MemoryPart {
        name: "connections",
        bytes: MAX_CONNECTIONS * CONNECTION_BYTES + MAX_MORE_HOLDERS * MORE_HOLDER_BYTES,
    },
    MemoryPart {
        name: "closed in a snapshot",
        bytes: MAX_CLOSED_DURING_SNAPSHOT * CLOSED_DURING_SNAPSHOT_BYTES,
    },
    MemoryPart {
        name: "snapshot",
        bytes: MAX_SNAPSHOT_SOCKETS * SNAPSHOT_SOCKET_BYTES + MAX_MORE_HOLDERS * MORE_HOLDER_BYTES,
    },
    MemoryPart {
        name: "snapshot index",
        bytes: MAX_SNAPSHOT_SOCKETS * MATCHED_SOCKET_BYTES
            + MAX_CONNECTIONS * MATCHED_CONNECTION_BYTES
            + PORT_SETS * PORT_SET_BYTES
            // In the loop, and on their way with the holders of sockets to the namespaces.
            + 3 * MAX_OPENER_THREADS * size_of::<u32>(),
    },
    MemoryPart { name: "process list", bytes: PROCESS_LIST_BYTES + USER_NAMESPACES_BYTES },
    MemoryPart { name: "process facts", bytes: PROCESS_FACTS_BYTES },
    MemoryPart { name: "pending events", bytes: MAX_PENDING_EVENTS * PENDING_EVENT_BYTES },
    MemoryPart { name: "TIME_WAIT", bytes: MAX_TIME_WAITS * TIME_WAIT_BYTES },
    MemoryPart { name: "failed binds", bytes: MAX_BIND_FAILURES * BIND_FAILURE_BYTES },
    MemoryPart { name: "remedy", bytes: MAX_REMEDIES * REMEDY_BYTES },
    MemoryPart { name: "log queue", bytes: LOG_QUEUE_BYTES + QUEUE_REST_BYTES },
    MemoryPart { name: "stdout queue", bytes: STDOUT_QUEUE_BYTES + QUEUE_REST_BYTES },
    // The code's own data, the stacks of the threads, shares of the log, the lines for stderr.
    MemoryPart { name: "everything else", bytes: 7 << 19 },
];

/// What all parts keep at most.
#[must_use]
pub const fn sum() -> usize {
    let (mut sum, mut at) = (0, 0);
    while at < PARTS.len() {
        sum += PARTS[at].bytes;
        at += 1;
    }
    sum
}

const _: () = assert!(sum() <= BUDGET_BYTES);

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{ConnectEntry, refused_connects::RefusedCount};

    use super::*;

    /// What the eBPF programs have with the default options: the ring buffers, two large tables, and all others.
    const PROGRAMS_BYTES: usize =
        (8 << 20) + 16_384 * size_of::<ConnectEntry>() + 4_096 * size_of::<RefusedCount>() + (8 << 20);

    fn bytes(text: &str) -> usize {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match &text[digits.len()..] {
            "M" | "Mi" => 20,
            "G" | "Gi" => 30,
            unit => panic!("{text}: {unit:?}"),
        };
        digits.parse::<usize>().unwrap() << shift
    }

    #[test]
    fn the_limits_of_the_packages_are_above_the_budget() {
        let unit = include_str!("../../../packaging/systemd/selfconn.service");
        let unit_limits = unit
            .lines()
            .filter_map(|line| line.strip_prefix("MemoryMax=").or_else(|| line.strip_prefix("MemoryHigh=")));
        let pod = include_str!("../../../packaging/kubernetes/daemonset.yaml");
        let (_, pod_limits) = pod.split_once("limits:").unwrap();
        let pod_limits = pod_limits.lines().filter_map(|line| line.trim().strip_prefix("memory: ")).take(1);
        let limits: Vec<_> = unit_limits.chain(pod_limits).map(bytes).collect();
        assert!(limits.len() >= 2, "the unit and the DaemonSet have a limit: {limits:?}");
        for limit in limits {
            assert!(BUDGET_BYTES + PROGRAMS_BYTES <= limit, "{BUDGET_BYTES} + {PROGRAMS_BYTES} > {limit}");
        }
    }
}
