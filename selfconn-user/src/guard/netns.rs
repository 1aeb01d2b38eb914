//! The guard in one network namespace: whether it still is there, and its attachments to devices that are new. A
//! namespace is entered by a thread of its own that ends with the visit.

use std::{io, path::Path, thread, time::Instant};

use crate::{
    bpf::guard::{Attachment, Disarmed, GuardMethod, GuardProgram},
    sockets::{CURRENT_NETNS, Namespace, VisitResult, visit_namespace, visit_namespaces},
    system::rtnetlink,
};

/// The rest after an attachment, as a multiple of the time that it took.
pub(super) const REST_FACTOR: u32 = 19;

/// A guarded namespace.
pub(super) struct GuardedNetns {
    pub(super) owner: u32,
    pub(super) attachments: Vec<Attachment>,
}

/// Why the program does not run in the namespace of the calling thread.
pub(super) fn look(program: &GuardProgram, known: &GuardedNetns) -> io::Result<Option<Disarmed>> {
    for attachment in &known.attachments {
        // A device that has ended takes its link along.
        let still_exists =
            || rtnetlink::loop_devices().is_ok_and(|devices| devices.contains(attachment.device()));
        if let Some(why) = program
            .disarmed(attachment)
            .or_else(|error| if still_exists() { Err(error) } else { Ok(None) })?
            && still_exists()
        {
            return Ok(Some(why));
        }
    }
    Ok(None)
}

/// Attaches the program to VRF devices that were made since the last visit.
pub(super) fn attach_to_new_devices(
    program: &GuardProgram,
    method: GuardMethod,
    known: &mut GuardedNetns,
    rests_until: &mut Instant,
) -> io::Result<()> {
    let devices = rtnetlink::loop_devices()?;
    known.attachments.retain(|attachment| devices.contains(attachment.device()));
    for device in devices {
        let is_attached = known.attachments.iter().any(|attachment| *attachment.device() == device);
        if !is_attached && *rests_until <= Instant::now() {
            let began = Instant::now();
            let attached = program.attach(method, &device);
            *rests_until = Instant::now() + began.elapsed() * REST_FACTOR;
            known.attachments.push(attached?);
        }
    }
    Ok(())
}

/// Calls `each` in every network namespace, or only in that of the calling thread.
pub(super) fn visit_all(
    is_own_only: bool,
    each: impl FnMut(&Namespace) -> io::Result<()>,
) -> io::Result<VisitResult> {
    if is_own_only { visit_namespace(Path::new(CURRENT_NETNS), each) } else { Ok(visit_namespaces(each)) }
}

/// Calls `work` on a thread that ends with it, and with it its stay in a network namespace.
///
/// # Errors
/// If the thread can't be started.
pub(super) fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let started = thread::Builder::new().name("guard-netns".to_owned()).spawn_scoped(scope, work)?;
        Ok(started.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause)))
    })
}
