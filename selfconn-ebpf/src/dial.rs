//! The table of dials in flight and of self-connections: how it is laid out, and how an entry proves itself.
//!
//! Every dial of a socket to its own address is written down, most of them for the microseconds until its port turns
//! out to be another one. A hash map takes some 150 ns for that, locks and all; this is an array, which programs reach
//! without a call. What a lock would have kept whole, a seal proves whole: an entry that two CPUs wrote at once, or
//! that is of another socket, is nobody's.

use crate::{Opener, Tuple};

/// So many sockets share a [`DialSet`].
pub const WAYS: usize = 4;

/// The entries of the sockets whose address leads here: a value of [`crate::names::DIALS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DialSet {
    /// The kernel address of the socket that each entry is about. 0: the entry is free.
    pub socks: [u64; WAYS],
    /// The entries.
    pub dials: [Dial; WAYS],
}

impl DialSet {
    /// Its size in words.
    pub const WORDS: usize = size_of::<Self>() / 8;

    /// Out of its words, in the order of the memory.
    #[must_use]
    pub const fn of_words(words: [u64; Self::WORDS]) -> Self {
        // SAFETY: integers and byte arrays without padding, of the same size; every bit pattern is a value.
        unsafe { core::mem::transmute(words) }
    }
}

/// A dial in flight or a self-connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dial {
    /// An entry counts only where all of this matches.
    pub tuple: Tuple,
    /// Who dialled.
    pub opener: Opener,
    /// Of what stands above, and of the lower half of the socket's address.
    seal: u64,
    /// The upper half of the seal, and below it what was done with this entry. Where the upper half is another one,
    /// it was another entry that it was done with.
    done: u64,
}

const _: () = {
    assert!(size_of::<Dial>() == 104);
    assert!(size_of::<DialSet>() == 8 * WAYS + 104 * WAYS);
};

/// The index of a socket's set among `sets`, by the lower half of its address, which is all that the verifier lets a
/// program compute with. Socket structures are aligned to a cache line, so the lowest bits tell nothing.
#[inline(always)]
#[must_use]
pub const fn set_of(sock: u32, sets: u32) -> u32 {
    let cache_line = sock >> 6;
    let hash = (cache_line ^ cache_line >> 13).wrapping_mul(0x9e37_79b1);
    let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    ((hash as u64 * sets as u64) >> 32) as u32
}

impl Dial {
    /// Nobody's.
    pub const NONE: Self = Self {
        tuple: Tuple { addr: [0; 4], netns: 0, dport: 0, family: 0 },
        opener: Opener::UNKNOWN,
        seal: 0,
        done: 0,
    };

    /// A new entry, of which `done` is noted already: see [`Self::is_done`].
    #[inline(always)]
    #[must_use]
    pub const fn new(sock: u32, tuple: Tuple, opener: Opener, done: u32) -> Self {
        let seal = Self::seal_of(sock, &tuple, &opener);
        Self { tuple, opener, seal, done: seal & UPPER | done as u64 }
    }

    /// Whether this was written as one, and about this socket.
    #[inline(always)]
    #[must_use]
    pub const fn is_about(&self, sock: u32) -> bool {
        self.is_of(sock, &self.tuple, &self.opener)
    }

    /// Whether what was copied out of it is what was written.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(&self, sock: u32, tuple: &Tuple, opener: &Opener) -> bool {
        self.seal == Self::seal_of(sock, tuple, opener)
    }

    /// Whether one of these bits was noted: the lower ones are states whose coming was reported, the upper ones
    /// witnesses that saw the dial.
    #[inline(always)]
    #[must_use]
    pub const fn is_done(&self, bits: u32) -> bool {
        (self.done ^ self.seal) & UPPER == 0 && self.done as u32 & bits != 0
    }

    /// Notes these bits.
    #[inline(always)]
    pub const fn note(&mut self, bits: u32) {
        let done = if (self.done ^ self.seal) & UPPER == 0 { self.done } else { self.seal & UPPER };
        self.done = done | bits as u64;
    }

    /// A product for each word and their sum, which processors compute side by side. Every factor is odd, so one word
    /// that changed always shows; of several, those of two entries would have to differ by the same sum.
    #[inline(always)]
    const fn seal_of(sock: u32, tuple: &Tuple, opener: &Opener) -> u64 {
        let ([a, b, c], [d, e, f, g, h, i, j, k]) = (tuple.words(), opener.words());
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
        sum.wrapping_add(k.wrapping_mul(0xc2b2_ae3d_27d4_eb4f))
    }
}

impl Tuple {
    /// The same as words, for the programs compute with these, and copy them, faster than bytes.
    #[inline(always)]
    const fn words(&self) -> [u64; 3] {
        // SAFETY: integers without padding, of the same size.
        unsafe { core::mem::transmute(*self) }
    }
}

