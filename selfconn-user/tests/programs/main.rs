//! The daemon together with real programs that administrators run: logrotate and the systemd journal. The
//! tests need root and these programs, which `cargo xtask test` installs.
#![expect(clippy::unwrap_used, reason = "a test that cannot continue panics")]

#[path = "../live/client.rs"]
#[expect(dead_code, reason = "shared with the live tests")]
mod client;
#[path = "../live/daemon.rs"]
#[expect(dead_code, reason = "shared with the live tests")]
mod daemon;
#[path = "../live/net.rs"]
#[expect(dead_code, reason = "shared with the live tests")]
mod net;
#[path = "../live/pool.rs"]
#[expect(dead_code, reason = "shared with the live tests")]
mod pool;

mod journal;
mod logrotate;
