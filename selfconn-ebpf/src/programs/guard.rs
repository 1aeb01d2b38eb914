//! The guard: a program on the egress of a loopback device. It rewrites the SYN of a socket that connects to itself
//! into the reset that a closed port would send. The reset arrives at the same socket, because the addresses and ports
//! of both directions are equal, and `connect()` returns ECONNREFUSED.
//!
//! Every packet of the device runs the check of the socket's state; no byte of the packet is read for it. The socket
//! and the packet must both be a connect to itself, so a packet that was translated, or written by a raw socket,
//! passes. Whatever the program decides, it returns TC_ACT_UNSPEC, so that the next program of the device runs.

use aya_ebpf::{
    Global,
    bindings::{__sk_buff, TC_ACT_UNSPEC, bpf_sock},
    helpers::generated as helpers,
    macros::map,
    maps::{Array, HashMap, LruHashMap, RingBuf},
    programs::TcContext,
};
use selfconn_ebpf::{
    Endpoint, Field, IPPROTO_TCP, Owner, counter,
    guard::{CGROUP_LEVELS, FirstConnect, MAX_CGROUPS, PortRules, Prevention, is_guarded, mode},
    state, tag,
};

use super::{
    connect_table,
    counters::count,
    kernel_read::{BtfOffsets, DirectLoad, KernelRead},
    owners, ring_buffer,
    sock::{SelfAddr, Sock},
};

/// One of [`mode`].
#[unsafe(no_mangle)]
static GUARD_MODE: Global<u32> = Global::new(mode::OFF);

/// The kinds of rules of which each must match: bits of [`selfconn_ebpf::guard::rule`].
#[unsafe(no_mangle)]
static GUARD_ONLY: Global<u32> = Global::new(0);

/// 1 if there are rules about control groups, else 0.
#[unsafe(no_mangle)]
static GUARD_BY_CGROUP: Global<u32> = Global::new(0);

/// Cookie of the socket of the daemon's self-test, which connects to itself. 0: there is none.
#[unsafe(no_mangle)]
static GUARD_SELF_TEST: Global<u64> = Global::new(0);

/// The guard has a ring buffer of its own, so that it delays no transition. The loader sets its size.
#[map]
static GUARD_RECORDS: RingBuf = RingBuf::with_byte_size(1 << 19, 0);

/// The rules that match a port.
#[map]
static GUARD_PORTS: Array<PortRules> = Array::with_max_entries(1 << 16, 0);

/// The rules that match a user.
#[map]
static GUARD_UIDS: HashMap<u32, u32> = HashMap::with_max_entries(1_024, 0);

/// The rules that match a control group, by its id.
#[map]
static GUARD_CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_CGROUPS as u32, 0);

/// The namespaces whose first connect is reported, by cookie. An LRU, because a second report of one does no harm: a
/// user with more namespaces than this has others' reported again, each for one record of 24 bytes.
#[map]
static GUARD_NAMESPACES: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4_096, 0);

/// The offset of the network header on a loopback device and on a VRF: both have an Ethernet header.
const NETWORK: u32 = 14;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

/// Words of a TCP header without options.
const TCP_WORDS: usize = 5;

/// Maximum number of IPv6 extension headers before the TCP header.
const EXTENSION_HEADERS: usize = 4;

/// Handles a packet that leaves through the device.
#[inline(always)]
pub(crate) fn on_egress(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the verifier checks each load from the context, and from the socket once it is not NULL.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    // SAFETY: as above.
    if !sk.is_null() && unsafe { (*sk).state } == u32::from(state::SYN_SENT) {
        on_syn_sent(skb, sk);
    }
    TC_ACT_UNSPEC
}

/// Handles a packet of a socket in SYN_SENT.
#[inline(never)]
fn on_syn_sent(skb: *mut __sk_buff, sk: *mut bpf_sock) {
    // DCCP and SCTP have a state of the same number; a typed pointer is made of a TCP socket only.
    let Some(tcp) = DirectLoad::full_sock(sk.cast_const().cast()) else { return };
    let sock = Sock::<DirectLoad>::new(tcp);
    let port = sock.num();
    if port != u16::from_be(sock.get(Field::Dport)) || sock.protocol() != IPPROTO_TCP {
        return;
    }
    if on_equal_ports(skb, sock, port).is_err() {
        count(counter::GUARD_UNREADABLE);
    }
}

