//! The only code that reads kernel memory. What it knows of the kernel's layout are the offsets that user space took
//! from the running kernel's BTF, and the tracepoint's record, whose layout user space compared with the kernel's
//! `format` file; both before the load.

use core::{
    arch::asm,
    marker::PhantomData,
    mem::{self, MaybeUninit},
    ptr,
};

use aya_ebpf::{EbpfContext, Global, helpers::generated as helpers, programs::TracePointContext};
use selfconn_ebpf::{
    ABSENT, COMM_LEN, FIELDS, Field, Opener, Task, Transition, USUAL, family, state, task_access,
};

/// Offsets of [`Field`]s. In frozen `.rodata`, so the verifier knows each as a constant and drops what is absent.
#[unsafe(no_mangle)]
static OFFSETS: [u32; FIELDS] = [ABSENT; FIELDS];

/// One of [`task_access`].
#[unsafe(no_mangle)]
static TASK_ACCESS: Global<u32> = Global::new(task_access::NONE);

#[inline(always)]
fn offset(field: Field) -> Option<usize> {
    // SAFETY: the index of a Field is below FIELDS. Volatile, for user space changes the value before the load.
    let offset = unsafe { ptr::read_volatile((&raw const OFFSETS).cast::<u32>().add(field as usize)) };
    (offset != ABSENT).then_some(offset as usize)
}

/// Whether it can be told at SYN_SENT if the socket has a port already; not without BTF.
#[inline(always)]
pub(crate) fn knows_port() -> bool {
    offset(Field::Num).is_some()
}

/// How a program knows where the addresses of a socket are. Nothing else is asked for every transition.
pub(crate) trait Layout {
    fn offset(field: Field) -> Option<usize>;
}

/// As [`USUAL`] has it: numbers in the instructions. A load of an offset is of a cold cache line more often than not, and
/// four of them took more time than all the rest.
pub(crate) struct Usual;

impl Layout for Usual {
    #[inline(always)]
    fn offset(field: Field) -> Option<usize> {
        USUAL.iter().find(|(one, _)| *one as usize == field as usize).map(|(_, offset)| *offset as usize)
    }
}

/// As user space has set it.
pub(crate) struct Any;

impl Layout for Any {
    #[inline(always)]
    fn offset(field: Field) -> Option<usize> {
        offset(field)
    }
}

/// A way for a program to read kernel memory.
pub(crate) trait Memory: Copy {
    /// Reads a value at an address the kernel gave us; zero where nothing can be read.
    fn read<T: Copy + Default>(address: *const u8) -> T;

    /// The same socket, seen so that fields beyond `struct sock` may be read.
    fn full(sk: *const u8) -> Option<*const u8>;

    /// The lower half of an address, as a number to compute with.
    fn low(address: *const u8) -> u32;
}

/// Plain loads, which the verifier allows on the typed pointers of tp_btf and fentry programs.
#[derive(Clone, Copy)]
pub(crate) struct Direct;

/// `bpf_probe_read_kernel`, for programs whose pointers are mere numbers; refused under lockdown=confidentiality.
#[derive(Clone, Copy)]
pub(crate) struct Probe;

impl Memory for Direct {
    #[inline(always)]
    fn read<T: Copy + Default>(address: *const u8) -> T {
        // SAFETY: the verifier accepts this load only where it can follow the pointer's type to this offset; a fault
        // reads as zero. Fields have their natural alignment.
        unsafe { address.cast::<T>().read() }
    }

    #[inline(always)]
    fn full(sk: *const u8) -> Option<*const u8> {
        // SAFETY: the helper checks what the pointer is, and answers NULL for all but a full TCP socket
        // (`bpf_skc_to_tcp_sock`, net/core/filter.c at v5.10).
        let tcp = unsafe { helpers::bpf_skc_to_tcp_sock(sk.cast_mut().cast()) };
        (!tcp.is_null()).then_some(tcp.cast_const().cast())
    }

    #[inline(always)]
    fn low(address: *const u8) -> u32 {
        let low: u64;
        // The verifier follows a typed pointer and refuses arithmetic on it, but takes a copy of 32 bits for a number
        // (`check_alu_op`, kernel/bpf/verifier.c at v5.10); the compiler has 64-bit registers only.
        // SAFETY: copies a register.
        unsafe { asm!("w0 = w1", in("r1") address, out("r0") low, options(pure, nomem, preserves_flags)) };
        low as u32
    }
}

