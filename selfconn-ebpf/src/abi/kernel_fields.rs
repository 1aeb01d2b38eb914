//! The fields of kernel structures that the programs read, and their names in BTF.

/// The kernel fields that the programs read. The number of a field is the index of its offset in the global
/// [`crate::names::OFFSETS`]. Those that decide about most transitions come first, because their offsets are then in
/// one cache line.
///
/// rustc emits no CO-RE relocations, so user space reads the offsets from the running kernel's BTF and sets
/// them before the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// `u16`.
    Family,
    /// `u8`, volatile.
    State,
    /// `u8`: see [`super::BindOptions`]. The member is the first bit field of that byte.
    BindOptions,
    /// `u16`, host byte order.
    Num,
    /// `u16`, network byte order.
    Dport,
    /// `u32`, network byte order.
    RcvSaddr,
    /// `u32`, network byte order.
    Daddr,
    /// `[u32; 4]`, network byte order; absent without `CONFIG_IPV6`.
    V6RcvSaddr,
    /// `[u32; 4]`, network byte order; absent without `CONFIG_IPV6`.
    V6Daddr,
    /// `int`.
    BoundDevIf,
    /// `struct net *`; absent without `CONFIG_NET_NS`.
    Net,
    /// `int[2]`, in `struct net`: the first and the last port that the kernel chooses. Absent since v6.8.
    PortRangePair,
    /// `u32`, in `struct net`: the last port in the upper half, the first in the lower. Absent before v6.8.
    PortRangePacked,
    /// `u16`, network byte order.
    Sport,
    /// `u16` since v5.6.
    Protocol,
    /// `u64`.
    Cookie,
    /// `u32`, in `struct net`.
    NetnsInum,
    /// `u64`, in `struct net`. Since v5.12; absent, too, if user space can't ask for it (before v5.14).
    NetnsCookie,
    /// `u32`, in `struct net`: random, and not zero. Absent if [`Self::NetnsCookie`] is present.
    NetnsHashMix,
    /// `struct inet_timewait_death_row *`, in `struct net`. Absent where the struct itself is there.
    DeathRow,
    /// `u32`: the number of TIME_WAIT entries, or one more. In the death row or, where that is a part of it, in
    /// `struct net`.
    TimeWaitCount,
    /// `int`, beside it: `net.ipv4.tcp_max_tw_buckets`.
    TimeWaitMax,
    /// `int`.
    Error,
    /// `int`.
    LockOwned,
    /// `u32`, a user id in the initial user namespace.
    SockUid,
    /// `struct socket *`.
    SockSocket,
    /// `u64`.
    BytesSent,
    /// `u64`.
    BytesRetrans,
    /// `u64`.
    BytesReceived,
    /// `u32`.
    SndUna,
    /// `u32`.
    RcvNxt,
    /// `u32`, in `struct inet_sock`: the port range that the socket was given, as in [`Self::PortRangePacked`]. 0:
    /// none. Absent before v6.8, also where the member is a struct (since v6.3).
    OwnPortRange,
    /// `bool`, in `tcp_sock`; absent without `CONFIG_MPTCP`.
    IsMptcp,
    /// `struct task_struct *`.
    GroupLeader,
    /// `char[16]`.
    TaskComm,
    /// `u64`, nanoseconds.
    StartBoottime,
    /// `struct mm_struct *`; a kernel thread has none.
    TaskMm,
    /// `unsigned long`, in `mm_struct`.
    ArgStart,
    /// `const struct cred *`.
    TaskCred,
    /// `struct user_namespace *`.
    CredUserNs,
    /// `int`; 0 for the initial user namespace.
    UserNsLevel,
    /// `struct user_namespace *`.
    UserNsParent,
    /// `u32`, a user id in the initial user namespace.
    UserNsOwner,
    /// `unsigned int`.
    UserNsInum,
    /// `struct files_struct *`.
    TaskFiles,
    /// `struct fdtable *`.
    FilesFdt,
    /// `unsigned int`.
    FdtMax,
    /// `struct file **`.
    FdtFiles,
    /// `void *`.
    FilePrivate,
    /// `struct inode *`.
    FileInode,
    /// `unsigned long`, in `struct inode`.
    InodeNumber,
    /// `struct super_block *`.
    InodeSuperBlock,
    /// `unsigned long`.
    FilesystemMagic,
    /// `struct file *`.
    SocketFile,
    /// `struct sock *`.
    SocketSk,
    /// `pid_t`: the id of the process.
    TaskTgid,
    /// `pid_t`: the id of the thread.
    TaskPid,
    /// `struct nsproxy *`.
    TaskNsproxy,
    /// `struct net *`.
    NsproxyNet,
    /// `struct list_head`, in `struct net`: the list of all network namespaces.
    NetList,
    /// `const struct proc_ns_operations *`, in `struct net`: the same for every network namespace.
    NetOps,
    /// `refcount_t`, in `struct net`. 0: the namespace has ended, and waits to be cleaned up. Its name is another one
    /// before v5.11 and since v6.18.
    NetRefs,
}

