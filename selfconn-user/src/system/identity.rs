//! Where events are from: the host, its boot, and this run. All of it is read once, when the daemon starts.

use std::{env, ffi::OsStr, fs, io, str::FromStr};

use rustix::{
    rand::{GetRandomFlags, getrandom},
    system::uname,
};
use sha2::{Digest as _, Sha256};

/// The environment variable with the name of the node in Kubernetes.
const NODE_NAME: &str = "NODE_NAME";

/// The application of the application-specific machine id. It never changes, because stores join by the result.
const APPLICATION_ID: u128 = 0x5f1a_0c3f_b8f2_4a0c_9d3b_e2c0_7b7f_64a1;

/// A name that somebody gives to the host: what a name in the DNS may have, and no more than that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName(String);

impl FromStr for HostName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if (1..=253).contains(&text.len()) && text.bytes().all(is_allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err("not 1 to 253 letters, digits, dots, dashes and underscores")
        }
    }
}

/// The host, its boot, and the run of the daemon. `None`: unknown.
#[derive(Clone, Debug)]
pub struct Identity {
    pub host: String,
    /// Of this application: it does not reveal the machine id itself, which is confidential (machine-id(5)).
    pub machine_id: Option<String>,
    pub boot_id: Option<String>,
    /// Unique for each start.
    pub run: u64,
}

impl Identity {
    /// `host` replaces the name that the host has itself.
    ///
    /// # Errors
    /// If the kernel gives no random number. Without one, a run would have the number of another run.
    pub fn read(host: Option<&HostName>) -> io::Result<Self> {
        let node = || node_name(&env::var_os(NODE_NAME)?);
        let hostname = || uname().nodename().to_string_lossy().into_owned();
        let id = |path| parse_id(&fs::read_to_string(path).ok()?);
        Ok(Self {
            host: host.cloned().or_else(node).map_or_else(hostname, |name| name.0),
            machine_id: id("/etc/machine-id").map(|machine| text(app_specific(machine, APPLICATION_ID))),
            boot_id: id("/proc/sys/kernel/random/boot_id").map(text),
            run: run_number(|bytes| getrandom(bytes, GetRandomFlags::empty()))?,
        })
    }
}

/// The name of the node in the environment. An empty one is as good as none.
fn node_name(value: &OsStr) -> Option<HostName> {
    let name = value.to_str().ok_or("not UTF-8").and_then(HostName::from_str);
    if let (Err(why), false) = (&name, value.is_empty()) {
        log::warn!("{NODE_NAME} is ignored: {why}");
    }
    name.ok()
}

/// A random number. It is not zero.
fn run_number(fill: impl FnOnce(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<u64> {
    let mut bytes = [0; size_of::<u64>()];
    // A read of so few bytes is not short: getrandom(2).
    match fill(&mut bytes)? {
        filled if filled == bytes.len() => Ok(u64::from_ne_bytes(bytes).max(1)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Parses 32 hexadecimal digits, with or without the dashes of a UUID. `/etc/machine-id` has another word before
/// the first boot has ended.
fn parse_id(text: &str) -> Option<u128> {
    let digits = text.trim().replace('-', "");
    let is_id = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    u128::from_str_radix(&digits, 16).ok().filter(|id| is_id && *id != 0)
}

/// As the journal writes an id.
fn text(id: u128) -> String {
    format!("{id:032x}")
}

/// The id of an application on a machine, as `sd_id128_get_machine_app_specific` makes it: the first half of the
/// HMAC-SHA256 of the application's id with the machine's id as the key, as a version 4 UUID.
fn app_specific(machine: u128, application: u128) -> u128 {
    let mut half = [0; 16];
    half.copy_from_slice(&hmac_sha256(&machine.to_be_bytes(), &application.to_be_bytes())[..16]);
    let version = (u128::from_be_bytes(half) & !(0xf << 76)) | (0x4 << 76);
    (version & !(0x3 << 62)) | (0x2 << 62)
}

/// HMAC (RFC 2104) of a key that is not longer than a block of SHA-256.
fn hmac_sha256(key: &[u8; 16], message: &[u8]) -> [u8; 32] {
    let keyed = |pad: u8| {
        let mut block = [pad; 64];
        for (byte, key) in block.iter_mut().zip(key) {
            *byte ^= key;
        }
        Sha256::new_with_prefix(block)
    };
    let inner = keyed(0x36).chain_update(message).finalize();
    keyed(0x5c).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use rustix::io::Errno;

    use super::*;

    #[test]
    fn the_application_specific_id_is_that_of_systemd() {
        // `systemd-id128 machine-id --app-specific=5f1a0c3fb8f24a0c9d3be2c07b7f64a1` with this /etc/machine-id.
        let machine = parse_id("3d1219c7c4c5404aaa1f6d2a48adfda4\n").unwrap();
        assert_eq!(text(app_specific(machine, APPLICATION_ID)), "a0b25d5798af4b708dfeb9f4c36d50de");
    }

    #[test]
    fn an_id_has_32_digits() {
        let boot = parse_id("f00d16c1-0008-4c3f-8a77-5b6b41a0a6b5\n");
        assert_eq!(boot.map(text).as_deref(), Some("f00d16c100084c3f8a775b6b41a0a6b5"));
        for not_an_id in
            ["", "uninitialized\n", "3d1219c7", &"0".repeat(32), &"+".repeat(32), &"f".repeat(33)]
        {
            assert_eq!(parse_id(not_an_id), None, "{not_an_id}");
        }
    }

    #[test]
    fn without_a_random_number_there_is_no_run() {
        assert_eq!(
            run_number(|_| Err(Errno::NOSYS)).unwrap_err().raw_os_error(),
            Some(Errno::NOSYS.raw_os_error())
        );
        assert!(run_number(|bytes| Ok(bytes.len() - 1)).is_err());
        assert_eq!(run_number(|bytes| Ok(bytes.len())).unwrap(), 1, "zero is no run");
    }

    #[test]
    fn a_node_name_is_a_host_name_or_ignored() {
        for name in ["node-7", "a.example", &"x".repeat(253)] {
            assert_eq!(node_name(name.as_ref()), Some(HostName(name.to_owned())));
        }
        for name in ["", "a b", "a\"b", "a\n", "\u{1b}", &"x".repeat(254)] {
            assert_eq!(node_name(name.as_ref()), None, "{name:?}");
        }
        assert_eq!(node_name(OsStr::from_bytes(b"a\xff")), None);
    }

    #[test]
    fn the_name_of_the_command_line_wins_and_each_start_is_another_run() {
        let read =
            |name: Option<&str>| Identity::read(name.map(|name| name.parse().unwrap()).as_ref()).unwrap();
        let (named, other) = (read(Some("web-1")), read(Some("web-1")));
        assert_eq!((&*named.host, named.machine_id == other.machine_id), ("web-1", true));
        assert_eq!(named.boot_id, other.boot_id);
        assert_ne!(named.run, other.run);
        assert!(!read(None).host.is_empty());
    }
}
