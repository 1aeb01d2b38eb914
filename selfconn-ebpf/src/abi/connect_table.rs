//! The connect table: it maps a socket to the task that called `connect()` on it, for connection attempts in
//! flight and for self-connections. This file defines the layout of its entries and how an entry is
//! validated.
//!
//! Every connection attempt of a socket to its own address gets an entry. Most entries exist only for the
//! microseconds until the source port is known and differs from the destination port. A hash map would take
//! about 150 ns for this, locks included. So the table is an array, which programs access without a helper
//! call. A checksum replaces the lock: an entry that two CPUs wrote at the same time, or that belongs to
//! another socket, fails the checksum and is ignored.

use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use super::{endpoint::Endpoint, owner::CLAIMED, task::Opener};

/// Number of entries in a [`ConnectSet`].
pub const WAYS: usize = 8;

/// The entries of all sockets whose address hashes to the same index: a value of
/// [`crate::names::CONNECT_TABLE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct ConnectSet {
    /// Kernel address of the socket of each entry. 0: the entry is free.
    pub socks: [u64; WAYS],
    /// The entries, in the same order as `socks`.
    pub entries: [ConnectEntry; WAYS],
}

impl ConnectSet {
    /// Size in 64-bit words.
    pub const WORDS: usize = size_of::<Self>() / 8;

    /// Makes a set from its words, in memory order.
    #[must_use]
    pub const fn from_words(words: [u64; Self::WORDS]) -> Self {
        transmute!(words)
    }
}

/// The entry of a connection attempt in flight or of a self-connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct ConnectEntry {
    /// The entry is used only if the whole endpoint matches.
    pub endpoint: Endpoint,
    /// The connecting task.
    pub opener: Opener,
    /// Checksum of the fields above and of the lower half of the socket address.
    checksum: u64,
    /// Upper half: the upper half of the checksum. Lower half: flags of this entry. If the upper half differs
    /// from that of `checksum`, the flags belong to a previous entry and are ignored.
    flags: u64,
}

const _: () = {
    assert!(size_of::<ConnectEntry>() == 144);
    // The addresses of a set's sockets are one cache line.
    assert!(size_of::<[u64; WAYS]>() == 64 && size_of::<ConnectSet>() == 64 + 144 * WAYS);
};

/// The index of a socket's set among `sets`, computed from the lower half of the socket address, because the
/// verifier allows no arithmetic on the whole pointer. Socket structures are aligned to a cache line, so the
/// lowest six bits are dropped.
#[inline(always)]
#[must_use]
pub const fn set_index(sock: u32, sets: u32) -> u32 {
    let cache_line = sock >> 6;
    let hash = (cache_line ^ cache_line >> 13).wrapping_mul(0x9e37_79b1);
    let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    ((hash as u64 * sets as u64) >> 32) as u32
}

impl ConnectEntry {
    /// An entry that is valid for no socket.
    pub const EMPTY: Self =
        Self { endpoint: Endpoint::UNKNOWN, opener: Opener::UNKNOWN, checksum: 0, flags: 0 };

    /// A new entry with these flags set: see [`Self::has_flag`].
    #[inline(always)]
    #[must_use]
    pub const fn new(sock: u32, endpoint: Endpoint, opener: Opener, flags: u32) -> Self {
        let checksum = Self::checksum_of(sock, &endpoint, &opener);
        Self { endpoint, opener, checksum, flags: checksum & UPPER_HALF | flags as u64 }
    }

    /// Marks the entry as taken by a connect that is about to write it: it is valid for no socket, none of its flags is
    /// set, and it is not [evicted](super::owner::evicted).
    #[inline(always)]
    pub fn claim(&mut self) {
        // The stores are volatile, because the key of the socket must come after them.
        // SAFETY: the pointers come from a live reference.
        unsafe {
            (&raw mut self.opener.at_ns).write_volatile(CLAIMED);
            (&raw mut self.flags).write_volatile(0);
        }
    }

    /// True if the entry was written completely by one CPU, and for this socket.
    #[inline(always)]
    #[must_use]
    pub const fn is_valid_for(&self, sock: u32) -> bool {
        self.matches(sock, &self.endpoint, &self.opener)
    }

    /// True if `endpoint` and `opener`, which were copied from this entry, are what was written for this socket.
    #[inline(always)]
    #[must_use]
    pub const fn matches(&self, sock: u32, endpoint: &Endpoint, opener: &Opener) -> bool {
        self.checksum == Self::checksum_of(sock, endpoint, opener)
    }