/// Handles a packet of a socket with equal ports. The port is in host byte order.
#[inline(always)]
fn on_equal_ports(skb: *mut __sk_buff, sock: Sock<DirectLoad>, port: u16) -> Result<(), Unreadable> {
    // The packet's addresses say nothing of the socket's: an output rule may have translated the destination.
    let Some(self_addr) = sock.self_addr::<BtfOffsets>() else { return Ok(()) };
    let at = tcp_header(skb)?;
    if at == 0 {
        return Ok(());
    }
    let syn = Syn { at, words: load(skb, at)? };
    if !syn.is_to_own_port(port) {
        return Ok(());
    }
    if is_exempt(skb, sock, port) {
        count(counter::GUARD_EXEMPT);
    } else if is_signed(skb, &syn) {
        count(counter::GUARD_SIGNED);
    } else if GUARD_MODE.load() == mode::REFUSE && refuse(skb, &syn).is_err() {
        count(counter::GUARD_FAILED);
    } else {
        count(counter::GUARD_PREVENTED);
        report(skb, sock, &self_addr);
    }
    Ok(())
}

/// A helper could not read or write the packet.
struct Unreadable;

/// The TCP header of a packet.
struct Syn {
    /// Offset in the packet.
    at: u32,
    /// Words in memory order.
    words: [u32; TCP_WORDS],
}

impl Syn {
    /// Length of the header with its options.
    #[inline(always)]
    fn len(&self) -> u32 {
        u32::from(self.words[3].to_ne_bytes()[0] >> 4) * 4
    }

    /// True if it is a SYN from this port to this port, which is in host byte order.
    #[inline(always)]
    fn is_to_own_port(&self, port: u16) -> bool {
        let [high, low] = port.to_be_bytes();
        let [_, flags, ..] = self.words[3].to_ne_bytes();
        self.words[0] == u32::from_ne_bytes([high, low, high, low]) && flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// The words 1 to 3 (sequence number, acknowledgement, flags and window) of the reset that `tcp_v4_send_reset`
    /// (net/ipv4/tcp_ipv4.c at v6.12) sends for this SYN.
    #[inline(always)]
    fn reset(&self) -> [u32; 3] {
        let [offset, ..] = self.words[3].to_ne_bytes();
        let acknowledged = u32::from_be(self.words[1]).wrapping_add(1);
        [0, acknowledged.to_be(), u32::from_ne_bytes([offset, RST | ACK, 0, 0])]
    }
}

/// Reads `N` words of the packet.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, at: u32) -> Result<[u32; N], Unreadable> {
    let mut words = [0; N];
    // SAFETY: the helper writes as many bytes as the array has, or fails.
    let outcome = unsafe {
        helpers::bpf_skb_load_bytes(skb.cast_const().cast(), at, words.as_mut_ptr().cast(), 4 * N as u32)
    };
    if outcome == 0 { Ok(words) } else { Err(Unreadable) }
}

/// Reads two bytes of the packet.
#[inline(always)]
fn load_pair(skb: *mut __sk_buff, at: u32) -> Result<[u8; 2], Unreadable> {
    let mut pair = [0; 2];
    // SAFETY: as in `load`.
    let outcome =
        unsafe { helpers::bpf_skb_load_bytes(skb.cast_const().cast(), at, pair.as_mut_ptr().cast(), 2) };
    if outcome == 0 { Ok(pair) } else { Err(Unreadable) }
}

/// The offset of the TCP header, if the source and the destination address are equal. 0: the packet is another one.
#[inline(always)]
fn tcp_header(skb: *mut __sk_buff) -> Result<u32, Unreadable> {
    // SAFETY: the verifier checks the load from the context.
    let ether_type = u16::from_be(unsafe { (*skb).protocol } as u16);
    if ether_type == ETH_P_IP {
        let [first, _, third, source, destination] = load::<5>(skb, NETWORK)?;
        let ([version_and_length, ..], [_, protocol, ..]) = (first.to_ne_bytes(), third.to_ne_bytes());
        if source != destination || u16::from(protocol) != IPPROTO_TCP || version_and_length >> 4 != 4 {
            return Ok(0);
        }
        Ok(NETWORK + u32::from(version_and_length & 15) * 4)
    } else if ether_type == ETH_P_IPV6 {
        let [_, second, a, b, c, d, e, f, g, h] = load::<10>(skb, NETWORK)?;
        if a != e || b != f || c != g || d != h {
            return Ok(0);
        }
        let [_, _, mut next_header, _] = second.to_ne_bytes();
        let mut at = NETWORK + 40;
        for _ in 0..EXTENSION_HEADERS {
            /// Hop-by-hop options, routing, destination options: `include/uapi/linux/in6.h` and `ipv6.h`.
            const SKIPPED: [u8; 3] = [0, 43, 60];
            if next_header != SKIPPED[0] && next_header != SKIPPED[1] && next_header != SKIPPED[2] {
                break;
            }
            let [next, length] = load_pair(skb, at)?;
            next_header = next;
            at += (u32::from(length) + 1) * 8;
        }
        if u16::from(next_header) != IPPROTO_TCP {
            return Ok(0);
        }
        Ok(at)
    } else {
        Ok(0)
    }
}

