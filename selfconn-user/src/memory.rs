//! Gives memory back that only the start took, or a burst.

/// Returns what is free to the kernel. Once a large piece was freed, glibc keeps pieces as large in its heap, and the
/// start frees some of the size of the kernel's BTF; without this they would stay for the life of the daemon.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that could be wrong; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
