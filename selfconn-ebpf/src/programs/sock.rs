//! The fields of `struct sock`, and the socket behind a file descriptor.

use core::marker::PhantomData;

use aya_ebpf::{Global, helpers::generated as helpers};
use selfconn_ebpf::{BindOptions, Endpoint, Field, family, hashed_netns, socket_file, state};
use zerocopy::transmute;

use super::kernel_read::{KernelRead, Layout, Pointer, ProbeRead, offset, static_offset};

/// 1 if programs with typed pointers may call `bpf_get_socket_cookie`, else 0. User space sets it before the load.
#[unsafe(no_mangle)]
static SOCKET_COOKIE: Global<u32> = Global::new(0);

/// True if the programs can read at SYN_SENT whether the socket already has a port. This needs BTF.
#[inline(always)]
pub(crate) fn can_read_port() -> bool {
    offset(Field::Num).is_some()
}

/// A `struct sock`.
#[derive(Clone, Copy)]
pub(crate) struct Sock<M> {
    sk: *const u8,
    memory: PhantomData<M>,
}

impl Sock<ProbeRead> {
    /// Like [`Self::self_addr`] for [`StaticOffsets`] with the ports and the state, with the fewest helper calls: one
    /// for IPv4, two for IPv6.
    #[inline(always)]
    pub(crate) fn head_by_fewest_reads(self) -> Option<(SelfAddr, Ports, u8)> {
        const {
            assert!(static_offset(Field::Daddr) == 0 && static_offset(Field::RcvSaddr) == 4);
            assert!(static_offset(Field::Dport) == 12 && static_offset(Field::Num) == 14);
            assert!(static_offset(Field::Family) == 16 && static_offset(Field::State) == 18);
            assert!(static_offset(Field::V6RcvSaddr) == static_offset(Field::V6Daddr) + 16);
        };
        let head = ProbeRead::read::<[u64; 3]>(self.sk);
        let [_, _, dport, num]: [u16; 4] = transmute!(head[1]);
        let [family, state, ..]: [u16; 4] = transmute!(head[2]);
        let [state, _] = state.to_ne_bytes();
        let self_addr = match u8::try_from(family).ok()? {
            family::INET => {
                let [destination, source]: [u32; 2] = transmute!(head[0]);
                (destination == source)
                    .then(|| SelfAddr { family: family::INET, words: transmute!(v4_mapped(source)) })
            }
            family::INET6 => {
                let both = ProbeRead::read::<[u64; 4]>(self.sk.wrapping_add(static_offset(Field::V6Daddr)));
                let is_self_addressed = both[1] == both[3] && both[0] == both[2];
                is_self_addressed.then_some(SelfAddr { family: family::INET6, words: [both[2], both[3]] })
            }
            _ => None,
        }?;
        Some((self_addr, Ports { held: num, destination: u16::from_be(dport) }, state))
    }
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

