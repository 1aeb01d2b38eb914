//! Runs the command: in its control group, as its user, with our signals, until it ends.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, ExitStatus},
};

use rustix::{
    process::{Pid, WaitOptions, kill_process},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

use super::{
    group::CommandGroup,
    signals::{self, SignalEvent, SignalMask, Signals},
    tree,
    user::User,
};

/// Starts the command. Its descriptors are ours.
///
/// # Errors
/// If the program can't be executed.
pub(super) fn start(
    command: &[OsString],
    group: Option<&CommandGroup>,
    user: Option<User>,
    mask: SignalMask,
) -> io::Result<Child> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut child = Command::new(program);
    child.args(arguments);
    let members = group.map(CommandGroup::open_members).transpose()?;
    let enter = move || {
        if let Some(mut members) = members.as_ref() {
            members.write_all(b"0")?;
        }
        if let Some(user) = &user {
            // This process has one thread. The user goes last, because only root may set the others.
            set_thread_groups(&user.groups)?;
            set_thread_gid(user.gid)?;
            set_thread_uid(user.uid)?;
        }
        mask.set();
        Ok(())
    };
    // SAFETY: the closure makes system calls only. It allocates nothing and takes no lock.
    unsafe { child.pre_exec(enter) };
    child.spawn()
}

/// The exit code of a shell for a program that can't be executed.
pub(super) fn code_of(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::NotFound => 127,
        _ => 126,
    }
}

/// How the command ended.
pub(super) struct CommandEnd {
    pub(super) status: ExitStatus,
    /// How the watch ended, if that was first.
    pub(super) watch: Option<ExitStatus>,
}

/// Waits until the command ends, and passes signals on. If it is stopped, so is this process. Orphans that became our
/// children are waited for, too, as process 1 does.
///
/// # Errors
/// If the command can't be waited for.
pub(super) fn wait(child: &Child, watch: Option<Pid>, signals: &mut Signals) -> io::Result<CommandEnd> {
    let command = Pid::from_child(child);
    let mut watch_status = None;
    loop {
        match signals.next()? {
            // What a process of the command sends to its process group has reached the command.
            SignalEvent::Sent(_, sender) if tree::is_ours(sender) == Some(true) => {}
            // It may have ended meanwhile.
            SignalEvent::Sent(signal, _) => drop(kill_process(command, signal)),
            SignalEvent::OfKernel => {}
            SignalEvent::Child => {
                while let Some((pid, status)) =
                    rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED)?
                {
                    let ended = ExitStatus::from_raw(status.as_raw());
                    match status.stopped() {
                        true if pid == command => signals::stop(),
                        true => {}
                        false if pid == command => {
                            return Ok(CommandEnd { status: ended, watch: watch_status });
                        }
                        false if Some(pid) == watch => watch_status = Some(ended),
                        false => {}
                    }
                }
            }
        }
    }
}