/// The members of `struct net` that are [`Field::NetRefs`], too: of v6.18 and of v5.10.
pub const OTHER_NET_REFS: [&str; 2] = ["ns.__ns_ref", "count"];

/// Number of fields.
pub const FIELDS: usize = Field::NetRefs as usize + 1;

/// The member of `struct net` that is [`Field::PortRangePair`] if it is an array, else
/// [`Field::PortRangePacked`] (`struct local_ports`, include/net/netns/ipv4.h at v6.7 and v6.8).
pub const PORT_RANGE: &str = "ipv4.ip_local_ports.range";

/// The member of `struct inet_sock` that is [`Field::OwnPortRange`] if it is a number (include/net/inet_sock.h at v6.7
/// and v6.8).
pub const OWN_PORT_RANGE: &str = "local_port_range";

/// The struct that counts the TIME_WAIT entries of a network namespace (include/net/inet_timewait_sock.h at v6.12).
pub const DEATH_ROW: &str = "inet_timewait_death_row";

/// The offset of a field that the running kernel does not have. As a positive `i32` it is an immediate operand of a
/// comparison; a larger number would be loaded first.
pub const ABSENT: u32 = i32::MAX as u32;

/// Offsets of the addresses, the ports, the state and the namespace of a socket in Linux 6.18: `struct sock_common`,
/// include/net/sock.h, with CONFIG_IPV6 and CONFIG_NET_NS, on 64 bits. User space compares them with the BTF of the
/// running kernel.
pub const STATIC_OFFSETS: [(Field, u32); 9] = [
    (Field::Family, 16),
    (Field::Daddr, 0),
    (Field::RcvSaddr, 4),
    (Field::V6Daddr, 56),
    (Field::V6RcvSaddr, 72),
    (Field::Dport, 12),
    (Field::Num, 14),
    (Field::State, 18),
    (Field::Net, 48),
];

/// True if these offsets equal [`STATIC_OFFSETS`], so that the programs with offsets as constants can be
/// used.
#[must_use]
pub fn uses_static_offsets(offsets: &[u32; FIELDS]) -> bool {
    STATIC_OFFSETS.iter().all(|(field, offset)| offsets[*field as usize] == *offset)
}

