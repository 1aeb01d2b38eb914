//! The only code that reads kernel memory: fields of sockets and tasks, and the record of the perf
//! tracepoint.
//!
//! It uses two kinds of knowledge about kernel layouts. User space reads the offsets of fields from the
//! running kernel's BTF, and compares the layout of the tracepoint record with the kernel's `format` file.
//! Both happen before the load.

use core::{
    arch::asm,
    marker::PhantomData,
    mem::{self, MaybeUninit},
    ptr,
};

use aya_ebpf::{EbpfContext, Global, helpers::generated as helpers, programs::TracePointContext};
use selfconn_ebpf::{
    ABSENT, COMM_LEN, FIELDS, Field, Opener, STATIC_OFFSETS, Task, Transition, family, state, task_access,
};

/// Offsets of [`Field`]s. They are in frozen `.rodata`, so the verifier knows each one as a constant and
/// removes the code for absent fields.
#[unsafe(no_mangle)]
static OFFSETS: [u32; FIELDS] = [ABSENT; FIELDS];

/// One of [`task_access`].
#[unsafe(no_mangle)]
static TASK_ACCESS: Global<u32> = Global::new(task_access::NONE);

#[inline(always)]
fn offset(field: Field) -> Option<usize> {
    // The read is volatile, because user space changes the value before the load.
    // SAFETY: the index of a Field is below FIELDS.
    let offset = unsafe { ptr::read_volatile((&raw const OFFSETS).cast::<u32>().add(field as usize)) };
    (offset != ABSENT).then_some(offset as usize)
}

/// True if the programs can read at SYN_SENT whether the socket already has a port. This needs BTF.
#[inline(always)]
pub(crate) fn can_read_port() -> bool {
    offset(Field::Num).is_some()
}

/// Source of the offsets of a socket's address fields. The programs read only these fields at every
/// transition.
pub(crate) trait Layout {
    fn offset(field: Field) -> Option<usize>;
}

/// Offsets of [`STATIC_OFFSETS`]: constants in the instructions. Loading an offset from memory usually misses
/// the cache, and four such loads took more time than the rest of the program.
pub(crate) struct StaticOffsets;

impl Layout for StaticOffsets {
    #[inline(always)]
    fn offset(field: Field) -> Option<usize> {
        STATIC_OFFSETS
            .iter()
            .find(|(known, _)| *known as usize == field as usize)
            .map(|(_, offset)| *offset as usize)
    }
}

/// Offsets that user space has set from BTF.
pub(crate) struct BtfOffsets;

impl Layout for BtfOffsets {
    #[inline(always)]
    fn offset(field: Field) -> Option<usize> {
        offset(field)
    }
}

/// A way for a program to read kernel memory.
pub(crate) trait KernelRead: Copy {
    /// Reads a value at an address that the kernel provided. Returns zero if the address cannot be read.
    fn read<T: Copy + Default>(address: *const u8) -> T;

    /// The same socket as a pointer through which fields beyond `struct sock` can be read. `None`: not a full
    /// TCP socket.
    fn full_sock(sk: *const u8) -> Option<*const u8>;

    /// The lower half of an address, as a number that allows arithmetic.
    fn low_half(address: *const u8) -> u32;
}

/// Direct loads, which the verifier allows on the typed pointers of tp_btf and fentry programs.
#[derive(Clone, Copy)]
pub(crate) struct DirectLoad;

/// `bpf_probe_read_kernel`, for programs whose pointers are plain numbers to the verifier. The kernel refuses
/// it under lockdown=confidentiality.
#[derive(Clone, Copy)]
pub(crate) struct ProbeRead;

impl KernelRead for DirectLoad {
    #[inline(always)]
    fn read<T: Copy + Default>(address: *const u8) -> T {
        // SAFETY: the verifier accepts this load only if the pointer's type has a field at this offset; a
        // fault reads as zero. Fields have their natural alignment.
        unsafe { address.cast::<T>().read() }
    }

    #[inline(always)]
    fn full_sock(sk: *const u8) -> Option<*const u8> {
        // SAFETY: the helper checks the pointer, and returns NULL unless it is a full TCP socket
        // (`bpf_skc_to_tcp_sock`, net/core/filter.c at v5.10).
        let tcp = unsafe { helpers::bpf_skc_to_tcp_sock(sk.cast_mut().cast()) };
        (!tcp.is_null()).then_some(tcp.cast_const().cast())
    }

