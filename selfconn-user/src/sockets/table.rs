//! Reads the socket table of one network namespace, through sock_diag or, on a kernel without it, through procfs.

use std::io;

use super::{entry::DumpedSocket, procfs, sock_diag};

/// Reads the socket tables of the network namespace that the calling thread is in.
pub(super) struct Tables {
    /// `None`: not requested, or not available on this kernel. It is not tried again then, because the kernel
    /// would run modprobe each time.
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
                Err(error) => self.without_diag = Some(error.to_string()),
            }
            self.diag = None;
            self.rows.clear();
        }
        by_procfs(&mut self.rows)
    }
}
