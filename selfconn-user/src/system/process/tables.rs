//! Descriptor tables of tasks.

/// True if two tasks share one table (kcmp(2)). False also if the kernel does not say, without `CONFIG_KCMP`, or if this
/// process may not trace both.
pub(crate) fn have_same_descriptors(one: u32, other: u32) -> bool {
    /// `enum kcmp_type`, include/uapi/linux/kcmp.h at v5.10.
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: the call takes numbers only.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) == 0 }
}