    #[inline(always)]
    fn low_half(address: *const u8) -> u32 {
        let low: u64;
        // The verifier tracks a typed pointer and refuses arithmetic on it, but treats a 32-bit copy as a
        // number (`check_alu_op`, kernel/bpf/verifier.c at v5.10). Inline assembly is needed because the
        // compiler uses only 64-bit registers.
        // SAFETY: the instruction copies a register.
        unsafe { asm!("w0 = w1", in("r1") address, out("r0") low, options(pure, nomem, preserves_flags)) };
        low as u32
    }
}

impl KernelRead for ProbeRead {
    #[inline(always)]
    fn read<T: Copy + Default>(address: *const u8) -> T {
        let mut value = MaybeUninit::<T>::uninit();
        // The result of the helper is not checked, because a check would add a path for the verifier.
        // SAFETY: the helper never faults. It always writes the full size, zeroes if it fails
        // (`bpf_probe_read_kernel_common`, kernel/trace/bpf_trace.c at v5.10), and zero is a valid value of
        // every T used here.
        unsafe {
            helpers::bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address.cast());
            value.assume_init()
        }
    }

    #[inline(always)]
    fn full_sock(sk: *const u8) -> Option<*const u8> {
        Some(sk)
    }

    #[inline(always)]
    fn low_half(address: *const u8) -> u32 {
        address as u64 as u32
    }
}

/// A `struct sock`.
#[derive(Clone, Copy)]
pub(crate) struct Sock<M> {
    sk: *const u8,
    memory: PhantomData<M>,
}

impl Sock<ProbeRead> {
    /// Like [`Self::self_addr`] for [`StaticOffsets`], with the fewest helper calls: one for IPv4, two for
    /// IPv6.
    #[inline(always)]
    pub(crate) fn self_addr_by_fewest_reads(self) -> Option<SelfAddr> {
        /// Index of the word that contains the family.
        const FAMILY_WORD: usize = static_offset(Field::Family) / 8;
        const { assert!(static_offset(Field::Daddr) == 0 && static_offset(Field::RcvSaddr) == 4) };
        const {
            assert!(
                static_offset(Field::Family) % 8 == 0
                    && static_offset(Field::V6RcvSaddr) == static_offset(Field::V6Daddr) + 16
            )
        };
        let head = ProbeRead::read::<[u64; FAMILY_WORD + 1]>(self.sk);
        match u8::try_from(halves(head[FAMILY_WORD])[0] & 0xffff).ok()? {
            family::INET => {
                let [destination, source] = halves(head[0]);
                (destination == source)
                    .then(|| SelfAddr { family: family::INET, words: words(v4_mapped(source)) })
            }
            family::INET6 => {
                let both = ProbeRead::read::<[u64; 4]>(self.sk.wrapping_add(static_offset(Field::V6Daddr)));
                let is_self_addressed = both[1] == both[3] && both[0] == both[2];
                is_self_addressed.then_some(SelfAddr { family: family::INET6, words: [both[2], both[3]] })
            }
            _ => None,
        }
    }
}

/// The offset of a field in [`STATIC_OFFSETS`].
const fn static_offset(field: Field) -> usize {
    let mut index = 0;
    while STATIC_OFFSETS[index].0 as usize != field as usize {
        index += 1;
    }
    STATIC_OFFSETS[index].1 as usize
}

impl<M: KernelRead> Sock<M> {
    #[inline(always)]
    pub(crate) fn new(sk: *const u8) -> Self {
        Self { sk, memory: PhantomData }
    }

    /// The kernel address of the socket, as the key of its entry. It may only be stored and compared.
    #[inline(always)]
    pub(crate) fn key(self) -> u64 {
        self.sk as u64
    }

    /// The lower half of the key.
    #[inline(always)]
    pub(crate) fn low_half(self) -> u32 {
        M::low_half(self.sk)
    }

    #[inline(always)]
    fn get<T: Copy + Default>(self, field: Field) -> T {
        Self::at(self.sk, field)
    }

    #[inline(always)]
    fn at<T: Copy + Default>(base: *const u8, field: Field) -> T {
        match offset(field) {
            Some(offset) => M::read(base.wrapping_add(offset)),
            None => T::default(),
        }
    }

    #[inline(always)]
    pub(crate) fn state(self) -> u8 {
        self.get(Field::State)
    }