impl Memory for Probe {
    #[inline(always)]
    fn read<T: Copy + Default>(address: *const u8) -> T {
        let mut value = MaybeUninit::<T>::uninit();
        // Whether it failed is not asked, for each answer would be a path of its own for the verifier.
        // SAFETY: the helper never faults; it writes all of the size it is given, zeroes where it fails
        // (`bpf_probe_read_kernel_common`, kernel/trace/bpf_trace.c at v5.10), and zero is a value of every T used here.
        unsafe {
            helpers::bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address.cast());
            value.assume_init()
        }
    }

    #[inline(always)]
    fn full(sk: *const u8) -> Option<*const u8> {
        Some(sk)
    }

    #[inline(always)]
    fn low(address: *const u8) -> u32 {
        address as u64 as u32
    }
}

/// A `struct sock`.
#[derive(Clone, Copy)]
pub(crate) struct Sock<M> {
    sk: *const u8,
    memory: PhantomData<M>,
}

impl Sock<Probe> {
    /// As [`Self::own_address`] for [`Usual`], by as few calls as can be: one for IPv4, and another one for IPv6.
    #[inline(always)]
    pub(crate) fn own_address_at_once(self) -> Option<Own> {
        /// The family is in the third word.
        const FAMILY: usize = place(Field::Family) / 8;
        const { assert!(place(Field::Daddr) == 0 && place(Field::RcvSaddr) == 4) };
        const { assert!(place(Field::Family) % 8 == 0 && place(Field::V6RcvSaddr) == place(Field::V6Daddr) + 16) };
        let head = Probe::read::<[u64; FAMILY + 1]>(self.sk);
        match u8::try_from(halves(head[FAMILY])[0] & 0xffff).ok()? {
            family::INET => {
                let [to, addr] = halves(head[0]);
                (to == addr).then(|| Own { family: family::INET, words: words(mapped(addr)) })
            }
            family::INET6 => {
                let both = Probe::read::<[u64; 4]>(self.sk.wrapping_add(place(Field::V6Daddr)));
                let is_own = both[1] == both[3] && both[0] == both[2];
                is_own.then_some(Own { family: family::INET6, words: [both[2], both[3]] })
            }
            _ => None,
        }
    }
}

/// Where [`USUAL`] has a field.
const fn place(field: Field) -> usize {
    let mut at = 0;
    while USUAL[at].0 as usize != field as usize {
        at += 1;
    }
    USUAL[at].1 as usize
}

impl<M: Memory> Sock<M> {
    #[inline(always)]
    pub(crate) fn new(sk: *const u8) -> Self {
        Self { sk, memory: PhantomData }
    }

    /// The key of everything remembered about this socket: only to be stored and compared.
    #[inline(always)]
    pub(crate) fn key(self) -> u64 {
        self.sk as u64
    }

