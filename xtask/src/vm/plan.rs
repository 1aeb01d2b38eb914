//! What the guest is told to do and the words in which it answers. Both sides compile this file, so that neither can
//! speak a language the other has forgotten.

use serde::{Deserialize, Serialize};

/// Where the plan lies in the initramfs.
pub(crate) const PATH: &str = "/plan.json";

/// How the lines begin that the guest itself prints; the others are the tests'.
pub(crate) const VOICE: &str = "selfconn-guest: ";

/// How a line begins that states a fact about this kernel, `FACT key=value`; the report collects them.
pub(crate) const FACT: &str = "FACT ";

/// Said at the deadline, before what then runs is told.
pub(crate) const DEADLINE: &str = "selfconn-guest: the deadline";

/// The guest's last line.
pub(crate) const fn verdict(passed: bool) -> &'static str {
    if passed { "selfconn-guest: all passed" } else { "selfconn-guest: not all passed" }
}

/// What the guest does, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Module files to load, each after those it depends on.
    pub(crate) modules: Vec<String>,
    /// The environment of what is run.
    pub(crate) env: Vec<(String, String)>,
    /// The programs to run, one after another.
    pub(crate) runs: Vec<Run>,
    /// After so long the guest tells what it hangs in and powers off.
    pub(crate) deadline_s: u64,
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// As it is called in the guest's lines.
    pub(crate) name: String,
    /// Its file in the guest.
    pub(crate) program: String,
    /// Its arguments.
    pub(crate) args: Vec<String>,
    /// What its environment has beside the plan's.
    pub(crate) env: Vec<(String, String)>,
}