    /// The source address of the socket, if it equals the destination address.
    #[inline(always)]
    pub(crate) fn self_addr<L: Layout>(self) -> Option<SelfAddr> {
        let family = M::read::<u16>(self.sk.wrapping_add(L::offset(Field::Family)?));
        if family == u16::from(family::INET) {
            let (destination, source) = (L::offset(Field::Daddr)?, L::offset(Field::RcvSaddr)?);
            let at = |offset| M::read::<u32>(self.sk.wrapping_add(offset));
            let [to, from] = if source == destination + 4 {
                // The addresses are adjacent (`skc_addrpair`, include/net/sock.h at v5.10), so one load reads
                // both. This is faster, because the kernel guards each load against faults.
                halves(M::read(self.sk.wrapping_add(destination)))
            } else {
                [at(destination), at(source)]
            };
            (to == from).then_some(())?;
            Some(SelfAddr { family: family::INET, words: words(v4_mapped(from)) })
        } else if family == u16::from(family::INET6) {
            let (destination, source) = (L::offset(Field::V6Daddr)?, L::offset(Field::V6RcvSaddr)?);
            // The lower half is compared first, because two addresses usually differ there.
            let at = |offset| M::read::<u64>(self.sk.wrapping_add(offset));
            let low = at(source + 8);
            (at(destination + 8) == low).then_some(())?;
            let high = at(source);
            (at(destination) == high).then_some(SelfAddr { family: family::INET6, words: [high, low] })
        } else {
            None
        }
    }

    /// The family and the source address; IPv4 as v4-mapped.
    #[inline(always)]
    pub(crate) fn source_address(self) -> Option<(u8, [u32; 4])> {
        let family = self.get::<u16>(Field::Family);
        if family == u16::from(family::INET) {
            Some((family::INET, v4_mapped(self.get(Field::RcvSaddr))))
        } else if family == u16::from(family::INET6) {
            offset(Field::V6RcvSaddr)?;
            Some((family::INET6, self.get(Field::V6RcvSaddr)))
        } else {
            None
        }
    }

    /// Destination port, host byte order.
    #[inline(always)]
    pub(crate) fn dport(self) -> u16 {
        u16::from_be(self.get(Field::Dport))
    }

    /// The port that the socket holds, host byte order. 0: none.
    #[inline(always)]
    pub(crate) fn num(self) -> u16 {
        self.get(Field::Num)
    }

    #[inline(always)]
    pub(crate) fn protocol(self) -> u16 {
        self.get(Field::Protocol)
    }

    /// The source port that [`selfconn_ebpf::classify`] expects, host byte order.
    #[inline(always)]
    pub(crate) fn source_port(self, new: u8) -> u16 {
        let num = self.num();
        if num != 0 || new != state::CLOSE {
            return num;
        }
        M::full_sock(self.sk).map_or(0, |full| u16::from_be(Self::at(full, Field::Sport)))
    }

    /// True if the port was closed: `tcp_reset` sets the error before the socket enters CLOSE
    /// (`net/ipv4/tcp_input.c` at v5.10). It is false if the program closed the socket early, or if no answer
    /// came.
    #[inline(always)]
    pub(crate) fn was_refused(self) -> bool {
        const ECONNREFUSED: u32 = 111;
        self.get::<u32>(Field::Error) == ECONNREFUSED
    }

    /// Inode of the network namespace. 0: unknown.
    #[inline(always)]
    pub(crate) fn netns(self) -> u32 {
        let (Some(net), Some(inum)) = (offset(Field::Net), offset(Field::NetnsInum)) else { return 0 };
        let net: Pointer = M::read(self.sk.wrapping_add(net));
        M::read(net.0.wrapping_add(inum))
    }

