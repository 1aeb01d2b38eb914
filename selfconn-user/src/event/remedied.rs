//! The event `remedied`: the action of `--remedy` on a self-connection, or the action that a dry run skipped.

use serde::Serialize;

use super::ConnectionFields;

/// `remedied`.
#[derive(Debug, Serialize)]
pub struct Remedied {
    /// The self-connection.
    #[serde(flatten)]
    pub connection: ConnectionFields,
    /// `dry-run` or `destroy`.
    pub mode: &'static str,
    /// Outcome of the remedy, such as `destroyed` or `would_destroy`.
    pub result: &'static str,
    /// Reason of the result, if the result alone does not explain it.
    pub why: Option<String>,
    /// True if a server can bind the port immediately.
    pub port_freed: Option<bool>,
}