    /// A field of the socket. Zero: this kernel does not have it. `T` must have the field's size.
    #[inline(always)]
    pub(crate) fn get<T: Copy + Default>(self, field: Field) -> T {
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
    pub(crate) fn state<L: Layout>(self) -> u8 {
        L::offset(Field::State).map_or(0, |state| M::read(self.sk.wrapping_add(state)))
    }

    #[inline(always)]
    pub(crate) fn ports<L: Layout>(self) -> Ports {
        let at = |field| L::offset(field).map_or(0, |offset| M::read(self.sk.wrapping_add(offset)));
        Ports { held: at(Field::Num), destination: u16::from_be(at(Field::Dport)) }
    }

    /// The source address of the socket, if it equals the destination address.
    #[inline(always)]
    pub(crate) fn self_addr<L: Layout>(self) -> Option<SelfAddr> {
        let family = M::read::<u16>(self.sk.wrapping_add(L::offset(Field::Family)?));
        if family == u16::from(family::INET) {
            let (destination, source) = (L::offset(Field::Daddr)?, L::offset(Field::RcvSaddr)?);
            let at = |offset| M::read::<u32>(self.sk.wrapping_add(offset));
            let [to, from]: [u32; 2] = if source == destination + 4 {
                // The addresses are adjacent (`skc_addrpair`, include/net/sock.h at v5.10), so one load reads
                // both. This is faster, because the kernel guards each load against faults.
                halves(M::read(self.sk.wrapping_add(destination)))
            } else {
                [at(destination), at(source)]
            };
            (to == from).then_some(())?;
            Some(SelfAddr { family: family::INET, words: v4_words(from) })
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

    /// The port that the socket holds, host byte order. 0: none.
    #[inline(always)]
    pub(crate) fn num(self) -> u16 {
        self.get(Field::Num)
    }

    #[inline(always)]
    pub(crate) fn protocol(self) -> u16 {
        self.get(Field::Protocol)
    }

    /// The options that decide whether the socket shares its port.
    #[inline(always)]
    pub(crate) fn bind_options(self) -> BindOptions {
        match offset(Field::BindOptions) {
            Some(offset) => BindOptions::from_kernel(M::read(self.sk.wrapping_add(offset))),
            None => BindOptions::UNKNOWN,
        }
    }

    /// The source port that [`selfconn_ebpf::classify`] expects, host byte order.
    #[inline(always)]
    pub(crate) fn source_port(self, held: u16, new: u8) -> u16 {
        if held != 0 || new != state::CLOSE {
            return held;
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

    /// An address and a port in the network namespace of this socket, with its device.
    #[inline(always)]
    pub(crate) fn endpoint(self, family: u8, addr: [u32; 4], port: u16) -> Endpoint {
        let (mut netns, mut netns_cookie) = (0, 0);
        if let Some(net) = offset(Field::Net) {
            let net: Pointer = M::read(self.sk.wrapping_add(net));
            (netns, netns_cookie) = netns_id::<M>(net.0);
        }
        let ifindex = self.get(Field::BoundDevIf);
        Endpoint { addr, netns_cookie, netns, ifindex, port, family: family.into(), padding: 0 }
    }

    /// The cookie of the socket. 0: it has none yet.
    #[inline(always)]
    pub(crate) fn cookie(self) -> u64 {
        if SOCKET_COOKIE.load() != 0 { M::make_cookie(self.sk) } else { self.get(Field::Cookie) }
    }

    /// Inode of the socket's file. 0: unknown, or there is no file.
    #[inline(always)]
    pub(crate) fn inode(self) -> u64 {
        if offset(Field::InodeNumber).is_none() {
            return 0;
        }
        // A socket that its program has closed has neither.
        let socket: Pointer = self.get(Field::SockSocket);
        if M::NULL_FAULTS && socket.0.is_null() {
            return 0;
        }
        let file: Pointer = Self::at(socket.0, Field::SocketFile);
        if M::NULL_FAULTS && file.0.is_null() {
            return 0;
        }
        let inode: Pointer = Self::at(file.0, Field::FileInode);
        if M::NULL_FAULTS && inode.0.is_null() {
            return 0;
        }
        Self::at(inode.0, Field::InodeNumber)
    }

    /// What file the socket has: one of [`socket_file`].
    #[inline(always)]
    pub(crate) fn file(self) -> u8 {
        if offset(Field::SockSocket).is_none() || offset(Field::SocketFile).is_none() {
            return socket_file::UNKNOWN;
        }
        let socket: Pointer = self.get(Field::SockSocket);
        if socket.0.is_null() {
            return socket_file::UNKNOWN;
        }
        let file: Pointer = Self::at(socket.0, Field::SocketFile);
        if self.is_mptcp() {
            socket_file::OF_MPTCP
        } else if file.0.is_null() {
            socket_file::ABSENT
        } else {
            socket_file::PRESENT
        }
    }

    /// True if this is a subflow of an MPTCP socket.
    #[inline(always)]
    fn is_mptcp(self) -> bool {
        offset(Field::IsMptcp).is_some()
            && M::full_sock(self.sk).is_some_and(|full| Self::at::<u8>(full, Field::IsMptcp) != 0)
    }

    /// True if `connect()` can choose this port as the source port: it is in the port range of the socket's
    /// namespace. The socket's own range can only be a part of it (`inet_sk_get_local_port_range`,
    /// net/ipv4/inet_connection_sock.c at v6.12). True if the range can't be read.
    #[inline(always)]
    pub(crate) fn can_choose<L: Layout>(self, port: u16) -> bool {
        let Some(net) = L::offset(Field::Net) else { return true };
        let (low, high) = if let Some(range) = offset(Field::PortRangePacked) {
            let net: Pointer = M::read(self.sk.wrapping_add(net));
            let range: u32 = M::read(net.0.wrapping_add(range));
            (range & 0xffff, range >> 16)
        } else if let Some(range) = offset(Field::PortRangePair) {
            let net: Pointer = M::read(self.sk.wrapping_add(net));
            (M::read(net.0.wrapping_add(range)), M::read(net.0.wrapping_add(range + 4)))
        } else {
            return true;
        };
        let port = u32::from(port);
        // A read that fails returns zero, which is not the end of any range.
        high == 0 || (low <= port && port <= high)
    }

    /// The port range that the socket was given (`IP_LOCAL_PORT_RANGE`): see [`Field::OwnPortRange`]. 0: none.
    #[inline(always)]
    pub(crate) fn own_port_range(self) -> u32 {
        if offset(Field::OwnPortRange).is_none() {
            return 0;
        }
        M::full_sock(self.sk).map_or(0, |full| Self::at(full, Field::OwnPortRange))
    }

    /// True if the namespace of the socket has as many TIME_WAIT entries as it may have, or one less. Then a closed
    /// socket may have got none (`inet_twsk_alloc`, net/ipv4/inet_timewait_sock.c at v5.10).
    #[inline(always)]
    pub(crate) fn is_time_wait_full(self) -> bool {
        let (Some(net), Some(count), Some(max)) =
            (offset(Field::Net), offset(Field::TimeWaitCount), offset(Field::TimeWaitMax))
        else {
            return false;
        };
        let mut row: Pointer = M::read(self.sk.wrapping_add(net));
        if let Some(death_row) = offset(Field::DeathRow) {
            row = M::read(row.0.wrapping_add(death_row));
        }
        M::read::<u32>(row.0.wrapping_add(count)) >= M::read::<u32>(row.0.wrapping_add(max))
    }

    /// True if a process holds the socket lock.
    #[inline(always)]
    pub(crate) fn is_owned(self) -> bool {
        self.get::<u32>(Field::LockOwned) != 0
    }

    /// The counters of a full TCP socket. `None`: this is not one, or this kernel does not have all of them.
    #[inline(always)]
    pub(crate) fn tcp_counters(self) -> Option<TcpCounters> {
        let has_offsets = offset(Field::BytesSent).is_some() && offset(Field::SndUna).is_some();
        let full = M::full_sock(self.sk).filter(|_| has_offsets)?;
        Some(TcpCounters {
            bytes_sent: Self::at(full, Field::BytesSent),
            bytes_retrans: Self::at(full, Field::BytesRetrans),
            bytes_received: Self::at(full, Field::BytesReceived),
            snd_una: Self::at(full, Field::SndUna),
            rcv_nxt: Self::at(full, Field::RcvNxt),
        })
    }
}

/// The inode and the cookie of a network namespace, as in an [`Endpoint`].
#[inline(always)]
pub(crate) fn netns_id<M: KernelRead>(net: *const u8) -> (u32, u64) {
    let cookie = match offset(Field::NetnsHashMix) {
        Some(hash_mix) => hashed_netns(M::read(net.wrapping_add(hash_mix))),
        None => Sock::<M>::at(net, Field::NetnsCookie),
    };
    (Sock::<M>::at(net, Field::NetnsInum), cookie)
}

/// The ports of a socket, host byte order.
#[derive(Clone, Copy)]
pub(crate) struct Ports {
    /// The port that the socket holds: `skc_num`. 0: none.
    pub(crate) held: u16,
    pub(crate) destination: u16,
}

/// Fields of `struct tcp_sock`: see [`selfconn_ebpf::Transition`].
#[derive(Default)]
pub(crate) struct TcpCounters {
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_retrans: u64,
    pub(crate) bytes_received: u64,
    pub(crate) snd_una: u32,
    pub(crate) rcv_nxt: u32,
}

/// An address that is both the source and the destination address of a socket.
#[derive(Clone, Copy)]
pub(crate) struct SelfAddr {
    family: u8,
    /// The address in memory order; IPv4 as v4-mapped.
    words: [u64; 2],
}

impl SelfAddr {
    #[inline(always)]
    pub(crate) fn new(family: u8, words: [u64; 2]) -> Self {
        Self { family, words }
    }

    /// This address with a port, in the network namespace of a socket.
    #[inline(always)]
    pub(crate) fn endpoint<M: KernelRead>(self, sock: Sock<M>, port: u16) -> Endpoint {
        sock.endpoint(self.family, transmute!(self.words), port)
    }
}

/// `::ffff:a.b.c.d`, network byte order.
#[inline(always)]
pub(crate) fn v4_mapped(v4: u32) -> [u32; 4] {
    [0, 0, 0xffff_u32.to_be(), v4]
}

/// [`v4_mapped`] as two words. Written with shifts, like [`halves`], because a transmute keeps more values alive over
/// the comparison: then the programs save two registers at every transition of the host.
#[inline(always)]
fn v4_words(v4: u32) -> [u64; 2] {
    let word = |low: u32, high: u32| {
        let ([a, b, c, d], [e, f, g, h]) = (low.to_ne_bytes(), high.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    };
    let [a, b, c, d] = v4_mapped(v4);
    [word(a, b), word(c, d)]
}

/// The two halves of a word, in memory order.
#[inline(always)]
fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
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
