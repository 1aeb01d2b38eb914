//! Where events are from: the host, its boot, and this run. All of it is read once, when the daemon starts.

use std::{env, fs};

use rustix::{
    rand::{GetRandomFlags, getrandom},
    system::uname,
};
use sha2::{Digest as _, Sha256};

/// The environment variable with the name of the node in Kubernetes.
const NODE_NAME: &str = "NODE_NAME";

/// The application of the application-specific machine id. It never changes, because stores join by the result.
const APPLICATION_ID: u128 = 0x5f1a_0c3f_b8f2_4a0c_9d3b_e2c0_7b7f_64a1;

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
    #[must_use]
    pub fn read(host: Option<&str>) -> Self {
        let node = env::var(NODE_NAME).ok().filter(|name| !name.is_empty());
        let hostname = || uname().nodename().to_string_lossy().into_owned();
        let id = |path| parse_id(&fs::read_to_string(path).ok()?);
        Self {
            host: host.map(str::to_owned).or(node).unwrap_or_else(hostname),
            machine_id: id("/etc/machine-id").map(|machine| text(app_specific(machine, APPLICATION_ID))),
            boot_id: id("/proc/sys/kernel/random/boot_id").map(text),
            run: random(),
        }
    }
}

/// A random number. It is not zero.
fn random() -> u64 {
    let mut bytes = [0; size_of::<u64>()];
    // A read of so few bytes is never short, and only a signal handler could interrupt it.
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    debug_assert_eq!(filled, Ok(bytes.len()));
    u64::from_ne_bytes(bytes).max(1)
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
    fn the_name_of_the_command_line_wins_and_each_start_is_another_run() {
        let (named, other) = (Identity::read(Some("web-1")), Identity::read(Some("web-1")));
        assert_eq!((&*named.host, named.machine_id == other.machine_id), ("web-1", true));
        assert_eq!(named.boot_id, other.boot_id);
        assert_ne!(named.run, other.run);
        assert!(!Identity::read(None).host.is_empty());
    }
}
