//! The guard's program: loads it, attaches it to the devices of a network namespace, and says whether it still is.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData},
    programs::{ProgramError, ProgramInfo, SchedClassifier, TcAttachType},
};
use selfconn_ebpf::{
    guard::{MAX_CGROUPS, mode, rule},
    names,
};

use super::{
    features::KernelFeatures,
    link, map_batch,
    refusal::{Refusal, refusal, refusal_by_errno},
};
use crate::system::{
    process,
    rtnetlink::{self, LoopDevice},
};

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum GuardMethod {
    /// A link, which is gone with its last descriptor (v6.6).
    Tcx,
    /// A filter of the queueing discipline clsact, which stays until somebody removes it.
    Clsact,
}

impl GuardMethod {
    /// In the order of preference.
    pub const ALL: [Self; 2] = [Self::Tcx, Self::Clsact];

    /// The name in events and options.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// What the object must know about the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardOptions {
    /// One of [`mode`].
    pub mode: u32,
    /// Bits of [`selfconn_ebpf::guard::rule`].
    pub only: u32,
    /// True if there are rules about control groups.
    pub by_cgroup: bool,
    /// Cookie of the socket of the self-test. 0: there is none.
    pub self_test: u64,
}

impl GuardOptions {
    pub const OFF: Self = Self { mode: mode::OFF, only: 0, by_cgroup: false, self_test: 0 };
}

/// The loaded program.
pub struct GuardProgram {
    fd: OwnedFd,
    /// The kernel's number of the program.
    id: u32,
    /// The name of its filters.
    owner: FilterOwner,
    switch: GuardSwitch,
    ports: Array<MapData, u32>,
    uids: HashMap<MapData, u32, u32>,
    cgroups: HashMap<MapData, u64, u32>,
}

/// Turns the program off wherever it is attached.
#[derive(Debug)]
pub struct GuardSwitch {
    /// The map of the rules for ports.
    ports: OwnedFd,
}

impl GuardSwitch {
    /// From now on every connect passes, by a rule for each port. One call takes much less time than detaching the
    /// program from hundreds of devices. Needs no privilege from Linux 5.19 on, and `CAP_BPF` before if
    /// `kernel.unprivileged_bpf_disabled` is set.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn turn_off(&self) -> io::Result<()> {
        map_batch::update_array(self.ports.as_fd(), &vec![rule::EXCEPT; PORTS])
    }
}

/// Number of entries of the map of ports.
const PORTS: usize = 1 << 16;

/// The program on a device. Dropping it detaches a link, and leaves a filter.
#[derive(Debug)]
pub struct Attachment {
    device: LoopDevice,
    kind: AttachmentKind,
}

/// The program on the devices of a network namespace. Dropping it detaches the program from all of them, in the network
/// namespace of the calling thread.
#[derive(Debug)]
pub struct NewAttachments {
    owner: FilterOwner,
    attachments: Vec<Attachment>,
}

#[derive(Debug)]
enum AttachmentKind {
    Link(OwnedFd),
    /// `makes_clsact`: the queueing discipline was made for it.
    Filter {
        makes_clsact: bool,
    },
}

/// Why the program does not refuse anything on a device, although it was attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disarmed {
    TakenOff,
    /// Another program is in front of it: its name. If it ends the chain, the guard does not run.
    Behind(String),
}

/// The name of a filter: whose it is. The start time distinguishes processes that have the same pid, and a pid means
/// something only in its pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterOwner {
    pub(super) pid: u32,
    start_ticks: u64,
    pid_ns: u64,
    /// False: it only reports.
    pub(super) refuses: bool,
}

/// The prefixes of filter names. True: the filter refuses; false: dry run.
const FILTER_PREFIXES: [(&str, bool); 2] = [("selfconn_guard:", true), ("selfconn_dryrun:", false)];

/// Priority of the filter. The lowest number runs first.
const FILTER_PRIORITY: u16 = 1;

