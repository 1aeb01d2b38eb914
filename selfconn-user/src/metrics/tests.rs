use super::*;
use crate::event::LossCause;

mod dashboard;

/// A snapshot in which every value is known.
pub(super) fn full() -> MetricsSnapshot {
    MetricsSnapshot {
        connections: ConnectionCounts { ephemeral: 3, bound: 2, unknown: 1 },
        connections_open: 4,
        refused_self_dials: Some(5),
        ports_at_risk: Some(6),
        blocked_binds: Some(7),
        remedies: vec![("destroyed", 8), ("failed", 9)],
        lost: Losses::from([
            (LossCause::Ring, 10),
            (LossCause::Missed, 11),
            (LossCause::Log, 12),
            (LossCause::Stdout, 16),
            (LossCause::RefusedTable, 17),
            (LossCause::Journal, 18),
            (LossCause::Hooks, 21),
            (LossCause::OpenerTable, 14),
            (LossCause::Lookups, 22),
            (LossCause::Suppressed, 24),
            (LossCause::Binds, 25),
            (LossCause::Untracked, 26),
        ]),
        prevented: vec![("refuse", 27)],
        guarded_namespaces: Some(28),
        unguarded_namespaces: Some(29),
        guard_failures: Some(30),
        self_tests: vec![("passed", 19), ("failed", 20)],
        transitions_not_examined: Some(13),
        binds_not_examined: Some(31),
        lookups_abandoned: 23,
        log_write_errors: 15,
        hooks: vec![("inet_sock_set_state", "tp_btf"), ("tcp_set_state", "kprobe")],
        health_problems: Vec::new(),
    }
}

#[test]
fn every_value_is_exported_under_its_name() {
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
        "selfconn_events_lost_total{where=\"refused_table\"} 17",
        "selfconn_events_lost_total{where=\"hooks\"} 21",
        "selfconn_events_lost_total{where=\"suppressed\"} 24",
        "selfconn_events_lost_total{where=\"binds\"} 25",
        "selfconn_events_suppressed_total 24",
        "selfconn_events_lost_total{where=\"untracked\"} 26",
        "selfconn_prevented_total{mode=\"refuse\"} 27",
        "selfconn_guarded_namespaces 28",
        "selfconn_unguarded_namespaces 29",
        "selfconn_guard_failures_total 30",
        "selfconn_self_tests_total{result=\"passed\"} 19",
        "selfconn_self_tests_total{result=\"failed\"} 20",
        "selfconn_transitions_not_examined_total 13",
        "selfconn_binds_not_examined_total 31",
        "selfconn_facts_lost_total{where=\"opener_table\"} 14",
        "selfconn_facts_lost_total{where=\"lookups\"} 22",
        "selfconn_lookups_abandoned_total 23",
        "selfconn_log_write_errors_total 15",
        "selfconn_healthy 1",
        "selfconn_hook_info{hook=\"inet_sock_set_state\",method=\"tp_btf\"} 1",
        "selfconn_hook_info{hook=\"tcp_set_state\",method=\"kprobe\"} 1",
        concat!("selfconn_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ] {
        assert!(text.lines().any(|exported| exported == line), "{line} is not in\n{text}");
    }
}

#[test]
fn an_unknown_value_is_not_exported_as_zero() {
    let text = MetricsSnapshot {
        health_problems: vec!["hooks: none is attached".to_owned()],
        ..MetricsSnapshot::default()
    }
    .text();
    for name in ["transitions_not_examined", "remedies", "self_tests", "hook_info", "ports_at_risk"] {
        assert!(!text.contains(name), "{name} is in\n{text}");
    }
    // Counters are zero from the start, so that their first increment is visible as an increase.
    assert!(text.contains("selfconn_events_lost_total{where=\"ring\"} 0\n"), "{text}");
    assert!(text.contains("selfconn_healthy 0\n"), "{text}");
}

