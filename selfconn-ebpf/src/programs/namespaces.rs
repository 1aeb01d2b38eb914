//! The iterator that lists the network namespaces that exist: a walk over the kernel's own list of them
//! (`net_namespace_list`, net/core/net_namespace.c at v5.10), which every `struct net` is linked in from before a
//! task can enter it until after its last reference is gone.
//!
//! The list is read under RCU: `list_del_rcu` leaves the way onward, and `cleanup_net` waits for readers before it
//! frees (the same file). The program runs in an RCU section (`bpf_iter_run_prog`, kernel/bpf/bpf_iter.c at v5.10).
//! Each call walks a part, because the verifier wants a bound. The tasks over which the kernel iterates only give
//! the walk its turns; where they are too few, the next pass goes on. New namespaces are appended at the end, so a
//! walk never sees less than existed when it began.

use core::ptr;

use aya_ebpf::{cty::c_void, helpers::generated as helpers, macros::map, maps::Array};
use selfconn_ebpf::{
    Field, NamespaceCursor, NamespaceRecord, namespace::ELEMENTS_PER_CALL, namespace::element,
};

use super::{
    kernel_read::{KernelRead, Pointer, ProbeRead, offset},
    sock::netns_id,
};

/// One entry. Only one pass may be in progress.
#[map]
static NETNS_CURSOR: Array<NamespaceCursor> = Array::with_max_entries(1, 0);

/// The context of an iterator over tasks: `struct bpf_iter__task`, kernel/bpf/task_iter.c.
#[repr(C)]
pub(crate) struct TaskContext {
    meta: *const Meta,
    task: *const u8,
}

/// `struct bpf_iter_meta`, include/linux/bpf.h at v5.10.
#[repr(C)]
struct Meta {
    seq: *mut c_void,
    session_id: u64,
    /// Number of tasks before this one.
    seq_num: u64,
}

/// Walks a part of the list.
#[inline(always)]
pub(crate) fn visit(context: &TaskContext) -> Option<()> {
    let (list, ops) = (offset(Field::NetList)?, offset(Field::NetOps)?);
    let cursor = NETNS_CURSOR.get_ptr_mut(0)?;
    // SAFETY: the kernel gives an iterator its `struct bpf_iter_meta`.
    let (seq, seq_num) = unsafe { ((*context.meta).seq, (*context.meta).seq_num) };
    // The reader is in its namespace, so this one stays in the list.
    let own = current_netns()?;
    let (first, own_ops) = (own.wrapping_add(list), read::<u64>(own, ops));
    // SAFETY: an entry of an array stays valid as long as the program is loaded.
    let NamespaceCursor { at, cookie } = unsafe { ptr::read_volatile(cursor) };
    let mut at = at as *const u8;
    let store = |at: *const u8, cookie| {
        let stored = NamespaceCursor { at: at as u64, cookie };
        // SAFETY: as above.
        unsafe { ptr::write_volatile(cursor, stored) };
    };
    if at.is_null() {
        if seq_num > 0 {
            return None;
        }
        at = first;
    } else if !is_linked(at) || netns_id::<ProbeRead>(at.wrapping_sub(list)).1 != cookie {
        write(seq, &NamespaceRecord { cookie: 0, inode: 0, element: element::LOST })?;
        store(ptr::null(), 0);
        return None;
    }
    for _ in 0..ELEMENTS_PER_CALL {
        at = read::<Pointer>(at, 0).0;
        let net = at.wrapping_sub(list);
        let (inode, cookie) = netns_id::<ProbeRead>(net);
        // What lies around the head in place of a namespace is not the address of `netns_operations`.
        let has_ended = offset(Field::NetRefs).is_some_and(|refs| read::<u32>(net, refs) == 0);
        let kind = if has_ended { element::ENDED } else { element::NAMESPACE };
        let kind = if read::<u64>(net, ops) == own_ops { kind } else { element::HEAD };
        let element = if at == first { element::LAST } else { kind };
        // If there is no room, the kernel calls the program again for this task, and the part is walked again.
        write(seq, &NamespaceRecord { cookie, inode, element })?;
        if at == first {
            store(ptr::null(), 0);
            return None;
        }
    }
    store(at, netns_id::<ProbeRead>(at.wrapping_sub(list)).1);
    Some(())
}

/// The network namespace of the reader.
#[inline(always)]
fn current_netns() -> Option<*const u8> {
    // SAFETY: the helper takes no arguments, and its result is only passed to bpf_probe_read_kernel.
    let task = unsafe { helpers::bpf_get_current_task() } as *const u8;
    let nsproxy: Pointer = read(task, offset(Field::TaskNsproxy)?);
    let net: Pointer = read(nsproxy.0, offset(Field::NsproxyNet)?);
    (!net.0.is_null()).then_some(net.0)
}

/// True if an element where an earlier call stopped is in the list now: its predecessor leads to it.
/// `list_del_rcu` poisons the way back.
#[inline(always)]
fn is_linked(at: *const u8) -> bool {
    const PREV: usize = size_of::<usize>();
    read::<Pointer>(read::<Pointer>(at, PREV).0, 0).0 == at
}

#[inline(always)]
fn read<T: Copy + Default>(base: *const u8, offset: usize) -> T {
    ProbeRead::read(base.wrapping_add(offset))
}

/// `None`: there is no room.
#[inline(always)]
fn write(seq: *mut c_void, record: &NamespaceRecord) -> Option<()> {
    // SAFETY: `seq` is the seq_file of this pass, and the record is initialized memory of this size.
    let written = unsafe {
        helpers::bpf_seq_write(
            seq.cast(),
            ptr::from_ref(record).cast_mut().cast(),
            size_of::<NamespaceRecord>() as u32,
        )
    };
    (written == 0).then_some(())
}
