//! Many entries of a map by one call of bpf(2), which aya does not make.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// Replaces the first entries of an array map whose values are words.
pub(super) fn update_array(map: BorrowedFd<'_>, values: &[u32]) -> io::Result<()> {
    /// `enum bpf_cmd`, include/uapi/linux/bpf.h at v5.8.
    const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
    /// The member `batch` of `union bpf_attr` there.
    #[repr(C)]
    struct Batch {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        entry_flags: u64,
        flags: u64,
    }
    let count = u32::try_from(values.len()).map_err(io::Error::other)?;
    let keys: Vec<u32> = (0..count).collect();
    let mut batch = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr().expose_provenance() as u64,
        values: values.as_ptr().expose_provenance() as u64,
        count,
        map: map.as_raw_fd().cast_unsigned(),
        entry_flags: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `count` keys and values, which are as long as the map has them or the call fails, and
    // writes how many it has done to `count`.
    let outcome =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_BATCH, &raw mut batch, size_of_val(&batch)) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