impl Field {
    /// Every field: the field, its struct in BTF, its member in BTF, and whether every program requires it.
    pub const ALL: [(Self, &'static str, &'static str, bool); FIELDS] = [
        (Self::Family, "sock_common", "skc_family", true),
        (Self::State, "sock_common", "skc_state", true),
        (Self::BindOptions, "sock_common", "skc_reuse", false),
        (Self::Num, "sock_common", "skc_num", true),
        (Self::Dport, "sock_common", "skc_dport", true),
        (Self::RcvSaddr, "sock_common", "skc_rcv_saddr", true),
        (Self::Daddr, "sock_common", "skc_daddr", true),
        (Self::V6RcvSaddr, "sock_common", "skc_v6_rcv_saddr", false),
        (Self::V6Daddr, "sock_common", "skc_v6_daddr", false),
        (Self::BoundDevIf, "sock_common", "skc_bound_dev_if", false),
        (Self::Net, "sock_common", "skc_net", false),
        (Self::PortRangePair, "net", PORT_RANGE, false),
        (Self::PortRangePacked, "net", PORT_RANGE, false),
        (Self::Sport, "inet_sock", "inet_sport", true),
        (Self::Protocol, "sock", "sk_protocol", true),
        (Self::Cookie, "sock_common", "skc_cookie", false),
        (Self::NetnsInum, "net", "ns.inum", false),
        (Self::NetnsCookie, "net", "net_cookie", false),
        (Self::NetnsHashMix, "net", "hash_mix", false),
        (Self::DeathRow, "net", "ipv4.tcp_death_row", false),
        (Self::TimeWaitCount, DEATH_ROW, "tw_refcount.refs.counter", false),
        (Self::TimeWaitMax, DEATH_ROW, "sysctl_max_tw_buckets", false),
        (Self::Error, "sock", "sk_err", false),
        (Self::LockOwned, "sock", "sk_lock.owned", false),
        (Self::SockUid, "sock", "sk_uid.val", false),
        (Self::SockSocket, "sock", "sk_socket", false),
        (Self::BytesSent, "tcp_sock", "bytes_sent", false),
        (Self::BytesRetrans, "tcp_sock", "bytes_retrans", false),
        (Self::BytesReceived, "tcp_sock", "bytes_received", false),
        (Self::SndUna, "tcp_sock", "snd_una", false),
        (Self::RcvNxt, "tcp_sock", "rcv_nxt", false),
        (Self::OwnPortRange, "inet_sock", OWN_PORT_RANGE, false),
        (Self::IsMptcp, "tcp_sock", "is_mptcp", false),
        (Self::GroupLeader, "task_struct", "group_leader", false),
        (Self::TaskComm, "task_struct", "comm", false),
        (Self::StartBoottime, "task_struct", "start_boottime", false),
        (Self::TaskMm, "task_struct", "mm", false),
        (Self::ArgStart, "mm_struct", "arg_start", false),
        (Self::TaskCred, "task_struct", "cred", false),
        (Self::CredUserNs, "cred", "user_ns", false),
        (Self::UserNsLevel, "user_namespace", "level", false),
        (Self::UserNsParent, "user_namespace", "parent", false),
        (Self::UserNsOwner, "user_namespace", "owner.val", false),
        (Self::UserNsInum, "user_namespace", "ns.inum", false),
        (Self::TaskFiles, "task_struct", "files", false),
        (Self::FilesFdt, "files_struct", "fdt", false),
        (Self::FdtMax, "fdtable", "max_fds", false),
        (Self::FdtFiles, "fdtable", "fd", false),
        (Self::FilePrivate, "file", "private_data", false),
        (Self::FileInode, "file", "f_inode", false),
        (Self::InodeNumber, "inode", "i_ino", false),
        (Self::InodeSuperBlock, "inode", "i_sb", false),
        (Self::FilesystemMagic, "super_block", "s_magic", false),
        (Self::SocketFile, "socket", "file", false),
        (Self::SocketSk, "socket", "sk", false),
        (Self::TaskTgid, "task_struct", "tgid", false),
        (Self::TaskPid, "task_struct", "pid", false),
        (Self::TaskNsproxy, "task_struct", "nsproxy", false),
        (Self::NsproxyNet, "nsproxy", "net_ns", false),
        (Self::NetList, "net", "list", false),
        (Self::NetOps, "net", "ns.ops", false),
        (Self::NetRefs, "net", "ns.count", false),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_different_offset_is_not_static() {
        let mut offsets = [ABSENT; FIELDS];
        STATIC_OFFSETS.iter().for_each(|(field, offset)| offsets[*field as usize] = *offset);
        assert!(uses_static_offsets(&offsets));
        for (field, offset) in STATIC_OFFSETS {
            let mut other = offsets;
            other[field as usize] = offset + 4;
            assert!(!uses_static_offsets(&other), "{field:?}");
        }
    }

    #[test]
    fn the_field_table_is_in_the_order_of_its_indices() {
        for (index, (field, ..)) in Field::ALL.iter().enumerate() {
            assert_eq!(*field as usize, index);
        }
    }
}
