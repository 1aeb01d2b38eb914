//! An attached BPF iterator: a program that the kernel runs for each element of a kind while user space reads a
//! file. It is attached once and read as often as asked. Attaching needs the capabilities to load programs; a pass
//! needs none.

use std::{
    fs::File,
    io::{self, Read},
    marker::PhantomData,
    ops::ControlFlow,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};
use zerocopy::{FromBytes, Immutable};

use super::{
    link::{self, IterTasks},
    programs::KernelBtf,
    refusal::{Refusal, refusal, refusal_by_errno},
};
use crate::system::interrupt;

/// The size of a read(2) at most. The kernel's own buffer for a pass has 32 KiB.
const READ_BYTES: usize = 1 << 14;

/// An attached iterator whose program writes records of this type. Dropping it detaches the program.
#[derive(Debug)]
pub(super) struct BpfIter<R> {
    program: OwnedFd,
    link: OwnedFd,
    records: PhantomData<R>,
}

impl<R: FromBytes + Immutable> BpfIter<R> {
    /// Loads the program `name`, and attaches it to the iterator over `target`.
    pub(super) fn attach(
        ebpf: &mut Ebpf,
        name: &str,
        target: &str,
        kernel_btf: &KernelBtf<'_>,
    ) -> Result<Self, Refusal> {
        let Some(Program::Iter(program)) = ebpf.program_mut(name) else {
            let why = format!("the eBPF object has no program {name} of that type");
            return Err(Refusal::Broken(why));
        };
        let error = |error: ProgramError| refusal(&error);
        program.load(target, kernel_btf.get()?).map_err(error)?;
        let program = program.fd().map_err(error)?.as_fd();
        let refused = |error| refusal_by_errno("BPF_LINK_CREATE", &error);
        let link = link::create_iter_link(program).map_err(refused)?;
        let program = program.try_clone_to_owned().map_err(refused)?;
        Ok(Self { program, link, records: PhantomData })
    }

    /// Begins a pass, and calls `each` for every record until it breaks. Memory does not depend on the number of
    /// records.
    ///
    /// # Errors
    /// If the kernel refuses to start the pass or to go on. `TimedOut`: it took longer than `limit`.
    pub(super) fn pass(&self, limit: Duration, each: impl FnMut(&R) -> ControlFlow<()>) -> io::Result<()> {
        let until = Instant::now() + limit;
        read_records(File::from(link::create_iter(self.link.as_fd())?), until, each)
    }

    /// As [`Self::pass`], but visits these tasks only, and gives up at `until`.
    ///
    /// # Errors
    /// As [`Self::pass`], and before Linux 6.1.
    pub(super) fn pass_of(
        &self,
        tasks: IterTasks,
        until: Instant,
        each: impl FnMut(&R) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let link = link::create_iter_link_of(self.program.as_fd(), tasks)?;
        read_records(File::from(link::create_iter(link.as_fd())?), until, each)
    }
}

fn read_records<R: FromBytes + Immutable>(
    mut from: impl Read,
    until: Instant,
    mut each: impl FnMut(&R) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut buffer = [0; READ_BYTES];
    let mut filled = 0;
    loop {
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The kernel may close a file here that a process has closed meanwhile.
        match interrupt::bounded(|| from.read(&mut buffer[filled..])) {
            Ok(0) if filled == 0 => return Ok(()),
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "half a record")),
            Ok(read) => filled += read,
            // After a million elements without a record the kernel returns EAGAIN, so that the reader can be
            // interrupted. The next read goes on (`bpf_seq_read`, kernel/bpf/bpf_iter.c at v5.11).
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                continue;
            }
            Err(error) => return Err(error),
        }
        let records = buffer[..filled].chunks_exact(size_of::<R>());
        let rest = filled - records.remainder().len()..filled;
        for record in records {
            // Every sequence of this many bytes is a record of integers.
            if let Ok(record) = R::read_from_bytes(record)
                && each(&record).is_break()
            {
                return Ok(());
            }
        }
        filled = rest.len();
        buffer.copy_within(rest, 0);
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::SocketDescriptor;
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
        let later = Instant::now() + Duration::from_secs(1_000);
        let record = |fd| SocketDescriptor { fd, ..SocketDescriptor::new_zeroed() };
        let bytes: Vec<u8> = (0..300).flat_map(|fd| record(fd).as_bytes().to_vec()).collect();
        for portion in [1, 7, 104, 105, 4_096, usize::MAX] {
            let mut seen = Vec::new();
            let all = Portions(bytes.clone(), portion, 0);
            read_records(all, later, |record: &SocketDescriptor| {
                seen.push(record.fd);
                ControlFlow::Continue(())
            })
            .unwrap();
            assert_eq!(seen, (0..300).collect::<Vec<_>>(), "{portion}");
            let cut = Portions(bytes[..bytes.len() - 1].to_vec(), portion, 0);
            let go_on = |_: &SocketDescriptor| ControlFlow::Continue(());
            assert!(read_records(cut, later, go_on).is_err(), "{portion}");
            let mut count = 0;
            let cut = Portions(bytes[..bytes.len() - 1].to_vec(), portion, 0);
            let stop_at_two = |_: &SocketDescriptor| {
                count += 1;
                if count == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            assert!(
                read_records(cut, later, stop_at_two).is_ok() && count == 2,
                "the end is not looked at: {portion}"
            );
        }
    }

    #[test]
    fn a_pass_that_takes_too_long_is_given_up_also_if_no_record_comes() {
        /// What the kernel returns after each million of elements without a record.
        struct Endless;

        impl Read for Endless {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::WouldBlock.into())
            }
        }

        let until = Instant::now() + Duration::from_millis(20);
        let error = read_records(Endless, until, |_: &SocketDescriptor| ControlFlow::Continue(()));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
