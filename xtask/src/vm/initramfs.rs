//! Writes the archive that becomes the guest's root: cpio in the "newc" form, uncompressed, which every kernel takes
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{collections::BTreeSet, path::Path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Initramfs {
    /// An archive with nothing but the device through which the kernel gives PID 1 its first standard output.
    pub(super) fn new() -> Self {
        let mut this = Self::default();
        this.directory("dev");
        this.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        this
    }

    /// Adds a file that can be run, and the directories above it. The path is absolute, as in the guest.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        let path = path.trim_start_matches('/');
        if let Some(parent) = Path::new(path).parent().and_then(Path::to_str) {
            self.directory(parent);
        }
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// The finished archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn directory(&mut self, path: &str) {
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.directories.insert(path.to_owned());
        self.entry(path, DIRECTORY, (0, 0), &[]);
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let links = if mode & 0o170_000 == DIRECTORY & 0o170_000 { 2 } else { 1 };
        self.bytes.extend(b"070701");
        for field in [
            self.entries, // inode
            mode,
            0, // user
            0, // group
            links,
            0, // time
            length(content.len()),
            0, // the device it lay on, major
            0, // and minor
            major,
            minor,
            length(path.len() + 1),
            0, // checksum: none in this form
        ] {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents start at multiples of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Path, mode, device and content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// What a reader of the format finds.
    fn read(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&bytes[..6], b"070701");
            let (content, name) = (field(6) as usize, field(11) as usize);
            let from = (110 + name).next_multiple_of(4);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name - 1], 0);
            entries.push((path, field(1), (field(9), field(10)), bytes[from..from + content].to_vec()));
            bytes = &bytes[(from + content).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn holds_each_directory_once_and_before_what_is_in_it() {
        let mut initramfs = Initramfs::new();
        initramfs.file("/init", b"first");
        initramfs.file("/lib/modules/a.ko", b"a");
        initramfs.file("/lib/modules/b.ko", b"");
        let entries = read(&initramfs.finish());
        let paths: Vec<&str> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(
            paths,
            [
                "dev",
                "dev/console",
                "init",
                "lib",
                "lib/modules",
                "lib/modules/a.ko",
                "lib/modules/b.ko",
                "TRAILER!!!"
            ]
        );
        assert_eq!(entries[1], ("dev/console".into(), 0o020_600, (5, 1), vec![]));
        assert_eq!(entries[2], ("init".into(), 0o100_755, (0, 0), b"first".to_vec()));
        assert_eq!(entries[4].1, 0o040_755);
    }

    #[test]
    fn is_byte_for_byte_the_documented_form() {
        let mut initramfs = Initramfs::default();
        initramfs.file("/ab", b"xyz");
        let expected = "07070100000001000081ed000000000000000000000001000000000000000300000000000000000000000000000000\
                        0000000300000000ab\0\0\0\0xyz\0\
                        070701000000020000000000000000000000000000000100000000000000000000000000000000000000000000000\
                        00000000b00000000TRAILER!!!\0\0\0\0";
        let bytes = initramfs.finish();
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }
}
