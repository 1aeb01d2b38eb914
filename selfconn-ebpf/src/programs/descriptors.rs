//! The iterator over the descriptors of all tasks: writes a record for each one that is a self-connection or
//! an attempt to become one, and for each namespace. The kernel runs it while user space reads the iterator's
//! file, for each descriptor of each task; threads that share the table of their leader are skipped
//! (`task_seq_get_next`, kernel/bpf/task_iter.c at v5.11). It enters no namespace. The kernel holds the file of
//! the descriptor meanwhile, so a close in that moment is delayed, and happens in the task that reads.

use core::ptr;

use aya_ebpf::{cty::c_void, helpers::generated as helpers};
use selfconn_ebpf::{Field, IPPROTO_TCP, NSFS_MAGIC, SocketDescriptor, descriptor_kind};
use zerocopy::{FromZeros as _, transmute};

use super::{
    kernel_read::{BtfOffsets, DirectLoad, KernelRead, Pointer, offset},
    sock::{Ports, Sock},
    task::{Name, leader},
};

/// The context of an iterator over descriptors: `struct bpf_iter__task_file`, kernel/bpf/task_iter.c.
#[repr(C)]
pub(crate) struct DescriptorContext {
    meta: *const *mut c_void,
    task: *const u8,
    fd: u64,
    file: *mut c_void,
}

/// Visits one descriptor. A context without a task or a file marks the end of the pass.
#[inline(always)]
pub(crate) fn visit(context: &DescriptorContext) -> Option<()> {
    let (task, file) = (context.task, context.file);
    if task.is_null() || file.is_null() {
        return None;
    }
    // SAFETY: the kernel holds a reference to this file while the program runs.
    let socket = unsafe { helpers::bpf_sock_from_file(file.cast()) } as *const u8;
    if socket.is_null() {
        return visit_namespace(context);
    }
    let sk = at::<Pointer>(socket, Field::SocketSk)?.0;
    if sk.is_null() {
        return None;
    }
    let sock = Sock::<DirectLoad>::new(sk);
    let self_addr = sock.self_addr::<BtfOffsets>()?;
    let (state, Ports { held: port, destination: destination_port }) =
        (sock.state::<BtfOffsets>(), sock.ports::<BtfOffsets>());
    if sock.protocol() != IPPROTO_TCP || !SocketDescriptor::is_listed(state, port, destination_port) {
        return None;
    }
    let (comm, start_ns): (Name, u64) = leader::<DirectLoad>(task, false);
    let record = SocketDescriptor {
        pid: at(task, Field::TaskTgid)?,
        tid: at(task, Field::TaskPid)?,
        fd: context.fd as u32,
        uid: sock.get(Field::SockUid),
        start_ns,
        comm: transmute!(comm),
        sock: sock.key(),
        cookie: sock.cookie(),
        inode: at(at::<Pointer>(file.cast_const().cast(), Field::FileInode)?.0, Field::InodeNumber)?,
        endpoint: self_addr.endpoint(sock, port),
        destination_port,
        state,
        options: sock.bind_options(),
        kind: descriptor_kind::SOCKET,
    };
    write(context, &record);
    Some(())
}

/// Writes a record if the file is a namespace.
#[inline(always)]
fn visit_namespace(context: &DescriptorContext) -> Option<()> {
    let inode = at::<Pointer>(context.file.cast_const().cast(), Field::FileInode)?.0;
    let super_block = at::<Pointer>(inode, Field::InodeSuperBlock)?.0;
    if at::<u64>(super_block, Field::FilesystemMagic)? != NSFS_MAGIC {
        return None;
    }
    let record = SocketDescriptor {
        pid: at(context.task, Field::TaskTgid)?,
        tid: at(context.task, Field::TaskPid)?,
        fd: context.fd as u32,
        inode: at(inode, Field::InodeNumber)?,
        kind: descriptor_kind::NAMESPACE,
        ..SocketDescriptor::new_zeroed()
    };
    write(context, &record);
    Some(())
}

#[inline(always)]
fn write(context: &DescriptorContext, record: &SocketDescriptor) {
    // SAFETY: the kernel gives an iterator its `struct bpf_iter_meta`, whose first member is the seq_file. If
    // the record does not fit, the kernel calls the program again for this descriptor with an empty buffer
    // (`bpf_seq_read`, kernel/bpf/bpf_iter.c at v5.11).
    unsafe {
        helpers::bpf_seq_write(
            (*context.meta).cast(),
            ptr::from_ref(record).cast(),
            size_of::<SocketDescriptor>() as u32,
        );
    }
}

#[inline(always)]
fn at<T: Copy + Default>(base: *const u8, field: Field) -> Option<T> {
    Some(DirectLoad::read(base.wrapping_add(offset(field)?)))
}