    /// The lower half of the key.
    #[inline(always)]
    pub(crate) fn low(self) -> u32 {
        M::low(self.sk)
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

    /// The address, if it is both source and destination.
    #[inline(always)]
    pub(crate) fn own_address<L: Layout>(self) -> Option<Own> {
        let family = M::read::<u16>(self.sk.wrapping_add(L::offset(Field::Family)?));
        if family == u16::from(family::INET) {
            let (destination, source) = (L::offset(Field::Daddr)?, L::offset(Field::RcvSaddr)?);
            let at = |offset| M::read::<u32>(self.sk.wrapping_add(offset));
            let [to, addr] = if source == destination + 4 {
                // Side by side (`skc_addrpair`, include/net/sock.h at v5.10): one load, for each has to be guarded.
                halves(M::read(self.sk.wrapping_add(destination)))
            } else {
                [at(destination), at(source)]
            };
            (to == addr).then_some(())?;
            Some(Own { family: family::INET, words: words(mapped(addr)) })
        } else if family == u16::from(family::INET6) {
            let (destination, source) = (L::offset(Field::V6Daddr)?, L::offset(Field::V6RcvSaddr)?);
            // The lower half first, for that is where two addresses differ.
            let at = |offset| M::read::<u64>(self.sk.wrapping_add(offset));
            let low = at(source + 8);
            (at(destination + 8) == low).then_some(())?;
            let high = at(source);
            (at(destination) == high).then_some(Own { family: family::INET6, words: [high, low] })
        } else {
            None
        }
    }

    /// The family and the source address, as in [`Self::own_address`].
    #[inline(always)]
    pub(crate) fn source_address(self) -> Option<(u8, [u32; 4])> {
        let family = self.get::<u16>(Field::Family);
        if family == u16::from(family::INET) {
            Some((family::INET, mapped(self.get(Field::RcvSaddr))))
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

    /// The port the socket holds, host byte order; 0: none.
    #[inline(always)]
    pub(crate) fn num(self) -> u16 {
        self.get(Field::Num)
    }

    #[inline(always)]
    pub(crate) fn protocol(self) -> u16 {
        self.get(Field::Protocol)
    }

    /// The source port as [`selfconn_ebpf::judge`] wants it, host byte order.
    #[inline(always)]
    pub(crate) fn source_port(self, new: u8) -> u16 {
        let num = self.num();
        if num != 0 || new != state::CLOSE {
            return num;
        }
        M::full(self.sk).map_or(0, |full| u16::from_be(Self::at(full, Field::Sport)))
    }

    /// Whether its dial met a closed port: `tcp_reset` says so before the socket comes to CLOSE (`net/ipv4/tcp_input.c`
    /// at v5.10). One that the program gave up, or that nobody answered, was not refused.
    #[inline(always)]
    pub(crate) fn was_refused(self) -> bool {
        const ECONNREFUSED: u32 = 111;
        self.get::<u32>(Field::Error) == ECONNREFUSED
    }

    /// Inode of the network namespace; 0: unknown.
    #[inline(always)]
    pub(crate) fn netns(self) -> u32 {
        let (Some(net), Some(inum)) = (offset(Field::Net), offset(Field::NetnsInum)) else { return 0 };
        let net: Pointer = M::read(self.sk.wrapping_add(net));
        M::read(net.0.wrapping_add(inum))
    }

    /// Fills in what only the socket itself knows.
    #[inline(always)]
    pub(crate) fn describe(self, out: &mut Transition) {
        out.cookie = self.get(Field::Cookie);
        out.netns = self.netns();
        out.ifindex = self.get(Field::BoundDevIf);
        out.error = self.get(Field::Error);
        out.is_owned = u8::from(self.get::<u32>(Field::LockOwned) != 0);
        let known = offset(Field::BytesSent).is_some() && offset(Field::SndUna).is_some();
        let full = M::full(self.sk).filter(|_| known);
        out.has_counters = u8::from(full.is_some());
        // Stored once: zeroes in advance would become a call to memset, byte by byte.
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

/// A pointer that can be read out of kernel memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Pointer(*const u8);

impl Default for Pointer {
    fn default() -> Self {
        Self(ptr::null())
    }
}

/// An address that is both source and destination.
#[derive(Clone, Copy)]
pub(crate) struct Own {
    family: u8,
    /// In memory order; IPv4 as v4-mapped.
    words: [u64; 2],
}

impl Own {
    /// One of [`family`].
    #[inline(always)]
    pub(crate) fn family(self) -> u8 {
        self.family
    }

    /// As [`selfconn_ebpf::Tuple`] has it.
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
pub(crate) fn mapped(v4: u32) -> [u32; 4] {
    [0, 0, 0xffff_u32.to_be(), v4]
}

/// The record of the perf tracepoint: `trace_event_raw_inet_sock_set_state`, include/trace/events/sock.h at v5.10;
/// the same from v5.6 on. The verifier refuses run-time offsets into a context, so they are constants here, and user
/// space compares them with the kernel's `format` file.
pub(crate) struct Record {
    pub(crate) sock: Sock<Probe>,
    pub(crate) own: Own,
    pub(crate) old: u8,
    pub(crate) new: u8,
    /// Host byte order, from `inet_sport`.
    pub(crate) sport: u16,
    /// Host byte order.
    pub(crate) dport: u16,
    pub(crate) protocol: u16,
}

impl Record {
    /// Whether source and destination are one address. The v6 fields hold IPv4 addresses too, v4-mapped; the v4 fields
    /// are junk for IPv6.
    #[inline(always)]
    pub(crate) fn is_own(ctx: &TracePointContext) -> bool {
        // The lower half first, for that is where two addresses differ.
        field::<u64>(ctx, 48) == field::<u64>(ctx, 64) && field::<u64>(ctx, 40) == field::<u64>(ctx, 56)
    }

    /// The record, if source and destination are one address.
    #[inline(always)]
    pub(crate) fn new(ctx: &TracePointContext) -> Option<Self> {
        Self::is_own(ctx).then(|| Self {
            sock: Sock::new(field::<Pointer>(ctx, 8).0),
            own: Own { family: field::<u16>(ctx, 28) as u8, words: [field(ctx, 40), field(ctx, 48)] },
            old: field::<u32>(ctx, 16) as u8,
            new: field::<u32>(ctx, 20) as u8,
            sport: field(ctx, 24),
            dport: field(ctx, 26),
            protocol: field(ctx, 30),
        })
    }
}

/// The socket that the running task has open under this number. `None`: it is no socket.
#[inline(always)]
pub(crate) fn of_descriptor(fd: u32) -> Option<Sock<Probe>> {
    #[inline(always)]
    fn at<T: Copy + Default>(base: *const u8, field: Field) -> Option<T> {
        Some(Probe::read(base.wrapping_add(offset(field)?)))
    }
    // SAFETY: no arguments; the number is only handed to bpf_probe_read_kernel.
    let task = unsafe { helpers::bpf_get_current_task() } as *const u8;
    let files = at::<Pointer>(task, Field::TaskFiles)?.0;
    let table = at::<Pointer>(files, Field::FilesFdt)?.0;
    if fd >= at::<u32>(table, Field::FdtMax)? {
        return None;
    }
    let slots = at::<Pointer>(table, Field::FdtFiles)?.0;
    let file = Probe::read::<Pointer>(slots.wrapping_add(8 * fd as usize)).0;
    let socket = at::<Pointer>(file, Field::FilePrivate)?.0;
    // Any file may have private data; a socket's leads back to the file.
    if file.is_null() || at::<Pointer>(socket, Field::SocketFile)?.0 != file {
        return None;
    }
    let sk = at::<Pointer>(socket, Field::SocketSk)?.0;
    (!sk.is_null()).then(|| Sock::new(sk))
}

/// A field of the tracepoint's record.
#[inline(always)]
fn field<T: Copy>(ctx: &TracePointContext, offset: usize) -> T {
    // SAFETY: the record has 72 bytes, each field is aligned in it, and the verifier checks every load.
    unsafe { ctx.as_ptr().cast_const().cast::<u8>().add(offset).cast::<T>().read() }
}

/// A name as two words, for bytes are copied one by one.
type Name = [u64; COMM_LEN / 8];

/// The running task, and when its process started: `start_boottime` of the leader, nanoseconds; 0: unknown.
#[inline(always)]
pub(crate) fn current() -> (Task, u64) {
    let pid_tgid = aya_ebpf::helpers::bpf_get_current_pid_tgid();
    let (pid, tid) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
    let mut name = MaybeUninit::<Name>::uninit();
    // SAFETY: the helper writes all of the size it is given; it fails only for want of a task, and then zeroes.
    let name = unsafe {
        helpers::bpf_get_current_comm(name.as_mut_ptr().cast(), COMM_LEN as u32);
        name.assume_init()
    };
    let is_leader = pid == tid;
    let (leader, start_ns) = match TASK_ACCESS.load() {
        // SAFETY: no arguments; the pointer is valid while the program runs.
        task_access::BTF => {
            leader::<Direct>(unsafe { helpers::bpf_get_current_task_btf() }.cast(), is_leader)
        }
        // SAFETY: no arguments; the number is only handed to bpf_probe_read_kernel.
        task_access::PROBE => {
            leader::<Probe>(unsafe { helpers::bpf_get_current_task() } as *const u8, is_leader)
        }
        _ => ([0; 2], 0),
    };
    let leader = if is_leader { name } else { leader };
    // SAFETY: of the same size, and every bit pattern is a value.
    let bytes = |name| unsafe { mem::transmute::<Name, [u8; COMM_LEN]>(name) };
    (Task { pid, tid, comm: bytes(name), leader: bytes(leader) }, start_ns)
}

/// Name and start of the process, from its leader; the name only where it isn't the task's own.
#[inline(always)]
fn leader<M: Memory>(task: *const u8, is_leader: bool) -> (Name, u64) {
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

/// The running task as an opener.
#[inline(always)]
pub(crate) fn opener(at_ns: u64, cause: u32) -> Opener {
    let (task, start_ns) = current();
    Opener { at_ns, start_ns, task, uid: aya_ebpf::helpers::bpf_get_current_uid_gid() as u32, cause }
}
