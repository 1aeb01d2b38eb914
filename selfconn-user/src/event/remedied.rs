//! `remedied`: what `--remedy` did about a self-connection, or would have done.

use serde::Serialize;

use super::Subject;

/// `remedied`.
#[derive(Debug, Serialize)]
pub struct Remedied {
    /// Whose.
    #[serde(flatten)]
    pub subject: Subject,
    /// `dry-run` or `destroy`.
    pub mode: &'static str,
    /// What came of it.
    pub result: &'static str,
    /// The reason, where the result alone doesn't tell.
    pub why: Option<String>,
    /// Whether a server can bind the port at once.
    pub port_freed: Option<bool>,
}
