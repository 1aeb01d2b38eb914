//! The start of the guard: the rules are set, and the program is attached where the daemon is, before anything else
//! runs.

use std::io;

use super::rules::{GroupRules, GuardRules};
use crate::{
    bpf::guard::{GuardMethod, GuardProgram, NewAttachments},
    system::{cgroup, rtnetlink},
};

/// The devices that are guarded before the daemon starts, so that a host with hundreds of VRF devices does not wait for
/// them. The others have their turns.
const MAX_DEVICES_AT_START: usize = 8;

/// What the guard needs at its start.
pub struct Guard {
    pub(super) program: GuardProgram,
    pub(super) method: GuardMethod,
    pub(super) rules: GuardRules,
    /// The program on the first devices of this process's network namespace.
    pub(super) own: NewAttachments,
    /// True if another guard is there.
    is_second: bool,
    /// True to guard no other network namespace.
    pub(super) is_own_only: bool,
}

impl Guard {
    /// Sets the rules, and attaches the program in this process's network namespace. `method`: the only one to use.
    ///
    /// # Errors
    /// The reason why this host can't be guarded.
    pub fn start(
        mut program: GuardProgram,
        method: Option<GuardMethod>,
        rules: GuardRules,
        is_own_only: bool,
    ) -> anyhow::Result<Self> {
        for (port, bits) in rules.ports() {
            program.set_port(port, bits)?;
        }
        for (uid, bits) in rules.uids() {
            program.set_uid(uid, bits)?;
        }
        set_cgroups(&mut program, &rules)?;
        let mut devices = rtnetlink::loop_devices()?;
        devices.truncate(MAX_DEVICES_AT_START);
        let mut refused = Vec::new();
        for candidate in GuardMethod::ALL.into_iter().filter(|one| method.is_none_or(|only| only == *one)) {
            match program.attach_all(candidate, &devices) {
                Ok(own) => {
                    let is_second = own.iter().any(|attachment| program.is_second(attachment));
                    return Ok(Self { program, method: candidate, rules, own, is_second, is_own_only });
                }
                Err(error) => {
                    refused.push(format!("{}: {error}{}", candidate.name(), hint(candidate, &error)));
                }
            }
        }
        anyhow::bail!("the program can't be attached to lo ({})", refused.join("; "))
    }

    #[must_use]
    pub fn method(&self) -> GuardMethod {
        self.method
    }

    /// True if another guard was there first. It refuses; this one goes on when that one ends.
    #[must_use]
    pub fn is_second(&self) -> bool {
        self.is_second
    }
}

/// What helps against this error.
fn hint(method: GuardMethod, error: &io::Error) -> &'static str {
    const ENOENT: i32 = 2;
    const EPERM: i32 = 1;
    match (method, error.raw_os_error()) {
        (GuardMethod::Tcx, _) => "",
        (_, Some(ENOENT)) => ": needs the kernel modules sch_ingress and cls_bpf",
        (_, Some(EPERM)) => ": needs CAP_NET_ADMIN",
        _ => "",
    }
}

/// Sets the control groups whose connects are refused, or are not.
pub(super) fn set_cgroups(program: &mut GuardProgram, rules: &GuardRules) -> anyhow::Result<()> {
    if !rules.by_cgroup() {
        return Ok(());
    }
    let mut groups = GroupRules::new(rules);
    if rules.has_names() {
        cgroup::visit_named(|group| groups.add(&group, rules.of_group(&group)))?;
    }
    program.set_cgroups(&groups.by_id)
}
