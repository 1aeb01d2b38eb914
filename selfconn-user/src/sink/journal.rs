//! The journal: an event is an entry with a field for each of its own, and a message for people. systemd's native
//! protocol: a datagram for each entry, or a sealed file for one that is too large
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL>). The crates that speak it bring a logger or libsystemd along.

use std::{
    env, fs,
    io::{self, IoSlice, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd as _},
        unix::{fs::MetadataExt as _, net::UnixDatagram},
    },
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, sendmsg_addr},
};
use serde_json::Value;

use super::{
    text::{Record, kind_of, parse},
    writer::Writer,
};

const SOCKET: &str = "/run/systemd/journal/socket";

/// Whether what is written here goes to the journal: who started us says so, by the number of what it connected.
#[must_use]
pub fn is_journal(fd: impl AsFd) -> bool {
    let Some(stream) = env::var("JOURNAL_STREAM").ok() else { return false };
    // Through /proc, for a descriptor can't be asked without taking it.
    let own = fs::metadata(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    own.is_ok_and(|own| stream == format!("{}:{}", own.dev(), own.ino()))
}

/// Where entries go.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) writer: Writer,
    framed: Vec<u8>,
}

impl Journal {
    /// # Errors
    /// When there is no socket to be had, or no thread.
    pub(super) fn start() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        let writer = Writer::start("journal", move |entries| {
            // Each begins with its length.
            let (length, rest) = entries.split_at(size_of::<u32>());
            let length = length.try_into().map_or(0, u32::from_ne_bytes) as usize;
            send(&socket, &rest[..length])?;
            Ok(size_of::<u32>() + length)
        })?;
        Ok(Self { writer, framed: Vec::new() })
    }

    /// Adds an event, of which this is the line.
    pub(super) fn push(&mut self, json: &[u8]) {
        let json = json.trim_ascii_end();
        let Some(fields) = parse(json) else { return };
        self.framed.clear();
        self.framed.extend([0; size_of::<u32>()]);
        entry(Record::new(&fields), json, &mut self.framed);
        let length = u32::try_from(self.framed.len() - size_of::<u32>()).unwrap_or(0);
        self.framed[..size_of::<u32>()].copy_from_slice(&length.to_ne_bytes());
        self.writer.push(&self.framed);
    }
}

/// Appends an event as an entry.
pub(crate) fn entry(record: Record<'_>, json: &[u8], out: &mut Vec<u8>) {
    let kind = kind_of(record);
    let mut message = format!("{} ", kind.word);
    let written = (kind.sentence)(record, &mut message);
    debug_assert!(written.is_ok(), "writing to a String does not fail");
    field("MESSAGE", message.replace('\t', " ").as_bytes(), out);
    field("MESSAGE_ID", message_id(record.event()).as_bytes(), out);
    field("PRIORITY", (kind.severity as u8).to_string().as_bytes(), out);
    field("SYSLOG_IDENTIFIER", b"selfconn", out);
    field("SELFCONN_JSON", json, out);
    for (key, value) in record.fields() {
        let name = format!("SELFCONN_{}", key.to_ascii_uppercase());
        match value {
            Value::Null => {}
            Value::String(text) => field(&name, text.as_bytes(), out),
            other => field(&name, other.to_string().as_bytes(), out),
        }
    }
}

/// `NAME=value`, or with the length before it where the value has a line break.
fn field(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') {
        out.push(b'\n');
        out.extend((value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// The same for every event of one name, on every host: the FNV-1a hash of it, in the form of a UUID of version 8.
#[must_use]
pub fn message_id(event: &str) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = b"selfconn:".iter().chain(event.as_bytes());
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let version = (hash & !(0xf << 76)) | (0x8 << 76);
    format!("{:032x}", (version & !(0x3 << 62)) | (0x2 << 62))
}

/// Hands an entry over; blocks while the journal has no room.
///
/// # Errors
/// When there is no journal, or it takes nothing.
pub fn send(socket: &UnixDatagram, entry: &[u8]) -> io::Result<()> {
    match socket.send_to(entry, SOCKET) {
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::MSGSIZE | Errno::NOBUFS)) => {
            send_sealed(socket, entry)
        }
        outcome => outcome.map(drop),
    }
}

/// As a file that nobody can change any more, which is all that the journal takes one for.
fn send_sealed(socket: &UnixDatagram, entry: &[u8]) -> io::Result<()> {
    let mut file = fs::File::from(memfd_create("selfconn", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(entry)?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    let fds = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let nothing: [IoSlice<'_>; 0] = [];
    sendmsg_addr(socket, &SocketAddrUnix::new(SOCKET)?, &nothing, &mut control, SendFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::sink::text::KINDS;

    #[test]
    fn a_value_cannot_become_a_field() {
        let json = br#"{"event":"closed","comm":"a\nPRIORITY=0","port":80,"isn":null,"closer":{"pid":7}}"#;
        let mut out = Vec::new();
        entry(Record::new(&parse(json).unwrap()), json, &mut out);
        let has = |part: &[u8]| out.windows(part.len()).any(|window| window == part);
        assert!(has(b"\nSELFCONN_COMM\n\x0c\0\0\0\0\0\0\0a\nPRIORITY=0\n"));
        assert!(has(b"\nSELFCONN_PORT=80\n") && has(b"\nSELFCONN_CLOSER={\"pid\":7}\n"));
        assert!(has(b"\nPRIORITY=5\n") && has(b"\nSYSLOG_IDENTIFIER=selfconn\n"));
        assert!(!has(b"ISN"), "unknown is left out");
        assert!(out.starts_with(b"MESSAGE=closed ?:80 an unknown process after"));
    }

    #[test]
    fn each_event_has_the_message_id_of_the_documents() {
        let documents = include_str!("../../../docs/log.md");
        let ids: HashSet<_> = KINDS.iter().map(|kind| message_id(kind.event)).collect();
        assert_eq!(ids.len(), KINDS.len());
        for kind in KINDS {
            let row = format!("| `{}` | `{}` |", kind.event, message_id(kind.event));
            assert!(documents.contains(&row), "docs/log.md lacks: {row}");
        }
    }
}
