//! Returns memory to the kernel that was needed only at startup or during a burst.

/// Allocations of at least this size are returned to the kernel as soon as they are freed.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD_BYTES: i32 = 1 << 20;

/// Keeps large allocations out of glibc's heap, because an allocation in use prevents the heap below it from
/// being returned. By default glibc raises the threshold when a large allocation is freed, and places
/// allocations of that size on the heap from then on. Must be called before the first large allocation.
pub fn set_mmap_threshold() {
    #[cfg(target_env = "gnu")]
    // SAFETY: this sets a parameter of the allocator, which takes its own locks.
    let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) };
    #[cfg(target_env = "gnu")]
    debug_assert_eq!(is_set, 1);
}

/// Returns free memory of the heap to the kernel. glibc does not do this by itself for the small allocations
/// of the startup.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: every argument is valid; the allocator takes its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
