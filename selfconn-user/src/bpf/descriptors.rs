//! The iterator over the descriptors of all tasks: loads and attaches it once, and reads it as often as asked.
//! A pass yields each held self-connection of every network namespace with its process. It enters no namespace
//! and touches no process, so it needs no capability; only loading the program does.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};
use selfconn_ebpf::{SocketDescriptor, names};
use zerocopy::FromBytes as _;

use super::{
    attach::Refusal,
    features::KernelFeatures,
    object::{self, ObjectOptions},
    programs::{KernelBtf, refusal, refusal_by_errno},
};

/// The name of the iterator, as events and `doctor` show it.
pub const NAME: &str = "task_file";

/// The records that one read(2) takes at most. The kernel's own buffer for a pass has 32 KiB.
const RECORDS_PER_READ: usize = 128;

/// The attached iterator. Dropping it detaches the program.
#[derive(Debug)]
pub struct DescriptorIter {
    link: OwnedFd,
}

impl DescriptorIter {
    /// Walks the descriptors of all tasks once, and calls `each` for every record. A descriptor that a task
    /// gets while the walk is past it is not seen; a process whose first thread has ended is seen once for
    /// each of its other threads. Memory does not depend on the number of records.
    ///
    /// # Errors
    /// If the kernel refuses to start the walk or to go on.
    pub fn pass(&self, each: impl FnMut(&SocketDescriptor)) -> io::Result<()> {
        read_records(File::from(create_iter(self.link.as_fd())?), each)
    }
}

/// Loads and attaches the iterator.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    features: &KernelFeatures,
    kernel_btf: &KernelBtf<'_>,
) -> Result<DescriptorIter, Refusal> {
    features.check_descriptors()?;
    let Some(Program::Iter(program)) = ebpf.program_mut(names::DESCRIPTORS) else {
        let why = format!("the eBPF object has no program {} of that type", names::DESCRIPTORS);
        return Err(Refusal::Broken(why));
    };
    let error = |error: ProgramError| refusal(&error);
    program.load(NAME, kernel_btf.get()?).map_err(error)?;
    let link = create_link(program.fd().map_err(error)?.as_fd());
    Ok(DescriptorIter { link: link.map_err(|error| refusal_by_errno("BPF_LINK_CREATE", &error))? })
}

/// Attaches the iterator, and nothing else.
///
/// # Errors
/// The reason why this kernel does not have it.
pub fn open(features: &KernelFeatures) -> Result<DescriptorIter, Refusal> {
    features.check_descriptors()?;
    let mut ebpf = object::load(features, ObjectOptions::MINIMAL)
        .map_err(|error| Refusal::Refused(format!("{error:#}")))?;
    attach(&mut ebpf, features, &KernelBtf::new(features))
}

/// Attaches the iterator for a moment, and makes a pass, to find out whether this kernel supports it.
///
/// # Errors
/// As [`open`].
pub fn probe(features: &KernelFeatures) -> Result<(), Refusal> {
    open(features)?.pass(|_| {}).map_err(|error| refusal_by_errno("BPF_ITER_CREATE", &error))
}

fn read_records(mut from: impl Read, mut each: impl FnMut(&SocketDescriptor)) -> io::Result<()> {
    const LEN: usize = size_of::<SocketDescriptor>();
    let mut buffer = [0; RECORDS_PER_READ * LEN];
    let mut filled = 0;
    loop {
        match from.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(()),
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "half a record")),
            Ok(read) => filled += read,
            // After a million descriptors without a record the kernel returns EAGAIN, so that the reader can
            // be interrupted. The next read goes on (`bpf_seq_read`, kernel/bpf/bpf_iter.c at v5.11).
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                continue;
            }
            Err(error) => return Err(error),
        }
        let (records, rest) = buffer[..filled].as_chunks::<LEN>();
        for record in records {
            // Every sequence of this many bytes is a record of integers.
            if let Ok(record) = SocketDescriptor::read_from_bytes(record) {
                each(&record);
            }
        }
        let rest = filled - rest.len()..filled;
        filled = rest.len();
        buffer.copy_within(rest, 0);
    }
}

/// BPF_LINK_CREATE: attaches an iterator program. aya creates links of iterators too, but a link of aya can be
/// opened only once.
fn create_link(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    const BPF_TRACE_ITER: u32 = 28;
    bpf(BPF_LINK_CREATE, program, BPF_TRACE_ITER)
}

/// BPF_ITER_CREATE: begins a pass.
fn create_iter(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_ITER_CREATE: libc::c_int = 33;
    bpf(BPF_ITER_CREATE, link, 0)
}

/// bpf(2) for a command whose attributes begin with a descriptor, and which returns one: `union bpf_attr`,
/// include/uapi/linux/bpf.h at v5.11.
fn bpf(command: libc::c_int, fd: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attributes = [0_u32; 8];
    attributes[0] = fd.as_raw_fd().cast_unsigned();
    attributes[2] = attach_type;
    // SAFETY: the kernel reads this many bytes of `attributes`, which hold no address, and writes none of them
    // for these commands.
    let created =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes)) };
    match libc::c_int::try_from(created) {
        // SAFETY: the kernel has just returned this descriptor, so nothing else owns it.
        Ok(created) if created >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(created) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::{FromZeros as _, IntoBytes as _};

    use super::*;

    /// Returns its bytes in portions, and first as many errors of each kind that the kernel may return.
    struct Portions(Vec<u8>, usize, u32);

    impl Read for Portions {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            self.2 += 1;
            match self.2 % 3 {
                0 => return Err(io::ErrorKind::WouldBlock.into()),
                1 => return Err(io::ErrorKind::Interrupted.into()),
                _ => {}
            }
            let len = self.1.min(to.len()).min(self.0.len());
            to[..len].copy_from_slice(&self.0[..len]);
            self.0.drain(..len);
            Ok(len)
        }
    }

    #[test]
    fn records_are_whole_in_whatever_portions_they_arrive() {
        let record = |fd| SocketDescriptor { fd, ..SocketDescriptor::new_zeroed() };
        let bytes: Vec<u8> = (0..300).flat_map(|fd| record(fd).as_bytes().to_vec()).collect();
        for portion in [1, 7, 104, 105, 4_096, usize::MAX] {
            let mut seen = Vec::new();
            read_records(Portions(bytes.clone(), portion, 0), |record| seen.push(record.fd)).unwrap();
            assert_eq!(seen, (0..300).collect::<Vec<_>>(), "{portion}");
            let cut = Portions(bytes[..bytes.len() - 1].to_vec(), portion, 0);
            assert!(read_records(cut, |_| {}).is_err(), "{portion}");
        }
    }
}
