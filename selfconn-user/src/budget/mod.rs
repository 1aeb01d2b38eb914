//! Shares by owner: what one user of the host does takes from that user's share only. `rate` is a token
//! bucket, `log` the shares of the log, `cmdline` the bytes of a command line, `shares` a limit that owners
//! share, `shared_rate` one in each second, `owner_losses` what they lose beyond it, `memory` what every part
//! of the daemon may keep.

pub mod cmdline;
pub mod log;
pub mod memory;
mod owner_losses;
mod payer;
mod rate;
mod shared_rate;
mod shares;

pub use owner_losses::OwnerLosses;
pub use payer::Payer;
pub use rate::RateLimiter;
pub use shared_rate::SharedRate;
pub use shares::SharedLimit;
