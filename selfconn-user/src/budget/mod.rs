//! Shares by owner: what one user of the host does takes from that user's share only. `rate` is a token bucket, `log` the
//! shares of the log, `cmdline` the bytes of a command line.

pub mod cmdline;
pub mod log;
mod payer;
mod rate;

pub use payer::Payer;
pub use rate::RateLimiter;
