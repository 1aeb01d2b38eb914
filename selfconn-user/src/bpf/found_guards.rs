//! The guards that are in a network namespace, as anybody with the privilege can list them: this run's and others'.

use std::io;

use aya::programs::{ProgramError, SchedClassifier, TcAttachType};

use super::guard::{FilterOwner, refuses};
use crate::system::rtnetlink;

/// A guard that some daemon has attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundGuard {
    pub device: String,
    /// False: it only reports.
    pub refuses: bool,
    /// `None`: a link, which ends with its daemon.
    pub filter: Option<FoundFilter>,
}

/// The filter of a guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundFilter {
    /// The daemon, in its pid namespace.
    pub pid: u32,
    pub priority: u16,
    /// True if the daemon is known to have ended.
    pub is_left_over: bool,
}

/// Lists the guards in the network namespace of the calling thread.
///
/// # Errors
/// If the kernel refuses to list devices, links or filters. Links can be listed with `CAP_SYS_ADMIN`
/// (`BPF_PROG_GET_FD_BY_ID`, kernel/bpf/syscall.c at v6.6).
pub fn find() -> io::Result<Vec<FoundGuard>> {
    let mut found = Vec::new();
    for device in rtnetlink::loop_devices()? {
        match SchedClassifier::query_tcx(&device.name, TcAttachType::Egress) {
            Ok((_, programs)) => {
                let guards = programs.iter().filter_map(refuses);
                let on_device =
                    guards.map(|refuses| FoundGuard { device: device.name.clone(), refuses, filter: None });
                found.extend(on_device);
            }
            Err(ProgramError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::PermissionDenied =>
            {
                return Err(error.io_error);
            }
            // The kernel does not have such links (before v6.6).
            Err(_) => {}
        }
        for filter in rtnetlink::filters(device.index)? {
            let Some(owner) = FilterOwner::parse(&filter.name) else { continue };
            let priority = filter.priority();
            let filter = FoundFilter { pid: owner.pid, priority, is_left_over: owner.is_gone() };
            found.push(FoundGuard {
                device: device.name.clone(),
                refuses: owner.refuses,
                filter: Some(filter),
            });
        }
    }
    Ok(found)
}