    /// Fills in the fields that are read from the socket.
    #[inline(always)]
    pub(crate) fn fill(self, out: &mut Transition) {
        out.cookie = self.get(Field::Cookie);
        out.netns = self.netns();
        out.ifindex = self.get(Field::BoundDevIf);
        out.error = self.get(Field::Error);
        out.is_owned = u8::from(self.get::<u32>(Field::LockOwned) != 0);
        let has_offsets = offset(Field::BytesSent).is_some() && offset(Field::SndUna).is_some();
        let full = M::full_sock(self.sk).filter(|_| has_offsets);
        out.has_counters = u8::from(full.is_some());
        // Each field is written once, because zeroing them first would become a call to memset, which works
        // byte by byte.
        let (sent, retrans, received, snd_una, rcv_nxt) = match full {
            Some(full) => (
                Self::at(full, Field::BytesSent),
                Self::at(full, Field::BytesRetrans),
                Self::at(full, Field::BytesReceived),
                Self::at(full, Field::SndUna),
                Self::at(full, Field::RcvNxt),
            ),
            None => (0, 0, 0, 0, 0),
        };
        (out.bytes_sent, out.bytes_retrans, out.bytes_received) = (sent, retrans, received);
        (out.snd_una, out.rcv_nxt) = (snd_una, rcv_nxt);
    }
}

/// A pointer as a value that can be read from kernel memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Pointer(*const u8);

impl Default for Pointer {
    fn default() -> Self {
        Self(ptr::null())
    }
}

/// An address that is both the source and the destination address of a socket.
#[derive(Clone, Copy)]
pub(crate) struct SelfAddr {
    family: u8,
    /// The address in memory order; IPv4 as v4-mapped.
    words: [u64; 2],
}

impl SelfAddr {
    /// One of [`family`].
    #[inline(always)]
    pub(crate) fn family(self) -> u8 {
        self.family
    }

    /// The address in the format of [`selfconn_ebpf::Endpoint::addr`].
    #[inline(always)]
    pub(crate) fn addr(self) -> [u32; 4] {
        let ([a, b], [c, d]) = (halves(self.words[0]), halves(self.words[1]));
        [a, b, c, d]
    }
}