    /// True if at least one of these flags is set. Each of the lower 16 bits is a state whose transition was
    /// reported; each of the upper 16 bits is a probe that observed the connection attempt.
    #[inline(always)]
    #[must_use]
    pub const fn has_flag(&self, bits: u32) -> bool {
        (self.flags ^ self.checksum) & UPPER_HALF == 0 && self.flags as u32 & bits != 0
    }

    /// True if all of these flags are set. One comparison, because the verifier follows both sides of each branch.
    #[inline(always)]
    #[must_use]
    pub const fn has_flags(&self, bits: u32) -> bool {
        (self.flags ^ self.checksum) & UPPER_HALF | (!self.flags & bits as u64) == 0
    }

    /// Sets these flags, and clears the flags of a previous entry.
    #[inline(always)]
    pub const fn set_flags(&mut self, bits: u32) {
        let flags = if (self.flags ^ self.checksum) & UPPER_HALF == 0 {
            self.flags
        } else {
            self.checksum & UPPER_HALF
        };
        self.flags = flags | bits as u64;
    }

    /// Clears these flags.
    #[inline(always)]
    pub const fn clear_flags(&mut self, bits: u32) {
        self.flags &= !(bits as u64);
    }

    /// The sum of one product per word; a processor computes the products in parallel. Every factor is odd,
    /// so a change of a single word always changes the sum. If several words come from another entry, the sum
    /// stays the same only if their differences cancel out.
    #[inline(always)]
    const fn checksum_of(sock: u32, endpoint: &Endpoint, opener: &Opener) -> u64 {
        let ([a, b, c, d, e], [f, g, h, i, j, k, l, m, n, o, p]) = (endpoint.words(), opener.words());
        let mut sum = 0x9ae1_6a3b_2f90_404f_u64;
        sum = sum.wrapping_add((sock as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        sum = sum.wrapping_add(a.wrapping_mul(0xbf58_476d_1ce4_e5b9));
        sum = sum.wrapping_add(b.wrapping_mul(0x94d0_49bb_1331_11eb));
        sum = sum.wrapping_add(c.wrapping_mul(0xd6e8_feb8_6659_fd93));
        sum = sum.wrapping_add(d.wrapping_mul(0xe703_7ed1_a0b4_28db));
        sum = sum.wrapping_add(e.wrapping_mul(0x8ebc_6af0_9c88_c6e3));
        sum = sum.wrapping_add(f.wrapping_mul(0x5899_65cc_7537_4cc3));
        sum = sum.wrapping_add(g.wrapping_mul(0x1d8e_4e27_c47d_124f));
        sum = sum.wrapping_add(h.wrapping_mul(0xeb44_acca_b455_d165));
        sum = sum.wrapping_add(i.wrapping_mul(0x9c6e_6877_736c_46e3));
        sum = sum.wrapping_add(j.wrapping_mul(0xa076_1d64_78bd_642f));
        sum = sum.wrapping_add(k.wrapping_mul(0xc2b2_ae3d_27d4_eb4f));
        sum = sum.wrapping_add(l.wrapping_mul(0x9fb2_1c65_1e98_df25));
        sum = sum.wrapping_add(m.wrapping_mul(0xc4ce_b9fe_1a85_ec53));
        sum = sum.wrapping_add(n.wrapping_mul(0xff51_afd7_ed55_8ccd));
        sum = sum.wrapping_add(o.wrapping_mul(0x8648_dbdf_56af_f8c5));
        sum.wrapping_add(p.wrapping_mul(0xb492_b66f_be98_f273))
    }
}

impl Endpoint {
    /// The endpoint as words, because the programs compute with words and copy them faster than bytes.
    #[inline(always)]
    const fn words(&self) -> [u64; 5] {
        transmute!(*self)
    }
}

impl Opener {
    /// The opener as words: see [`Endpoint::words`].
    #[inline(always)]
    const fn words(&self) -> [u64; 11] {
        transmute!(*self)
    }

    /// Copies an opener from memory that another CPU may write to at the same time. Each word is read exactly
    /// once.
    ///
    /// # Safety
    ///
    /// The pointer must be valid for reads, and aligned.
    #[inline(always)]
    #[must_use]
    pub unsafe fn read(from: *const Self) -> Self {
        let word = |at| {
            // SAFETY: the caller guarantees a valid, aligned pointer, and an Opener has eleven words.
            unsafe { from.cast::<u64>().add(at).read_volatile() }
        };
        let words: [u64; 11] = [
            word(0),
            word(1),
            word(2),
            word(3),
            word(4),
            word(5),
            word(6),
            word(7),
            word(8),
            word(9),
            word(10),
        ];
        transmute!(words)
    }
}

/// Mask of the upper half of a word.
const UPPER_HALF: u64 = 0xffff_ffff_0000_0000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    const WORDS: usize = size_of::<ConnectEntry>() / 8;

    fn entry(sock: u32, pid: u32, comm: u8) -> ConnectEntry {
        let endpoint = Endpoint::new(7, [127, 0, 0, 1].into(), 40_000, false);
        let task = Task { pid, tid: pid, comm: [comm; 16], leader: [comm; 16] };
        let opener = Opener { at_ns: u64::from(pid) * 1_000, start_ns: 5, task, cause: 1, ..Opener::UNKNOWN };
        ConnectEntry::new(sock, endpoint, opener, 0)
    }

    fn words(entry: ConnectEntry) -> [u64; WORDS] {
        transmute!(entry)
    }

    fn from_words(words: [u64; WORDS]) -> ConnectEntry {
        transmute!(words)
    }

    #[test]
    fn an_entry_written_by_two_cpus_at_once_is_invalid() {
        let (one, other) = (words(entry(0x8012_3400, 10, b'a')), words(entry(0x8099_8800, 11, b'b')));
        // Every possible mix of the words of both entries. The last word holds the flags, which have no
        // checksum.
        for mix in 0..1_u32 << (WORDS - 1) {
            let mut words = one;
            for (at, word) in words.iter_mut().enumerate() {
                if mix & 1 << at != 0 {
                    *word = other[at];
                }
            }
            let mixed = from_words(words);
            let equals = |whole: [u64; WORDS]| words[..WORDS - 1] == whole[..WORDS - 1];
            assert_eq!(mixed.is_valid_for(0x8012_3400), equals(one), "{mix:b}");
            assert_eq!(mixed.is_valid_for(0x8099_8800), equals(other), "{mix:b}");
        }
    }

    #[test]
    fn an_empty_entry_is_valid_for_no_socket() {
        for sock in [0, 1, 0x8012_3400] {
            assert!(!ConnectEntry::EMPTY.is_valid_for(sock));
        }
    }

    #[test]
    fn a_claimed_entry_is_valid_for_nobody_and_has_no_flag() {
        let mut one = entry(64, 10, b'a');
        one.set_flags(1 << 1);
        one.claim();
        assert!(!one.is_valid_for(64) && !one.has_flag(u32::MAX) && !one.has_flags(1 << 1));
    }

    #[test]
    fn flags_of_a_previous_entry_are_ignored() {
        let mut one = entry(64, 10, b'a');
        assert!(!one.has_flag(u32::MAX));
        one.set_flags(1 << 1);
        one.set_flags(1 << 4);
        assert!(one.has_flag(1 << 1) && one.has_flag(1 << 4) && !one.has_flag(1 << 7));
        assert!(one.has_flags(1 << 1 | 1 << 4) && !one.has_flags(1 << 1 | 1 << 7));
        one.set_flags(1 << 7);
        one.clear_flags(1 << 7);
        assert!(one.has_flag(1 << 1) && one.has_flag(1 << 4) && !one.has_flag(1 << 7));
        assert!(one.is_valid_for(64), "the checksum does not cover the flags");
        // Another CPU sets a flag of the entry that was there before.
        let mut mixed = words(entry(128, 11, b'b'));
        mixed[WORDS - 1] = words(one)[WORDS - 1];
        let mut mixed = from_words(mixed);
        assert!(mixed.is_valid_for(128) && !mixed.has_flag(u32::MAX) && !mixed.has_flags(1 << 1));
        mixed.set_flags(1 << 7);
        assert!(mixed.has_flag(1 << 7) && !mixed.has_flag(1 << 1));
    }

    #[test]
    fn a_quarter_full_table_has_room_for_almost_every_socket() {
        const SETS: u32 = 1_024;
        // Sizes of a slab object around the size of `struct tcp_sock`.
        for size in [2_240, 2_304, 2_432, 2_496, 2_624, 4_096] {
            let mut used = [0_usize; SETS as usize];
            for sock in (0x8000_0000_u32..).step_by(size).take(SETS as usize * WAYS / 4) {
                used[set_index(sock, SETS) as usize] += 1;
            }
            let rejected: usize = used.iter().map(|count| count.saturating_sub(WAYS)).sum();
            assert!(rejected * 50 < SETS as usize, "{rejected} sockets of {size} bytes find no room");
        }
        for sets in [1, 2, 3, 1 << 30] {
            assert!((0..10_000_u32).all(|line| set_index(line << 6, sets) < sets));
        }
    }
}
