//! All reading of kernel memory: how a program reads it, and where the fields are. User space reads the offsets
//! of fields from the running kernel's BTF before the load.

use core::{arch::asm, mem::MaybeUninit, ptr};

use aya_ebpf::helpers::generated as helpers;
use selfconn_ebpf::{ABSENT, FIELDS, Field, STATIC_OFFSETS};

/// Offsets of [`Field`]s. They are in frozen `.rodata`, so the verifier knows each one as a constant and
/// removes the code for absent fields.
#[unsafe(no_mangle)]
static OFFSETS: [u32; FIELDS] = [ABSENT; FIELDS];

#[inline(always)]
pub(crate) fn offset(field: Field) -> Option<usize> {
    // The read is volatile, because user space changes the value before the load.
    // SAFETY: the index of a Field is below FIELDS.
    let offset = unsafe { ptr::read_volatile((&raw const OFFSETS).cast::<u32>().add(field as usize)) };
    (offset != ABSENT).then_some(offset as usize)
}

/// Source of the offsets of [`STATIC_OFFSETS`]. The programs read only these fields at every transition, and only
/// these decide about an ordinary connection of an address to itself.
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

/// The offset of a field in [`STATIC_OFFSETS`].
pub(crate) const fn static_offset(field: Field) -> usize {
    let mut index = 0;
    while STATIC_OFFSETS[index].0 as usize != field as usize {
        index += 1;
    }
    STATIC_OFFSETS[index].1 as usize
}

/// A way for a program to read kernel memory.
pub(crate) trait KernelRead: Copy {
    /// True if a read through a null pointer is a page fault of the running process. Such a read must not be made.
    /// Where the kernel does not count preemption, the handler of the fault can wait for the process's `mmap_lock`, for
    /// ever if the process likes, and meanwhile the CPU takes every call of the program for a recursion. A fault of a
    /// program that is being released crashes the kernel (`do_page_fault`, arch/arm64/mm/fault.c, and
    /// `search_bpf_extables`, kernel/bpf/core.c, at v6.1). On x86-64 the JIT-compiled program reads no user addresses
    /// (`do_jit`, arch/x86/net/bpf_jit_comp.c at v6.1); on 5.10 it takes the fault.
    const NULL_FAULTS: bool;

    /// Reads a value at an address that the kernel provided. Returns zero if the address cannot be read.
    fn read<T: Copy + Default>(address: *const u8) -> T;

    /// The same socket as a pointer through which fields beyond `struct sock` can be read. `None`: not a full
    /// TCP socket.
    fn full_sock(sk: *const u8) -> Option<*const u8>;

    /// The lower half of an address, as a number that allows arithmetic.
    fn low_half(address: *const u8) -> u32;

    /// The cookie of a socket; makes one if the socket has none and this is possible. Called only where
    /// `bpf_get_socket_cookie` is available.
    fn make_cookie(sk: *const u8) -> u64;
}

/// Direct loads, which the verifier allows on the typed pointers of tp_btf and fentry programs.
#[derive(Clone, Copy)]
pub(crate) struct DirectLoad;

/// `bpf_probe_read_kernel`, for programs whose pointers are plain numbers to the verifier. The kernel refuses
/// it under lockdown=confidentiality.
#[derive(Clone, Copy)]
pub(crate) struct ProbeRead;

impl KernelRead for DirectLoad {
    const NULL_FAULTS: bool = true;

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

    #[inline(always)]
    fn make_cookie(sk: *const u8) -> u64 {
        // SAFETY: the verifier accepts only a typed pointer to a socket (`bpf_get_socket_ptr_cookie`,
        // net/core/filter.c at v5.12).
        unsafe { helpers::bpf_get_socket_cookie(sk.cast_mut().cast()) }
    }
}

impl KernelRead for ProbeRead {
    const NULL_FAULTS: bool = false;

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

    #[inline(always)]
    fn make_cookie(sk: *const u8) -> u64 {
        offset(Field::Cookie).map_or(0, |cookie| Self::read(sk.wrapping_add(cookie)))
    }
}

/// A pointer as a value that can be read from kernel memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Pointer(pub(crate) *const u8);

impl Default for Pointer {
    fn default() -> Self {
        Self(ptr::null())
    }
}
