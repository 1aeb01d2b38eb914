//! The ways in which the daemon sees failed binds on this kernel.

use serde_json::Value;

use super::daemon::{HookVariant, TestDaemon, doctor};

/// The bind methods that `doctor` says can be attached here. If there is none, `started` must say why.
pub(crate) fn bind_methods() -> Vec<&'static str> {
    let is_ok = |name: &&str| {
        let mut entries = doctor()["binds"].as_array().unwrap().iter();
        entries.any(|entry| entry["method"] == *name && entry["verdict"] == "ok")
    };
    let methods: Vec<_> = ["fexit", "perf"].into_iter().filter(is_ok).collect();
    println!("FACT binds methods={methods:?}");
    if methods.is_empty() {
        let (events, _) = TestDaemon::start(&HookVariant(vec![]), &[]).stop();
        assert_eq!(events[0]["binds"]["method"], Value::Null);
        let refused = events[0]["binds"]["refused"].as_array().unwrap();
        assert!(
            refused.len() == 2 && refused.iter().all(|refused| refused["why"].is_string()),
            "{refused:?}"
        );
    }
    methods
}

/// Starts a daemon that sees failed binds by this method.
pub(crate) fn start(method: &str, options: &[&str]) -> TestDaemon {
    let options: Vec<_> = ["--bind-method", method].into_iter().chain(options.iter().copied()).collect();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    let started = daemon.expect(1, |event| event["event"] == "started").remove(0);
    assert_eq!(started["binds"]["method"], method, "{started}");
    daemon
}