impl FilterOwner {
    fn current(refuses: bool) -> Self {
        let pid = std::process::id();
        let start_ticks = process::start_ticks(pid).unwrap_or(0);
        Self { pid, start_ticks, pid_ns: process::pid_ns_inode().unwrap_or(0), refuses }
    }

    fn name(self) -> String {
        let Self { pid, start_ticks, pid_ns, refuses } = self;
        let prefix = FILTER_PREFIXES.iter().find_map(|(prefix, of)| (*of == refuses).then_some(*prefix));
        format!("{}{pid}:{start_ticks}:{pid_ns}", prefix.unwrap_or_default())
    }

    /// `None`: it is not a filter of a guard.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let rest = |(prefix, refuses): &(&str, bool)| Some((name.strip_prefix(prefix)?, *refuses));
        let (numbers, refuses) = FILTER_PREFIXES.iter().find_map(rest)?;
        let mut numbers = numbers.split(':').map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        Some(Self { pid: u32::try_from(next()?).ok()?, start_ticks: next()?, pid_ns: next()?, refuses })
    }

    /// True if the process is known to have ended.
    pub(super) fn is_gone(self) -> bool {
        process::pid_ns_inode() == Some(self.pid_ns)
            && process::start_ticks(self.pid) != Some(self.start_ticks)
    }

    /// Removes the filter with this name, and the queueing discipline if it was made for it.
    fn detach(self, attachment: &Attachment) -> io::Result<()> {
        let AttachmentKind::Filter { makes_clsact } = attachment.kind else { return Ok(()) };
        let device = attachment.device.index;
        for filter in rtnetlink::filters(device)? {
            if Self::parse(&filter.name) == Some(self) {
                rtnetlink::remove_filter(device, &filter)?;
            }
        }
        if makes_clsact { rtnetlink::remove_unused_clsact(device) } else { Ok(()) }
    }
}

