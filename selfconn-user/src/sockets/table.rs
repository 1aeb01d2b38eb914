//! Reads the socket table of one network namespace, through sock_diag or, on a kernel without it, through procfs.

use std::io;

use super::{
    entry::{DumpedSocket, SocketEntry},
    limit::{LimitedRows, RowSink, SnapshotLimit},
    port_use::PortUseSink,
    procfs, sock_diag,
};

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

    /// Fills `rows` with the self-connections and, if requested, the connection attempts in progress, within a limit. A
    /// self-connection that is known already is left out.
    pub(super) fn read(
        &mut self,
        attempts: bool,
        limit: &mut SnapshotLimit,
        is_known: &dyn Fn(&SocketEntry) -> bool,
    ) -> io::Result<()> {
        let Self { diag, without_diag, rows } = self;
        rows.clear();
        let mut rows = LimitedRows { rows, limit, is_known };
        fill(diag, without_diag, &mut rows, |diag, rows| diag.read(attempts, rows), procfs::read)
    }

    /// Fills `rows` with the listeners, without a limit: for a command.
    pub(super) fn read_listeners(&mut self) -> io::Result<()> {
        let Self { diag, without_diag, rows } = self;
        rows.clear();
        fill(diag, without_diag, rows, sock_diag::DiagReader::read_listeners, procfs::read_listeners)
    }

    /// Reads the sockets that have this local port.
    pub(super) fn read_port(&mut self, port: u16, sink: &mut PortUseSink<'_>) -> io::Result<()> {
        let Self { diag, without_diag, rows: _ } = self;
        let by_diag =
            |diag: &mut sock_diag::DiagReader, sink: &mut PortUseSink<'_>| diag.read_port(port, sink);
        fill(diag, without_diag, sink, by_diag, |sink| procfs::read_port(port, sink))
    }
}

/// Fills `rows` through sock_diag. If that fails for any reason, through procfs.
fn fill<R: RowSink>(
    diag: &mut Option<sock_diag::DiagReader>,
    without_diag: &mut Option<String>,
    rows: &mut R,
    by_diag: impl Fn(&mut sock_diag::DiagReader, &mut R) -> io::Result<()>,
    by_procfs: impl Fn(&mut R) -> io::Result<()>,
) -> io::Result<()> {
    if let Some(reader) = diag {
        let mark = rows.mark();
        match by_diag(reader, rows) {
            Ok(()) => return Ok(()),
            Err(error) => {
                if is_unsupported(&error) {
                    *diag = None;
                }
                *without_diag = Some(error.to_string());
            }
        }
        rows.restore(&mark);
    }
    by_procfs(rows)
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
        let Tables { mut diag, mut without_diag, mut rows } = Tables::new(false);
        let fail = |_: &mut sock_diag::DiagReader, _: &mut Vec<DumpedSocket>| {
            Err(io::Error::from_raw_os_error(errno))
        };
        fill(&mut diag, &mut without_diag, &mut rows, fail, |_| Ok(())).unwrap();
        let is_used = std::cell::Cell::new(false);
        let succeed = |_: &mut sock_diag::DiagReader, _: &mut Vec<DumpedSocket>| {
            is_used.set(true);
            Ok(())
        };
        fill(&mut diag, &mut without_diag, &mut rows, succeed, |_| Ok(())).unwrap();
        assert!(without_diag.is_some(), "it is said that a namespace was read without sock_diag");
        is_used.get()
    }

    #[test]
    fn an_error_in_one_namespace_does_not_turn_sock_diag_off_for_the_next() {
        // EPERM, ENOBUFS, ENOMEM; ENOENT, EPROTONOSUPPORT.
        assert_eq!([1, 105, 12, 2, 93].map(is_used_again), [true, true, true, false, false]);
    }
}
