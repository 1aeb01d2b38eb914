//! Shares by owner: what one user of the host does takes from that user's share only. `party` says who is one user,
//! `payer` who pays for a connection, `rate` is a token bucket, `log` decides what the log has, by the rates of
//! `log_shares`, `cmdline` has the bytes of a command line, `shares` a limit that owners share, `shared_rate` one in
//! each second, `party_time` the time of each party, `turns` the order in which they come, `fair_queue` a queue in that
//! order, `least_spent` one by what they have spent, `owner_losses` what they lose beyond it, `user_set` a set of
//! users, `memory` what every part of the daemon may keep.

pub mod cmdline;
mod fair_queue;
mod least_spent;
pub mod log;
mod log_shares;
pub mod memory;
mod owner_losses;
mod party;
mod party_time;
mod payer;
mod rate;
mod shared_rate;
mod shares;
mod turns;
mod user_set;

pub use fair_queue::FairQueue;
pub use least_spent::{LeastSpent, QUEUED_ITEM_BYTES, QUEUED_OWNER_BYTES};
pub use owner_losses::OwnerLosses;
pub use party::{is_share_taken, largest_owner, may_be_mapped, owner_of_user, user_of_range};
pub use party_time::PartyTime;
pub use payer::Payer;
pub use rate::RateLimiter;
pub use shared_rate::SharedRate;
pub use shares::SharedLimit;
pub use turns::{Turns, first_in_turns};
pub use user_set::{USER_SET_BYTES, UserSet};