impl GuardProgram {
    /// Loads the program. Its maps are those of `ebpf`.
    pub(super) fn load(ebpf: &mut Ebpf, features: &KernelFeatures, refuses: bool) -> Result<Self, Refusal> {
        features.check_guard()?;
        let error = |error: ProgramError| refusal(&error);
        let name = if refuses { names::GUARD } else { names::GUARD_DRY_RUN };
        let program: &mut SchedClassifier = ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| Refusal::Broken(format!("the eBPF object has no program {name}")))?;
        program.load().map_err(error)?;
        let id = program.info().map_err(error)?.id();
        let fd = program.fd().map_err(error)?.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| refusal_by_errno("dup", &error))?;
        let map = |ebpf: &mut Ebpf, name| {
            ebpf.take_map(name).ok_or_else(|| Refusal::Broken(format!("the eBPF object has no map {name}")))
        };
        let broken = |error: aya::maps::MapError| Refusal::Broken(error.to_string());
        let ports = map(ebpf, names::GUARD_PORTS)?;
        let Map::Array(data) = &ports else {
            return Err(Refusal::Broken(format!("{} is no array", names::GUARD_PORTS)));
        };
        let ports_fd = data.fd().as_fd().try_clone_to_owned();
        let switch = GuardSwitch { ports: ports_fd.map_err(|error| refusal_by_errno("dup", &error))? };
        Ok(Self {
            fd,
            id,
            owner: FilterOwner::current(refuses),
            switch,
            ports: Array::try_from(ports).map_err(broken)?,
            uids: HashMap::try_from(map(ebpf, names::GUARD_UIDS)?).map_err(broken)?,
            cgroups: HashMap::try_from(map(ebpf, names::GUARD_CGROUPS)?).map_err(broken)?,
        })
    }

    /// What turns the program off, also from another thread.
    ///
    /// # Errors
    /// If this process can have no more descriptors.
    pub fn switch(&self) -> io::Result<GuardSwitch> {
        Ok(GuardSwitch { ports: self.switch.ports.try_clone()? })
    }

    /// Sets the rules for a port.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_port(&mut self, port: u16, rules: u32) -> anyhow::Result<()> {
        Ok(self.ports.set(port.into(), rules, 0)?)
    }

    /// Sets the rules for a user.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_uid(&mut self, uid: u32, rules: u32) -> anyhow::Result<()> {
        Ok(self.uids.insert(uid, rules, 0)?)
    }

    /// Replaces the rules for control groups.
    ///
    /// # Errors
    /// If the kernel refuses, such as when there are too many.
    pub fn set_cgroups(&mut self, rules: &std::collections::HashMap<u64, u32>) -> anyhow::Result<()> {
        anyhow::ensure!(
            rules.len() <= MAX_CGROUPS,
            "{} control groups match, of which {MAX_CGROUPS} find room; the rules are as they were",
            rules.len()
        );
        let known = self.cgroups.keys().collect::<Result<Vec<u64>, _>>()?;
        for id in known.iter().filter(|id| !rules.contains_key(id)) {
            self.cgroups.remove(id)?;
        }
        for (id, rules) in rules {
            self.cgroups.insert(id, rules, 0)?;
        }
        Ok(())
    }

    /// Attaches the program to all these devices of the calling thread's network namespace, or to none.
    ///
    /// # Errors
    /// If the kernel refuses one of them.
    pub fn attach_all(&self, method: GuardMethod, devices: &[LoopDevice]) -> io::Result<NewAttachments> {
        let mut new = NewAttachments { owner: self.owner, attachments: Vec::new() };
        for device in devices {
            new.attachments.push(self.attach(method, device)?);
        }
        Ok(new)
    }

    /// Attaches the program to a device of the calling thread's network namespace, in front of all others except
    /// another guard.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(&self, method: GuardMethod, device: &LoopDevice) -> io::Result<Attachment> {
        let kind = match method {
            GuardMethod::Tcx => {
                let other = self.other_link(&device.name).unwrap_or_default();
                let link = link::create_tcx_egress(self.fd.as_fd(), device.index, other);
                AttachmentKind::Link(link?)
            }
            GuardMethod::Clsact => {
                let makes_clsact = rtnetlink::add_clsact(device.index)?;
                if let Err(error) = self.add_filter(device) {
                    if makes_clsact && let Err(left) = rtnetlink::remove_unused_clsact(device.index) {
                        log::warn!("clsact is left on {}: {left}", device.name);
                    }
                    return Err(error);
                }
                AttachmentKind::Filter { makes_clsact }
            }
        };
        Ok(Attachment { device: device.clone(), kind })
    }

    fn add_filter(&self, device: &LoopDevice) -> io::Result<()> {
        self.remove_left_over(device)?;
        let filters = rtnetlink::filters(device.index)?;
        let has_other = filters.iter().any(|filter| FilterOwner::parse(&filter.name).is_some());
        let priority = FILTER_PRIORITY + u16::from(has_other);
        rtnetlink::add_filter(device.index, self.fd.as_fd(), &self.owner.name(), priority)
    }

    /// Removes the filters of guards whose process has ended.
    fn remove_left_over(&self, device: &LoopDevice) -> io::Result<()> {
        for filter in rtnetlink::filters(device.index)? {
            if FilterOwner::parse(&filter.name).is_some_and(FilterOwner::is_gone) {
                log::info!("removing the filter {} of {}: its daemon has ended", filter.name, device.name);
                rtnetlink::remove_filter(device.index, &filter)?;
            }
        }
        Ok(())
    }

    /// True if another guard is on this device of the calling thread's network namespace.
    #[must_use]
    pub fn is_second(&self, attachment: &Attachment) -> bool {
        let device = &attachment.device;
        match attachment.kind {
            AttachmentKind::Link(_) => self.other_link(&device.name).is_some(),
            AttachmentKind::Filter { .. } => rtnetlink::filters(device.index).is_ok_and(|filters| {
                let owners = filters.iter().filter_map(|filter| FilterOwner::parse(&filter.name));
                owners.into_iter().any(|owner| owner != self.owner)
            }),
        }
    }

    /// The program of another guard that is linked to this device.
    fn other_link(&self, device: &str) -> Option<u32> {
        let (_, programs) = SchedClassifier::query_tcx(device, TcAttachType::Egress).ok()?;
        let is_other = |info: &&ProgramInfo| info.id() != self.id && refuses(info).is_some();
        programs.iter().filter(is_other).map(ProgramInfo::id).next_back()
    }

    /// Why the program does not run on this device of the calling thread's network namespace. `None`: it does.
    ///
    /// # Errors
    /// If the kernel refuses to say what is attached.
    pub fn disarmed(&self, attachment: &Attachment) -> io::Result<Option<Disarmed>> {
        let device = &attachment.device;
        match &attachment.kind {
            AttachmentKind::Link(_) => {
                let (_, programs) = SchedClassifier::query_tcx(&device.name, TcAttachType::Egress)
                    .map_err(io::Error::other)?;
                for info in &programs {
                    if info.id() == self.id {
                        return Ok(None);
                    }
                    if refuses(info).is_none() {
                        return Ok(Some(Disarmed::Behind(info.name_as_str().unwrap_or("?").to_owned())));
                    }
                }
            }
            AttachmentKind::Filter { .. } => {
                for filter in rtnetlink::filters(device.index)? {
                    match FilterOwner::parse(&filter.name) {
                        Some(owner) if owner == self.owner => return Ok(None),
                        Some(_) => {}
                        None => return Ok(Some(Disarmed::Behind(filter.name))),
                    }
                }
            }
        }
        Ok(Some(Disarmed::TakenOff))
    }

    /// Detaches the program from a device of the calling thread's network namespace.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn detach(&self, attachment: &Attachment) -> io::Result<()> {
        self.owner.detach(attachment)
    }
}