/// All words of a text with one of our metric prefixes.
fn metric_names(text: &str) -> Vec<&str> {
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_in_name(c))
        .filter(|word| word.starts_with("selfconn_") || word.starts_with("process_"))
        .collect()
}

fn read_repository_file(file: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The expressions of the alert rules. A folded expression is one line.
fn rule_expressions() -> Vec<String> {
    let rules = read_repository_file("packaging/prometheus/selfconn.rules.yml");
    let mut expressions = Vec::new();
    let mut lines = rules.lines();
    while let Some(line) = lines.next() {
        match line.trim().strip_prefix("expr: ") {
            Some(">-") => {
                let folded = lines.by_ref().take_while(|line| line.starts_with("          "));
                expressions.push(folded.map(str::trim).collect::<Vec<_>>().join(" "));
            }
            Some(expression) => expressions.push(expression.to_owned()),
            None => {}
        }
    }
    expressions
}

/// The selectors of a PromQL expression: each name of a metric, with the matchers in braces after it.
fn selectors(expression: &str) -> Vec<(&str, &str)> {
    let mut selectors = Vec::new();
    for name in metric_names(expression).into_iter().chain(["up"]) {
        for (at, _) in expression.match_indices(name) {
            let is_whole = |c: Option<char>| !c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
            let rest = &expression[at + name.len()..];
            if is_whole(expression[..at].chars().next_back()) && is_whole(rest.chars().next()) {
                let matchers = rest.strip_prefix('{').and_then(|rest| rest.split('}').next());
                selectors.push((name, matchers.unwrap_or_default()));
            }
        }
    }
    selectors
}

/// The mixin replaces this text.
#[test]
fn each_alert_selects_the_jobs_of_selfconn() {
    let expressions = rule_expressions();
    assert!(expressions.iter().any(|expression| selectors(expression).len() > 1), "{expressions:?}");
    for expression in expressions {
        let selectors = selectors(&expression);
        assert!(!selectors.is_empty(), "{expression}");
        for (name, matchers) in selectors {
            let matchers = matchers.strip_prefix(r#"job=~"(.+/)?selfconn""#);
            assert!(
                matchers.is_some_and(|rest| rest.is_empty() || rest.starts_with(',')),
                "{name} of {expression}"
            );
        }
    }
}

#[test]
fn rules_and_dashboard_name_only_what_is_exported() {
    let text = full().text();
    let exported: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(exported.contains(&"selfconn_connections_open"), "{exported:?}");
    let dashboard: serde_json::Value =
        serde_json::from_str(&read_repository_file("packaging/grafana/selfconn.json")).unwrap();
    let mut expressions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        // A row has no targets.
        for target in panel["targets"].as_array().into_iter().flatten() {
            expressions.push(target["expr"].as_str().unwrap().to_owned());
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        expressions.push(variable["query"].as_str().unwrap().replace("prometheus", "process_threads"));
    }
    assert!(expressions.len() > 16, "{expressions:?}");
    let before = expressions.len();
    expressions.extend(rule_expressions());
    assert!(expressions.len() > before + 8, "the rules have expressions");
    for expression in &expressions {
        let names = metric_names(expression);
        assert!(!names.is_empty() || expression.contains("up{"), "{expression}");
        for name in names {
            assert!(exported.contains(&name), "{name} of {expression} is not exported");
        }
    }
    // Every exported metric is used in a rule or on the dashboard.
    let all = expressions.join(" ") + &read_repository_file("packaging/grafana/selfconn.json");
    for name in exported.iter().filter(|name| name.starts_with("selfconn_")) {
        assert!(metric_names(&all).contains(name), "{name} is in no rule and on no dashboard");
    }
}

#[test]
fn each_alert_has_a_section_in_the_runbook() {
    let rules = read_repository_file("packaging/prometheus/selfconn.rules.yml");
    let runbook = read_repository_file("docs/runbook.md");
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