/// An address as two words.
#[inline(always)]
fn words([a, b, c, d]: [u32; 4]) -> [u64; 2] {
    let word = |low: u32, high: u32| {
        let ([a, b, c, d], [e, f, g, h]) = (low.to_ne_bytes(), high.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    };
    [word(a, b), word(c, d)]
}

/// The two halves of a word, in memory order.
#[inline(always)]
fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

/// `::ffff:a.b.c.d`, network byte order.
#[inline(always)]
pub(crate) fn v4_mapped(v4: u32) -> [u32; 4] {
    [0, 0, 0xffff_u32.to_be(), v4]
}

/// The record of the perf tracepoint: `trace_event_raw_inet_sock_set_state`, include/trace/events/sock.h at
/// v5.10. The layout is the same from v5.6 on. The verifier refuses run-time offsets into a context, so they
/// are constants here, and user space compares them with the kernel's `format` file.
pub(crate) struct TracepointRecord {
    pub(crate) sock: Sock<ProbeRead>,
    pub(crate) self_addr: SelfAddr,
    pub(crate) old: u8,
    pub(crate) new: u8,
    /// Host byte order, from `inet_sport`.
    pub(crate) sport: u16,
    /// Host byte order.
    pub(crate) dport: u16,
    pub(crate) protocol: u16,
}

impl TracepointRecord {
    /// True if the source address equals the destination address. The v6 fields also hold IPv4 addresses, as
    /// v4-mapped. The v4 fields are meaningless for IPv6.
    #[inline(always)]
    pub(crate) fn is_self_addressed(ctx: &TracePointContext) -> bool {
        // The lower half is compared first, because two addresses usually differ there.
        field::<u64>(ctx, 48) == field::<u64>(ctx, 64) && field::<u64>(ctx, 40) == field::<u64>(ctx, 56)
    }

    /// The record, if the source address equals the destination address.
    #[inline(always)]
    pub(crate) fn new(ctx: &TracePointContext) -> Option<Self> {
        Self::is_self_addressed(ctx).then(|| Self {
            sock: Sock::new(field::<Pointer>(ctx, 8).0),
            self_addr: SelfAddr {
                family: field::<u16>(ctx, 28) as u8,
                words: [field(ctx, 40), field(ctx, 48)],
            },
            old: field::<u32>(ctx, 16) as u8,
            new: field::<u32>(ctx, 20) as u8,
            sport: field(ctx, 24),
            dport: field(ctx, 26),
            protocol: field(ctx, 30),
        })
    }
}

/// The socket behind a file descriptor of the running task. `None`: the descriptor is not a socket.
#[inline(always)]
pub(crate) fn by_descriptor(fd: u32) -> Option<Sock<ProbeRead>> {
    #[inline(always)]
    fn at<T: Copy + Default>(base: *const u8, field: Field) -> Option<T> {
        Some(ProbeRead::read(base.wrapping_add(offset(field)?)))
    }
    // SAFETY: the helper takes no arguments, and its result is only passed to bpf_probe_read_kernel.
    let task = unsafe { helpers::bpf_get_current_task() } as *const u8;
    let files = at::<Pointer>(task, Field::TaskFiles)?.0;
    let table = at::<Pointer>(files, Field::FilesFdt)?.0;
    if fd >= at::<u32>(table, Field::FdtMax)? {
        return None;
    }
    let slots = at::<Pointer>(table, Field::FdtFiles)?.0;
    let file = ProbeRead::read::<Pointer>(slots.wrapping_add(8 * fd as usize)).0;
    let socket = at::<Pointer>(file, Field::FilePrivate)?.0;
    // Any file can have private data. Only that of a socket points back to the file.
    if file.is_null() || at::<Pointer>(socket, Field::SocketFile)?.0 != file {
        return None;
    }
    let sk = at::<Pointer>(socket, Field::SocketSk)?.0;
    (!sk.is_null()).then(|| Sock::new(sk))
}

/// A field of the tracepoint's record.
#[inline(always)]
fn field<T: Copy>(ctx: &TracePointContext, offset: usize) -> T {
    // SAFETY: the record has 72 bytes, each field in it is aligned, and the verifier checks every load.
    unsafe { ctx.as_ptr().cast_const().cast::<u8>().add(offset).cast::<T>().read() }
}

/// A task name as two words, because bytes would be copied one by one.
type Name = [u64; COMM_LEN / 8];

/// The running task, and the start time of its process: `start_boottime` of the leader, nanoseconds. 0:
/// unknown.
#[inline(always)]
pub(crate) fn current_task() -> (Task, u64) {
    let pid_tgid = aya_ebpf::helpers::bpf_get_current_pid_tgid();
    let (pid, tid) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
    let mut name = MaybeUninit::<Name>::uninit();
    // SAFETY: the helper always writes the full size. It fails only if there is no task, and then writes
    // zeroes.
    let name = unsafe {
        helpers::bpf_get_current_comm(name.as_mut_ptr().cast(), COMM_LEN as u32);
        name.assume_init()
    };
    let is_leader = pid == tid;
    let (leader, start_ns) = match TASK_ACCESS.load() {
        // SAFETY: the helper takes no arguments, and its result is valid while the program runs.
        task_access::BTF => {
            leader::<DirectLoad>(unsafe { helpers::bpf_get_current_task_btf() }.cast(), is_leader)
        }
        // SAFETY: the helper takes no arguments, and its result is only passed to bpf_probe_read_kernel.
        task_access::PROBE => {
            leader::<ProbeRead>(unsafe { helpers::bpf_get_current_task() } as *const u8, is_leader)
        }
        _ => ([0; 2], 0),
    };
    let leader = if is_leader { name } else { leader };
    // SAFETY: the sizes are equal, and every bit pattern is a valid value.
    let bytes = |name| unsafe { mem::transmute::<Name, [u8; COMM_LEN]>(name) };
    (Task { pid, tid, comm: bytes(name), leader: bytes(leader) }, start_ns)
}

/// Name and start time of the process, from its leader thread. The name is read only if the task is not the
/// leader.
#[inline(always)]
fn leader<M: KernelRead>(task: *const u8, is_leader: bool) -> (Name, u64) {
    let (mut name, mut start_ns) = ([0; 2], 0);
    if let Some(group_leader) = offset(Field::GroupLeader) {
        let leader: Pointer = M::read(task.wrapping_add(group_leader));
        if let Some(start) = offset(Field::StartBoottime) {
            start_ns = M::read(leader.0.wrapping_add(start));
        }
        if let Some(comm) = offset(Field::TaskComm)
            && !is_leader
        {
            name = [M::read(leader.0.wrapping_add(comm)), M::read(leader.0.wrapping_add(comm + 8))];
        }
    }
    (name, start_ns)
}

/// An [`Opener`] for the running task.
#[inline(always)]
pub(crate) fn opener(at_ns: u64, cause: u32) -> Opener {
    let (task, start_ns) = current_task();
    Opener { at_ns, start_ns, task, uid: aya_ebpf::helpers::bpf_get_current_uid_gid() as u32, cause }
}
