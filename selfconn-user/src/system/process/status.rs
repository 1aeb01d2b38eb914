//! The text of `/proc/PID/status`.

/// The value of a field, such as `Uid`. A process gives itself any name, so the text may not be UTF-8.
pub(crate) fn status_field<'a>(status: &'a [u8], name: &str) -> Option<&'a str> {
    let value = |line: &'a [u8]| line.strip_prefix(name.as_bytes())?.strip_prefix(b":");
    str::from_utf8(status.split(|byte| *byte == b'\n').find_map(value)?).ok().map(str::trim)
}

/// The real, effective, saved and file system uid.
pub(crate) fn uids_in_status(status: &[u8]) -> Option<[u32; 4]> {
    let mut uids = status_field(status, "Uid")?.split_ascii_whitespace().map(str::parse);
    let mut next = || uids.next()?.ok();
    Some([next()?, next()?, next()?, next()?])
}

/// What [`only_uid`] says of a process that is several users: a number that no user has.
const SEVERAL_USERS: u32 = u32::MAX;

/// The user of a process that is the same user in every respect, or else [`SEVERAL_USERS`].
pub(super) fn only_uid(status: &[u8]) -> Option<u32> {
    let uids @ [uid, ..] = uids_in_status(status)?;
    Some(if uids.iter().all(|other| *other == uid) { uid } else { SEVERAL_USERS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_are_read_whatever_the_name_is() {
        let status = b"Name:\t\xff\xfe\nUmask:\t0022\nUid:\t1000\t0\t1\t2\nGid:\t5\t5\t5\t5\n";
        assert_eq!((uids_in_status(status), only_uid(status)), (Some([1_000, 0, 1, 2]), Some(SEVERAL_USERS)));
        assert_eq!(only_uid(b"Name:\tsh\nUid:\t33\t33\t33\t33\n"), Some(33));
        for text in [&b"Name:\tUid: 3\n"[..], b"Uid:\t33\t33\t33\n", b""] {
            assert_eq!(uids_in_status(text), None);
        }
    }
}
