//! The daemon among the real programs that an administrator puts around it: logrotate, and systemd's journal. They need
//! root and these programs, which `cargo xtask test` installs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

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
