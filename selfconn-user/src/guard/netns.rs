//! The guard in one network namespace: to which devices it is attached, whether it still is there, and the next one to
//! attach it to. A namespace is entered by a thread of its own that ends with the visit.

use std::{io, path::Path, thread};

use crate::{
    bpf::guard::{Attachment, Disarmed, GuardMethod, GuardProgram},
    sockets::{CURRENT_NETNS, Namespace, VisitResult, visit_namespace, visit_namespaces},
    system::rtnetlink::{self, LoopDevice},
};

/// Maximum number of devices to which the program is attached in one namespace.
const MAX_DEVICES: usize = 256;

/// A namespace in which the program was attached.
pub(super) struct GuardedNetns {
    pub(super) owner: u32,
    pub(super) attachments: Vec<Attachment>,
    /// Devices to which it could not be attached since the last walk.
    pub(super) failed: Vec<LoopDevice>,
    /// False: there may be another device.
    pub(super) is_complete: bool,
}

/// What the walk has seen in such a namespace.
pub(super) struct Seen {
    pub(super) disarmed: Option<Disarmed>,
    /// The number of attachments whose devices have ended. They are removed.
    pub(super) ended: usize,
    /// How many more devices there are.
    pub(super) others: usize,
}

impl GuardedNetns {
    pub(super) fn new(owner: u32) -> Self {
        Self { owner, attachments: Vec::new(), failed: Vec::new(), is_complete: false }
    }

    /// Why the program does not run on one of these devices where it was attached. Call it in the namespace.
    fn disarmed(&self, program: &GuardProgram, devices: &[LoopDevice]) -> io::Result<Option<Disarmed>> {
        for attachment in self.attachments.iter().filter(|attachment| devices.contains(attachment.device())) {
            let seen = program.disarmed(attachment);
            // A device that has ended since the devices were listed took its link along.
            if !matches!(seen, Ok(None)) && rtnetlink::loop_devices()?.contains(attachment.device()) {
                return seen;
            }
        }
        Ok(None)
    }

    /// Looks at the namespace of the calling thread.
    pub(super) fn look(&mut self, program: &GuardProgram) -> io::Result<Seen> {
        let devices = rtnetlink::loop_devices()?;
        let disarmed = self.disarmed(program, &devices)?;
        let before = self.attachments.len();
        self.attachments.retain(|attachment| devices.contains(attachment.device()));
        let ended = before - self.attachments.len();
        self.failed.clear();
        Ok(Seen { disarmed, ended, others: devices.len().saturating_sub(self.attachments.len()) })
    }

    /// True if the program is attached in the namespace of the calling thread, so it is this one and not another with
    /// the same inode.
    pub(super) fn is_there(&self, program: &GuardProgram) -> io::Result<bool> {
        Ok(self.disarmed(program, &rtnetlink::loop_devices()?)? != Some(Disarmed::TakenOff))
    }

    /// True if no other attachment finds room here.
    pub(super) fn is_full(&self) -> bool {
        self.attachments.len() >= MAX_DEVICES
    }

    fn is_done_with(&self, device: &LoopDevice) -> bool {
        self.attachments.iter().any(|attachment| attachment.device() == device)
            || self.failed.contains(device)
    }
}

/// What a turn of a namespace has done.
pub(super) struct Turn {
    pub(super) outcome: Attempt,
    /// True if there is another device.
    pub(super) has_more: bool,
    /// True if it was not in the namespace that is known, which had the same inode and has ended.
    pub(super) is_another: bool,
}

pub(super) enum Attempt {
    Attached(Attachment),
    Failed(LoopDevice, io::Error),
    /// There is no other device, or it has ended.
    Nothing,
}

/// Attaches the program to the first device of the calling thread's namespace where it is not. `known`: where it is.
pub(super) fn attach_to_next(
    program: &GuardProgram,
    method: GuardMethod,
    mut known: Option<&GuardedNetns>,
    has_cookie: bool,
) -> io::Result<Turn> {
    let devices = rtnetlink::loop_devices()?;
    let mut is_another = false;
    // Without a cookie this may be another namespace that has the same inode.
    if let Some(old) = known.filter(|_| !has_cookie)
        && !old.is_there(program)?
    {
        (known, is_another) = (None, true);
    }
    let mut others = devices.iter().filter(|device| known.is_none_or(|known| !known.is_done_with(device)));
    let Some(next) = others.next() else {
        return Ok(Turn { outcome: Attempt::Nothing, has_more: false, is_another });
    };
    let outcome = match program.attach(method, next) {
        Ok(attachment) => Attempt::Attached(attachment),
        Err(error) if rtnetlink::loop_devices()?.contains(next) => Attempt::Failed(next.clone(), error),
        Err(_) => Attempt::Nothing,
    };
    Ok(Turn { outcome, has_more: others.next().is_some(), is_another })
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