impl Drop for NewAttachments {
    fn drop(&mut self) {
        for attachment in &self.attachments {
            if let Err(error) = self.owner.detach(attachment) {
                log::warn!("the guard is left on {}: {error}", attachment.device.name);
            }
        }
    }
}

impl NewAttachments {
    /// Leaves the program attached.
    #[must_use]
    pub fn keep(mut self) -> Vec<Attachment> {
        std::mem::take(&mut self.attachments)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.iter()
    }
}

impl Attachment {
    #[must_use]
    pub fn device(&self) -> &LoopDevice {
        &self.device
    }

    /// True if somebody has detached the link, or its network namespace has ended. Needs no privilege and enters
    /// nothing. Always false for a filter.
    #[must_use]
    pub fn is_link_detached(&self) -> bool {
        let AttachmentKind::Link(link) = &self.kind else { return false };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd())).unwrap_or_default();
        // `tcx_link_fdinfo`, kernel/bpf/tcx.c at v6.6.
        info.lines().any(|line| line.strip_prefix("ifindex:").is_some_and(|index| index.trim() == "0"))
    }
}

/// Whether a guard refuses, or only reports. `None`: it is no guard.
pub(super) fn refuses(info: &ProgramInfo) -> Option<bool> {
    match info.name_as_str()? {
        names::GUARD => Some(true),
        names::GUARD_DRY_RUN => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_names_its_process_and_other_names_are_not_a_guards() {
        for (refuses, name) in [(true, "selfconn_guard:7:8:9"), (false, "selfconn_dryrun:7:8:9")] {
            let owner = FilterOwner { pid: 7, start_ticks: 8, pid_ns: 9, refuses };
            assert_eq!(owner.name(), name);
            assert_eq!(FilterOwner::parse(name), Some(owner));
        }
        for name in [
            "",
            "selfconn_guard",
            "selfconn_guard:",
            "selfconn_guard:7:8",
            "cilium:7:8:9",
            "selfconn_guard:-7:8:9",
        ] {
            assert_eq!(FilterOwner::parse(name), None, "{name}");
        }
        assert!(!FilterOwner::current(true).is_gone());
        let earlier = FilterOwner { start_ticks: 1, ..FilterOwner::current(true) };
        assert!(earlier.is_gone(), "another process with this pid");
        assert!(!FilterOwner { pid_ns: 1, ..earlier }.is_gone(), "a pid of another namespace");
    }
}