/// True if a rule, or the daemon's self-test, lets this socket connect to itself.
#[inline(always)]
fn is_exempt(skb: *mut __sk_buff, sock: Sock<DirectLoad>, port: u16) -> bool {
    let self_test = GUARD_SELF_TEST.load();
    // SAFETY: the context is valid.
    if self_test != 0 && unsafe { helpers::bpf_get_socket_cookie(skb.cast()) } == self_test {
        return true;
    }
    // SAFETY: the values of these maps are whole words.
    let mut matched = unsafe { GUARD_PORTS.get_ptr(port.into()).map_or(0, |rules| rules.read_volatile()) };
    let uid: u32 = sock.get(Field::SockUid);
    // SAFETY: as above.
    matched |= unsafe { GUARD_UIDS.get_ptr(&uid).map_or(0, |rules| rules.read_volatile()) };
    if GUARD_BY_CGROUP.load() != 0 {
        for level in 1..=CGROUP_LEVELS {
            // SAFETY: the context is valid.
            let id = unsafe { helpers::bpf_skb_ancestor_cgroup_id(skb, level as i32) };
            if id == 0 {
                break;
            }
            // SAFETY: as above.
            matched |= unsafe { GUARD_CGROUPS.get_ptr(&id).map_or(0, |rules| rules.read_volatile()) };
        }
    }
    !is_guarded(matched, GUARD_ONLY.load())
}

/// True if the SYN is signed by TCP-MD5 or TCP-AO: a rewritten one would fail its signature. Options that can't be read
/// are none. The kernel writes a signature before every other option (`tcp_options_write`, net/ipv4/tcp_output.c at
/// v5.10 and v6.12), so the first few are enough.
#[inline(always)]
fn is_signed(skb: *mut __sk_buff, syn: &Syn) -> bool {
    const END: u8 = 0;
    const PADDING: u8 = 1;
    const MD5: u8 = 19;
    const AO: u8 = 29;
    /// A header has at most 60 bytes. With the mask the verifier knows the same of every offset, so it follows the loop
    /// once.
    const OFFSETS: u32 = 63;
    let (len, mut at) = (syn.len(), 4 * TCP_WORDS as u32);
    for _ in 0..12 {
        // An option of one byte may be the last one.
        if at + 1 >= len {
            return false;
        }
        let Ok([kind, length]) = load_pair(skb, syn.at + at) else { return false };
        if kind == MD5 || kind == AO {
            return true;
        }
        let step = if kind == PADDING { 1 } else { u32::from(length) };
        if kind == END || step == 0 {
            return false;
        }
        at = (at + step) & OFFSETS;
    }
    false
}

/// Rewrites the SYN into the reset that a closed port would send. If that fails, the SYN is as it was: everything that
/// can fail comes before the first write.
#[inline(always)]
fn refuse(skb: *mut __sk_buff, syn: &Syn) -> Result<(), Unreadable> {
    const OPTIONS: u32 = 4 * TCP_WORDS as u32;
    let has_options = syn.len() > OPTIONS;
    let first_option = if has_options { load::<1>(skb, syn.at + OPTIONS)? } else { [0] };
    let end = syn.at + if has_options { OPTIONS + 4 } else { OPTIONS };
    // After it these bytes are in the linear part, and nobody else's (`bpf_try_make_writable`, net/core/filter.c at
    // v5.10), so the writes find nothing to allocate.
    // SAFETY: the context is valid, and the helper checks the length.
    if unsafe { helpers::bpf_skb_pull_data(skb, end) } != 0 {
        return Err(Unreadable);
    }
    let [_, from @ .., _] = syn.words;
    rewrite(skb, syn.at, 4, from, syn.reset())?;
    // No options. If the SYN takes over a TIME_WAIT, it echoes an old timestamp, and a reset with it would be dropped
    // (PAWSActiveRejected, `tcp_rcv_synsent_state_process`, net/ipv4/tcp_input.c at v6.12). Zero is "end of options".
    if has_options { rewrite(skb, syn.at, OPTIONS, first_option, [0]) } else { Ok(()) }
}