impl Opener {
    /// As [`Tuple::words`].
    #[inline(always)]
    const fn words(&self) -> [u64; 8] {
        // SAFETY: integers and byte arrays without padding, of the same size.
        unsafe { core::mem::transmute(*self) }
    }

    /// What stands in memory that another CPU may write to, each word read once.
    ///
    /// # Safety
    ///
    /// The pointer must be valid for reads, and aligned.
    #[inline(always)]
    #[must_use]
    pub unsafe fn read(from: *const Self) -> Self {
        let word = |at| {
            // SAFETY: the caller's promise; there are as many words.
            unsafe { from.cast::<u64>().add(at).read_volatile() }
        };
        let words = [word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7)];
        // SAFETY: of the same size, and every bit pattern is a value.
        unsafe { core::mem::transmute(words) }
    }
}

const UPPER: u64 = 0xffff_ffff_0000_0000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    const WORDS: usize = size_of::<Dial>() / 8;

    fn dial(sock: u32, pid: u32, comm: u8) -> Dial {
        let tuple = Tuple { addr: [0, 0, 0xffff_0000, 0x0100_007f], netns: 7, dport: 40_000, family: 2 };
        let task = Task { pid, tid: pid, comm: [comm; 16], leader: [comm; 16] };
        let opener = Opener { at_ns: u64::from(pid) * 1_000, start_ns: 5, task, uid: 0, cause: 1 };
        Dial::new(sock, tuple, opener, 0)
    }

    fn words(dial: Dial) -> [u64; WORDS] {
        // SAFETY: integers and byte arrays without padding, of the same size.
        unsafe { core::mem::transmute(dial) }
    }

    fn of_words(words: [u64; WORDS]) -> Dial {
        // SAFETY: as above; every bit pattern is a value.
        unsafe { core::mem::transmute(words) }
    }

    #[test]
    fn an_entry_that_two_cpus_wrote_at_once_is_nobodys() {
        let (one, other) = (words(dial(0x8012_3400, 10, b'a')), words(dial(0x8099_8800, 11, b'b')));
        // Every way in which the words of both may have ended up; the last one is no part of what is sealed.
        for mix in 0..1_u32 << (WORDS - 1) {
            let mut words = one;
            for (at, word) in words.iter_mut().enumerate() {
                if mix & 1 << at != 0 {
                    *word = other[at];
                }
            }
            let torn = of_words(words);
            let is = |whole: [u64; WORDS]| words[..WORDS - 1] == whole[..WORDS - 1];
            assert_eq!(torn.is_about(0x8012_3400), is(one), "{mix:b}");
            assert_eq!(torn.is_about(0x8099_8800), is(other), "{mix:b}");
        }
    }

    #[test]
    fn a_free_entry_is_nobodys() {
        for sock in [0, 1, 0x8012_3400] {
            assert!(!Dial::NONE.is_about(sock));
        }
    }

    #[test]
    fn what_was_done_with_another_entry_was_not_done_with_this_one() {
        let mut one = dial(64, 10, b'a');
        assert!(!one.is_done(u32::MAX));
        one.note(1 << 1);
        one.note(1 << 4);
        assert!(one.is_done(1 << 1) && one.is_done(1 << 4) && !one.is_done(1 << 7));
        assert!(one.is_about(64), "what was done is not sealed");
        // Another CPU notes something about the entry that was there before.
        let mut mixed = words(dial(128, 11, b'b'));
        mixed[WORDS - 1] = words(one)[WORDS - 1];
        let mut mixed = of_words(mixed);
        assert!(mixed.is_about(128) && !mixed.is_done(u32::MAX));
        mixed.note(1 << 7);
        assert!(mixed.is_done(1 << 7) && !mixed.is_done(1 << 1));
    }

    #[test]
    fn a_quarter_of_what_the_table_holds_finds_room() {
        const SETS: u32 = 1_024;
        // Sizes of a slab's object around that of `struct tcp_sock`.
        for size in [2_240, 2_304, 2_432, 2_496, 2_624, 4_096] {
            let mut full = [0_usize; SETS as usize];
            for sock in (0x8000_0000_u32..).step_by(size).take(SETS as usize * WAYS / 4) {
                full[set_of(sock, SETS) as usize] += 1;
            }
            let crowded: usize = full.iter().map(|count| count.saturating_sub(WAYS)).sum();
            assert!(crowded * 50 < SETS as usize, "{crowded} sockets of {size} bytes find no room");
        }
        for sets in [1, 2, 3, 1 << 30] {
            assert!((0..10_000_u32).all(|line| set_of(line << 6, sets) < sets));
        }
    }
}
