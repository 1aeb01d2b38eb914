//! The daemon among the real programs that an administrator puts around it, logrotate and systemd's journal, and among
//! servers that it watches. They need root and these programs, which `cargo xtask test` and `suites` install.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

#[path = "../live/support/mod.rs"]
#[expect(dead_code, reason = "shared with the live tests")]
mod support;

mod journal;
mod logrotate;
mod servers;
