//! Reads the socket table of one network namespace, through sock_diag or, on a kernel without it, through procfs.

use std::io;

use super::{entry::DumpedSocket, procfs, sock_diag};

/// Reads the socket tables of the network namespace that the calling thread is in.
pub(super) struct Tables {
    /// `None`: not requested, or not available on this kernel. It is not tried again then, because the kernel
    /// would run modprobe each time. An error of one namespace does not decide about the next one.
    diag: Option<sock_diag::DiagReader>,
    pub(super) without_diag: Option<String>,
    pub(super) rows: Vec<DumpedSocket>,
}

impl Tables {
    pub(super) fn new(procfs_only: bool) -> Self {
        let diag = (!procfs_only).then(sock_diag::DiagReader::new);
        Self { diag, without_diag: None, rows: Vec::new() }
    }

    /// Fills `rows` with the self-connections and, if requested, the connection attempts in progress.
    pub(super) fn read(&mut self, attempts: bool) -> io::Result<()> {
        self.fill(|diag, rows| diag.read(attempts, rows), procfs::read)
    }

    /// Fills `rows` with the listeners.
    pub(super) fn read_listeners(&mut self) -> io::Result<()> {
        self.fill(sock_diag::DiagReader::read_listeners, procfs::read_listeners)
    }

    /// Fills `rows` with the sockets that have this local port.
    pub(super) fn read_port(&mut self, port: u16) -> io::Result<()> {
        self.fill(|diag, rows| diag.read_port(port, rows), |rows| procfs::read_port(port, rows))
    }

    /// Fills `rows` through sock_diag. If that fails for any reason, through procfs.
    fn fill(
        &mut self,
        by_diag: impl Fn(&mut sock_diag::DiagReader, &mut Vec<DumpedSocket>) -> io::Result<()>,
        by_procfs: impl Fn(&mut Vec<DumpedSocket>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.rows.clear();
        if let Some(diag) = &mut self.diag {
            match by_diag(diag, &mut self.rows) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    if is_unsupported(&error) {
                        self.diag = None;
                    }
                    self.without_diag = Some(error.to_string());
                }
            }
            self.rows.clear();
        }
        by_procfs(&mut self.rows)
    }
}

/// True if this kernel has no sock_diag for TCP, in any namespace: no such netlink protocol (EPROTONOSUPPORT), or no
/// handler for TCP (ENOENT, `inet_diag_lock_handler`, net/ipv4/inet_diag.c at v5.10).
fn is_unsupported(error: &io::Error) -> bool {
    const ENOENT: i32 = 2;
    const EPROTONOSUPPORT: i32 = 93;
    matches!(error.raw_os_error(), Some(ENOENT | EPROTONOSUPPORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads two namespaces, where sock_diag fails in the first one with this errno. Returns whether it is used in the
    /// second one.
    fn is_used_again(errno: i32) -> bool {
        let mut tables = Tables::new(false);
        let fail = |_: &mut sock_diag::DiagReader, _: &mut Vec<DumpedSocket>| {
            Err(io::Error::from_raw_os_error(errno))
        };
        tables.fill(fail, |_| Ok(())).unwrap();
        let is_used = std::cell::Cell::new(false);
        let succeed = |_: &mut sock_diag::DiagReader, _: &mut Vec<DumpedSocket>| {
            is_used.set(true);
            Ok(())
        };
        tables.fill(succeed, |_| Ok(())).unwrap();
        assert!(tables.without_diag.is_some(), "it is said that a namespace was read without sock_diag");
        is_used.get()
    }

    #[test]
    fn an_error_in_one_namespace_does_not_turn_sock_diag_off_for_the_next() {
        // EPERM, ENOBUFS, ENOMEM; ENOENT, EPROTONOSUPPORT.
        assert_eq!([1, 105, 12, 2, 93].map(is_used_again), [true, true, true, false, false]);
    }
}
