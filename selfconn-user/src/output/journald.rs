//! Events as entries of the systemd journal: one journal field for each field of the event, and a readable
//! message. Uses systemd's native protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL>): one datagram for
//! each entry, or a sealed memory file for an entry that is too large. No crate is used because those for
//! this protocol bring a logger or libsystemd.

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

use super::writer::Writer;
use crate::event::{format_of, text::LogRecord};

const SOCKET: &str = "/run/systemd/journal/socket";

/// True if `fd` is connected to the journal. systemd puts the device and inode numbers of the stream that it
/// connected into JOURNAL_STREAM.
#[must_use]
pub fn is_journal(fd: impl AsFd) -> bool {
    let Some(stream) = env::var("JOURNAL_STREAM").ok() else { return false };
    // Read through /proc, because std can only query the metadata of a descriptor that it owns.
    let metadata = fs::metadata(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    metadata.is_ok_and(|found| stream == format!("{}:{}", found.dev(), found.ino()))
}

/// Starts the thread that sends entries to the journal. Its items are made by [`frame`].
///
/// # Errors
/// If the socket cannot be created or the thread cannot be started.
pub(super) fn start_writer() -> io::Result<Writer> {
    let socket = UnixDatagram::unbound()?;
    Writer::start("journal", move |frames| {
        let (length, rest) = frames.split_at(size_of::<u32>());
        let length = length.try_into().map_or(0, u32::from_ne_bytes) as usize;
        send(&socket, &rest[..length]).map_err(|error| match error.kind() {
            // A broken pipe ends a writer for good, but the journal may come back.
            io::ErrorKind::BrokenPipe => io::ErrorKind::ConnectionReset.into(),
            _ => error,
        })?;
        Ok(size_of::<u32>() + length)
    })
}

/// An event as an entry, with the entry's length before it.
pub(super) fn frame(record: LogRecord<'_>, json: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; size_of::<u32>()];
    entry(record, json, &mut frame);
    let length = u32::try_from(frame.len() - size_of::<u32>()).unwrap_or(0);
    frame[..size_of::<u32>()].copy_from_slice(&length.to_ne_bytes());
    frame
}

/// Appends an event as an entry. `json` is its JSON object.
pub(crate) fn entry(record: LogRecord<'_>, json: &[u8], out: &mut Vec<u8>) {
    let format = format_of(record);
    let message = format!("{} {}", format.label, format.message(record).replace('\t', " "));
    field("MESSAGE", message.as_bytes(), out);
    field("MESSAGE_ID", message_id(record.event()).as_bytes(), out);
    field("PRIORITY", (format.severity as u8).to_string().as_bytes(), out);
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

/// Appends `NAME=value`. If the value has a line break, its length is written before it instead of `=`.
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

/// The MESSAGE_ID of an event name, the same on every host: the FNV-1a hash of the name as a version 8 UUID.
#[must_use]
pub fn message_id(event: &str) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = b"selfconn:".iter().chain(event.as_bytes());
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let version = (hash & !(0xf << 76)) | (0x8 << 76);
    format!("{:032x}", (version & !(0x3 << 62)) | (0x2 << 62))
}

/// Sends an entry to the journal. Blocks while the journal has no room.
///
/// # Errors
/// If there is no journal or it does not accept the entry.
pub fn send(socket: &UnixDatagram, entry: &[u8]) -> io::Result<()> {
    match socket.send_to(entry, SOCKET) {
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::MSGSIZE | Errno::NOBUFS)) => {
            send_sealed(socket, entry)
        }
        outcome => outcome.map(drop),
    }
}

/// Sends an entry as a sealed memory file. The journal accepts a file only if nobody can change it any more.
fn send_sealed(socket: &UnixDatagram, entry: &[u8]) -> io::Result<()> {
    let mut file = fs::File::from(memfd_create("selfconn", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(entry)?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    let fds = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let no_data: [IoSlice<'_>; 0] = [];
    sendmsg_addr(socket, &SocketAddrUnix::new(SOCKET)?, &no_data, &mut control, SendFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::event::{FORMATS, text::parse};

    #[test]
    fn a_value_with_a_line_break_cannot_add_a_field() {
        let json = br#"{"event":"closed","comm":"a\nPRIORITY=0","port":80,"isn":null,"closer":{"pid":7}}"#;
        let mut out = Vec::new();
        entry(LogRecord::new(&parse(json).unwrap()), json, &mut out);
        let has = |part: &[u8]| out.windows(part.len()).any(|window| window == part);
        assert!(has(b"\nSELFCONN_COMM\n\x0c\0\0\0\0\0\0\0a\nPRIORITY=0\n"));
        assert!(has(b"\nSELFCONN_PORT=80\n") && has(b"\nSELFCONN_CLOSER={\"pid\":7}\n"));
        assert!(has(b"\nPRIORITY=5\n") && has(b"\nSYSLOG_IDENTIFIER=selfconn\n"));
        assert!(!has(b"ISN"), "a null field is omitted");
        assert!(out.starts_with(b"MESSAGE=closed ?:80 an unknown process after"));
    }

    #[test]
    fn each_event_has_the_documented_message_id() {
        let documents = include_str!("../../../docs/log.md");
        let ids: HashSet<_> = FORMATS.iter().map(|format| message_id(format.event)).collect();
        assert_eq!(ids.len(), FORMATS.len());
        for format in FORMATS {
            let row = format!("| `{}` | `{}` |", format.event, message_id(format.event));
            assert!(documents.contains(&row), "docs/log.md lacks: {row}");
        }
    }
}