/// Replaces words of the TCP header at `tcp`, and corrects the checksum.
#[inline(always)]
fn rewrite<const N: usize>(
    skb: *mut __sk_buff,
    tcp: u32,
    offset: u32,
    mut from: [u32; N],
    mut to: [u32; N],
) -> Result<(), Unreadable> {
    const CHECKSUM: u32 = 16;
    let size = 4 * N as u32;
    // SAFETY: the helper reads as many bytes as the arrays have.
    let difference = unsafe { helpers::bpf_csum_diff(from.as_mut_ptr(), size, to.as_mut_ptr(), size, 0) };
    // Without BPF_F_PSEUDO_HDR the helper leaves the sum of a packet that is to be completed by the device as it is:
    // there it covers the pseudo header only (`inet_proto_csum_replace_by_diff`, net/core/utils.c at v6.12).
    // SAFETY: the helper checks the offset.
    let outcome = unsafe { helpers::bpf_l4_csum_replace(skb, tcp + CHECKSUM, 0, difference as u64, 0) };
    if outcome != 0 {
        return Err(Unreadable);
    }
    // SAFETY: the helper reads as many bytes as the array has, and checks the offset.
    let outcome = unsafe { helpers::bpf_skb_store_bytes(skb, tcp + offset, to.as_ptr().cast(), size, 0) };
    if outcome == 0 { Ok(()) } else { Err(Unreadable) }
}

/// Reports a connect to itself that is refused, or would be.
#[inline(never)]
fn report(skb: *mut __sk_buff, sock: Sock<DirectLoad>, self_addr: &SelfAddr) {
    let endpoint = self_addr.endpoint(sock, sock.num());
    let opener = connect_table::opener_of(sock, &endpoint);
    if !has_room(&opener.owner) {
        return count(counter::GUARD_RING_FULL);
    }
    let Some(mut entry) = GUARD_RECORDS.reserve::<Prevention>(0) else {
        return count(counter::GUARD_RING_FULL);
    };
    entry.write(Prevention {
        tag: tag::PREVENTION,
        padding: 0,
        uid: sock.get(Field::SockUid),
        // SAFETY: the helper takes no arguments.
        at_ns: unsafe { helpers::bpf_ktime_get_boot_ns() },
        // SAFETY: the context is valid.
        cookie: unsafe { helpers::bpf_get_socket_cookie(skb.cast()) },
        endpoint,
        opener,
    });
    entry.submit(0);
}

/// True if the ring buffer takes a record of this owner. The first half is for everybody; an owner beyond the rate
/// finds no room in the second one, so that a flood does not take the names of others' attempts.
#[inline(always)]
fn has_room(owner: &Owner) -> bool {
    // `BPF_RB_AVAIL_DATA` and `BPF_RB_RING_SIZE`, include/uapi/linux/bpf.h at v5.10.
    if GUARD_RECORDS.query(0) < GUARD_RECORDS.query(1) / 2 {
        return true;
    }
    // SAFETY: the helper takes no arguments.
    let now_ns = unsafe { helpers::bpf_ktime_get_boot_ns() };
    owners::admits(owner, |state, users| state.admit_prevention(now_ns, users))
}

/// A task connects a socket to its own address. If it is the first one in its network namespace, user space learns of
/// the namespace.
#[inline(always)]
pub(crate) fn on_connect<M: KernelRead>(sock: Sock<M>) {
    if GUARD_MODE.load() != mode::OFF {
        report_namespace(sock);
    }
}

#[inline(never)]
fn report_namespace<M: KernelRead>(sock: Sock<M>) {
    let Endpoint { netns, netns_cookie, .. } = sock.endpoint(0, [0; 4], 0);
    if netns_cookie == 0 || GUARD_NAMESPACES.get_ptr(&netns_cookie).is_some() {
        return;
    }
    // SAFETY: the helper takes no arguments.
    let tid = unsafe { helpers::bpf_get_current_pid_tgid() } as u32;
    let record =
        || FirstConnect { tag: tag::FIRST_CONNECT, padding: 0, tid, netns_cookie, netns, padding_end: 0 };
    if ring_buffer::try_submit_to(&GUARD_RECORDS, record) {
        let _ = GUARD_NAMESPACES.insert(&netns_cookie, &netns_cookie, 0);
    }
}
