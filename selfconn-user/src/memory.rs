//! Gives memory back that only the start took, or a burst.

/// From so many bytes on a piece is the kernel's again as soon as it is freed.
#[cfg(target_env = "gnu")]
const LARGE: i32 = 1 << 20;

/// Keeps large pieces out of glibc's heap, where one that is in use keeps all below it: once one was freed, pieces as
/// large would be put there. To be called before anything large is.
pub fn keep_large_apart() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator, which takes its own locks.
    let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
    #[cfg(target_env = "gnu")]
    debug_assert_eq!(is_set, 1);
}

/// Returns what is free to the kernel, which for the smaller pieces of the start nobody else does.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that could be wrong; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
