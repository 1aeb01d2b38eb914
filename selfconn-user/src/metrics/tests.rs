use super::*;

/// Everything known.
pub(super) fn full() -> Numbers {
    Numbers {
        connections: Connections { ephemeral: 3, bound: 2, unknown: 1 },
        connections_open: 4,
        refused_self_dials: Some(5),
        ports_at_risk: Some(6),
        blocked_binds: Some(7),
        remedies: vec![("destroyed", 8), ("failed", 9)],
        lost: Losses { ring: 10, missed: 11, log: 12, stdout: 16, dials: 17, journal: 18, hooks: 21 },
        self_tests: vec![("passed", 19), ("failed", 20)],
        transitions_not_examined: Some(13),
        openers_not_remembered: 14,
        log_write_errors: 15,
        hooks: vec![("inet_sock_set_state", "tp_btf"), ("tcp_set_state", "kprobe")],
        ailments: Vec::new(),
    }
}

#[test]
fn every_number_is_told_where_it_belongs() {
    let text = full().text();
    for line in [
        "selfconn_connections_total{cause=\"ephemeral\"} 3",
        "selfconn_connections_total{cause=\"bound\"} 2",
        "selfconn_connections_total{cause=\"unknown\"} 1",
        "selfconn_connections_open 4",
        "selfconn_refused_self_dials_total 5",
        "selfconn_ports_at_risk 6",
        "selfconn_blocked_binds_total 7",
        "selfconn_remedies_total{result=\"destroyed\"} 8",
        "selfconn_remedies_total{result=\"failed\"} 9",
        "selfconn_events_lost_total{where=\"ring\"} 10",
        "selfconn_events_lost_total{where=\"missed\"} 11",
        "selfconn_events_lost_total{where=\"log\"} 12",
        "selfconn_events_lost_total{where=\"stdout\"} 16",
        "selfconn_events_lost_total{where=\"journal\"} 18",
        "selfconn_events_lost_total{where=\"dials\"} 17",
        "selfconn_events_lost_total{where=\"hooks\"} 21",
        "selfconn_self_tests_total{result=\"passed\"} 19",
        "selfconn_self_tests_total{result=\"failed\"} 20",
        "selfconn_transitions_not_examined_total 13",
        "selfconn_openers_not_remembered_total 14",
        "selfconn_log_write_errors_total 15",
        "selfconn_healthy 1",
        "selfconn_hook_info{hook=\"inet_sock_set_state\",method=\"tp_btf\"} 1",
        "selfconn_hook_info{hook=\"tcp_set_state\",method=\"kprobe\"} 1",
        concat!("selfconn_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ] {
        assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
    }
}

#[test]
fn what_is_unknown_is_not_told_as_zero() {
    let text = Numbers { ailments: vec!["hooks: none is attached"], ..Numbers::default() }.text();
    for name in ["transitions_not_examined", "remedies", "self_tests", "hook_info", "ports_at_risk"] {
        assert!(!text.contains(name), "{name} is in\n{text}");
    }
    // And what nothing happened to is zero from the start, so that its first time is a rise.
    assert!(text.contains("selfconn_events_lost_total{where=\"ring\"} 0\n"), "{text}");
    assert!(text.contains("selfconn_healthy 0\n"), "{text}");
}

/// Every word of a text that has one of our prefixes.
fn named(text: &str) -> Vec<&str> {
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_in_name(c))
        .filter(|word| word.starts_with("selfconn_") || word.starts_with("process_"))
        .collect()
}

fn packaged(file: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn rules_and_dashboard_name_only_what_is_exported() {
    let text = full().text();
    let exported: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(exported.contains(&"selfconn_connections_open"), "{exported:?}");
    let dashboard: serde_json::Value =
        serde_json::from_str(&packaged("packaging/grafana/selfconn.json")).unwrap();
    let mut expressions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            expressions.push(target["expr"].as_str().unwrap().to_owned());
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        expressions.push(variable["query"].as_str().unwrap().replace("prometheus", "process_threads"));
    }
    assert!(expressions.len() > 16, "{expressions:?}");
    let rules = packaged("packaging/prometheus/selfconn.rules.yml");
    let rules = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).map(str::to_owned);
    let before = expressions.len();
    expressions.extend(rules);
    assert!(expressions.len() > before + 8, "the rules have expressions");
    for expression in &expressions {
        let named = named(expression);
        assert!(!named.is_empty() || expression.starts_with("up{"), "{expression}");
        for name in named {
            assert!(exported.contains(&name), "{name} of {expression} is not exported");
        }
    }
    // And nothing is exported that nobody looks at.
    let all = expressions.join(" ") + &packaged("packaging/grafana/selfconn.json");
    for name in exported.iter().filter(|name| name.starts_with("selfconn_")) {
        assert!(named(&all).contains(name), "{name} is in no rule and on no dashboard");
    }
}

#[test]
fn each_alert_has_a_section_in_the_runbook() {
    let rules = packaged("packaging/prometheus/selfconn.rules.yml");
    let runbook = packaged("docs/runbook.md");
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 8, "{alerts:?}");
    for alert in &alerts {
        assert!(runbook.lines().any(|line| line == format!("## {alert}")), "{alert} has no section");
        let anchor = format!("runbook_url: docs/runbook.md#{}", alert.to_ascii_lowercase());
        assert!(rules.lines().any(|line| line.trim() == anchor), "{anchor}");
    }
    for section in runbook.lines().filter_map(|line| line.strip_prefix("## ")) {
        assert!(alerts.contains(&section), "{section} is about no alert");
    }
}
