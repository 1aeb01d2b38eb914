//! The rules that the dashboard keeps. Most are those of Grafana's dashboard-linter: the data source is a variable, job
//! and instance are variables that each query uses, a rate has Grafana's interval, each panel explains itself. The
//! others make it work for a fleet: no panel draws a series for each host, and "All" means the hosts of selfconn.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{read_repository_file, selectors};

const DATASOURCE: &str = "${datasource}";

/// Units of Grafana that fit our metrics.
const UNITS: [&str; 5] = ["short", "cps", "bytes", "percentunit", "s"];

/// Ranges of a range selector. The first is for a rate; both are for an increase.
const RANGES: [&str; 2] = ["$__rate_interval", "$__range"];

fn shipped() -> Value {
    serde_json::from_str(&read_repository_file("packaging/grafana/selfconn.json")).unwrap()
}

/// The broken rules of a dashboard. Each begins with the name of the rule.
fn violations(dashboard: &Value) -> Vec<String> {
    let mut violations = Vec::new();
    if dashboard["editable"] != false {
        violations.push("editable: changes belong into the file".to_owned());
    }
    check_variables(&dashboard["templating"]["list"], &mut violations);
    let mut titles = HashSet::new();
    let mut ids = HashSet::new();
    let mut cells = HashSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap_or_default();
        if title.is_empty() || !titles.insert(title) {
            violations.push(format!("title: '{title}' of {} is empty or is another panel's", panel["id"]));
        }
        if !ids.insert(panel["id"].as_u64()) {
            violations.push(format!("id: {title}"));
        }
        let place = |name| panel["gridPos"][name].as_u64().unwrap_or_default();
        let rows = place("y")..place("y") + place("h");
        let mut own = rows.flat_map(|y| (place("x")..place("x") + place("w")).map(move |x| (x, y)));
        if !own.all(|(x, y)| x < 24 && cells.insert((x, y))) {
            violations.push(format!("place: {title} is outside, or covers another panel"));
        }
        if panel["type"] != "row" {
            check_panel(panel, &mut violations);
        }
    }
    violations
}

fn check_variables(list: &Value, violations: &mut Vec<String>) {
    let list = list.as_array().unwrap();
    let find = |name: &str| list.iter().find(|variable| variable["name"] == name).unwrap_or(&Value::Null);
    let wanted = json!({ "type": "datasource", "query": "prometheus", "label": "Data source" });
    check_fields("variable datasource", find("datasource"), &wanted, violations);
    for (name, label) in [("job", "Job"), ("instance", "Instance")] {
        let wanted = json!({
            "type": "query", "label": label, "multi": true, "includeAll": true, "allValue": ".+",
            // On a change of the time range.
            "refresh": 2,
            "datasource": { "type": "prometheus", "uid": DATASOURCE },
        });
        check_fields(&format!("variable {name}"), find(name), &wanted, violations);
    }
    for (name, query) in [
        ("job", "label_values(selfconn_build_info, job)"),
        ("instance", r#"label_values(selfconn_build_info{job=~"$job"}, instance)"#),
    ] {
        if find(name)["query"] != query {
            violations.push(format!("variable {name}: query is {}", find(name)["query"]));
        }
    }
}

fn check_fields(what: &str, found: &Value, wanted: &Value, violations: &mut Vec<String>) {
    for (name, wanted) in wanted.as_object().unwrap() {
        if found[name] != *wanted {
            violations.push(format!("{what}: {name} is {}, and not {wanted}", found[name]));
        }
    }
}

fn check_panel(panel: &Value, violations: &mut Vec<String>) {
    let title = panel["title"].as_str().unwrap_or_default();
    let mut broken = |rule: &str, what: &str| violations.push(format!("{rule}: {title}: {what}"));
    if panel["description"].as_str().unwrap_or_default().is_empty() {
        broken("description", "is empty");
    }
    let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap_or_default();
    if !UNITS.contains(&unit) {
        broken("unit", unit);
    }
    if panel["datasource"]["uid"] != DATASOURCE {
        broken("datasource", "of the panel");
    }
    let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
    if targets.is_empty() {
        broken("targets", "there is none");
    }
    for target in targets {
        if target["datasource"]["uid"] != DATASOURCE {
            broken("datasource", "of a target");
        }
        let expression = target["expr"].as_str().unwrap_or_default();
        for rule in broken_by_expression(expression) {
            broken(rule, expression);
        }
    }
}

/// The rules that an expression breaks.
fn broken_by_expression(expression: &str) -> Vec<&'static str> {
    let mut broken = Vec::new();
    let selectors = selectors(expression);
    let all_have =
        |matcher| selectors.iter().all(|(_, matchers)| matchers.split(',').any(|has| has == matcher));
    if selectors.is_empty() || !all_have(r#"job=~"$job""#) {
        broken.push("job");
    }
    if selectors.is_empty() || !all_have(r#"instance=~"$instance""#) {
        broken.push("instance");
    }
    for (at, _) in expression.match_indices('[') {
        let range = expression[at + 1..].split(']').next().unwrap_or_default();
        let is_rate =
            expression[..at].rsplit_once('(').is_some_and(|(function, _)| function.ends_with("rate"));
        if !RANGES.contains(&range) || is_rate && range != RANGES[0] {
            broken.push("range");
        }
    }
    for (at, _) in expression.match_indices("_total") {
        let begin =
            expression[..at].rfind(|c: char| !c.is_ascii_alphanumeric() && c != '_').map_or(0, |at| at + 1);
        let is_in_function =
            ["rate(", "increase("].iter().any(|function| expression[..begin].ends_with(function));
        let is_range = expression[at..].split_once('}').is_some_and(|(_, rest)| rest.starts_with('['));
        if !is_in_function || !is_range {
            broken.push("counter");
        }
    }
    // Every scrape job has these.
    let is_of_any_job = |(name, _): &(&str, &str)| *name == "up" || name.starts_with("process_");
    let is_of_ours =
        expression.contains(" and on (job, instance) ") && expression.contains("selfconn_build_info{");
    if selectors.iter().any(is_of_any_job) && !is_of_ours {
        broken.push("ours");
    }
    // A line for each host of a fleet can't be read.
    let is_top = expression.starts_with("topk(10, ") || expression.starts_with("bottomk(10, ");
    let is_total = expression.starts_with("sum") || expression.starts_with("count");
    let labels =
        expression.split_once(" by (").and_then(|(_, rest)| rest.split(')').next()).unwrap_or_default();
    if !is_top && (!is_total || labels.contains("instance")) {
        broken.push("fleet");
    }
    broken
}

#[test]
fn the_dashboard_keeps_the_rules() {
    assert_eq!(violations(&shipped()), [""; 0]);
}

#[test]
fn a_fleet_has_its_top_hosts() {
    let dashboard = shipped();
    for metric in ["selfconn_connections_total", "selfconn_connections_open"] {
        let is_top = |panel: &&Value| {
            let expression = panel["targets"][0]["expr"].as_str().unwrap_or_default();
            panel["type"] == "table" && expression.starts_with("topk(") && expression.contains(metric)
        };
        assert!(dashboard["panels"].as_array().unwrap().iter().any(|panel| is_top(&panel)), "{metric}");
    }
}

/// Replaces a text in the first expression that contains it.
fn edit_expression(dashboard: &mut Value, from: &str, to: &str) {
    let panels = dashboard["panels"].as_array_mut().unwrap();
    let targets = panels.iter_mut().filter_map(|panel| panel["targets"].as_array_mut()).flatten();
    let expression =
        targets.map(|target| &mut target["expr"]).find(|expr| expr.as_str().unwrap().contains(from));
    let expression = expression.unwrap_or_else(|| panic!("{from} is in no expression"));
    *expression = expression.as_str().unwrap().replacen(from, to, 1).into();
}

/// Breaks a dashboard.
type Edit = Box<dyn Fn(&mut Value)>;

#[test]
fn each_rule_finds_what_breaks_it() {
    // `{*}` stands for the matchers that each selector has.
    let edit = |from: &'static str, to: &'static str| -> Edit {
        let [from, to] = [from, to].map(|text| text.replace("{*}", r#"{job=~"$job",instance=~"$instance"}"#));
        Box::new(move |dashboard| edit_expression(dashboard, &from, &to))
    };
    let set = |pointer: &'static str, value: Value| -> Edit {
        Box::new(move |dashboard| {
            *dashboard.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value.clone();
        })
    };
    // The first panel is a row.
    let rows: [(&str, Edit); 41] = [
        ("editable", set("/editable", json!(true))),
        ("variable datasource", set("/templating/list/0/name", json!("prometheus"))),
        ("variable datasource", set("/templating/list/0/type", json!("constant"))),
        ("variable datasource", set("/templating/list/0/query", json!("loki"))),
        ("variable datasource", set("/templating/list/0/label", json!(""))),
        ("variable job", set("/templating/list/1/name", json!("service"))),
        ("variable job", set("/templating/list/1/type", json!("custom"))),
        ("variable job", set("/templating/list/1/multi", json!(false))),
        ("variable job", set("/templating/list/1/includeAll", json!(false))),
        ("variable job", set("/templating/list/1/allValue", json!(".*"))),
        ("variable job", set("/templating/list/1/refresh", json!(1))),
        ("variable job", set("/templating/list/1/datasource/uid", json!("abc"))),
        ("variable job", set("/templating/list/1/label", json!("job"))),
        ("variable job", set("/templating/list/1/query", json!("label_values(job)"))),
        ("variable instance", set("/templating/list/2/name", json!("host"))),
        ("variable instance", set("/templating/list/2/multi", json!(false))),
        ("variable instance", set("/templating/list/2/allValue", json!(null))),
        (
            "variable instance",
            set("/templating/list/2/query", json!("label_values(selfconn_build_info, instance)")),
        ),
        ("title", set("/panels/1/title", json!(""))),
        ("title", set("/panels/1/title", shipped()["panels"][2]["title"].clone())),
        ("id", set("/panels/1/id", shipped()["panels"][2]["id"].clone())),
        ("place", set("/panels/1/gridPos/w", json!(4))),
        ("place", set("/panels/8/gridPos/w", json!(4))),
        ("description", set("/panels/1/description", json!(""))),
        ("unit", set("/panels/1/fieldConfig/defaults/unit", json!("shorts"))),
        ("unit", set("/panels/1/fieldConfig", json!({}))),
        ("datasource", set("/panels/1/datasource/uid", json!("abc"))),
        ("datasource", set("/panels/1/targets/0/datasource", json!(null))),
        ("targets", set("/panels/1/targets", json!([]))),
        ("job", edit(r#"job=~"$job","#, "")),
        ("job", edit(r#"job=~"$job""#, r#"job="$job""#)),
        ("job", edit(" == 0 and on", " == selfconn_healthy and on")),
        ("instance", edit(r#",instance=~"$instance""#, "")),
        ("instance", edit("{*}", "")),
        ("range", edit("[$__rate_interval]", "[5m]")),
        ("range", edit("rate(selfconn_refused_self_dials_total{*}[$__rate_interval]", "rate(x{*}[$__range]")),
        (
            "counter",
            edit("increase(selfconn_connections_total{*}[$__range])", "selfconn_connections_total{*}"),
        ),
        ("counter", edit("increase(", "max_over_time(")),
        ("ours", edit(" and on (job, instance) selfconn_build_info{*}", "")),
        (
            "fleet",
            edit(
                "topk(10, sum by (job, instance) (selfconn_connections_open{*}))",
                "selfconn_connections_open{*}",
            ),
        ),
        ("fleet", edit("sum by (cause)", "sum by (instance, cause)")),
    ];
    for (at, (rule, break_it)) in rows.iter().enumerate() {
        let mut dashboard = shipped();
        break_it(&mut dashboard);
        let violations = violations(&dashboard);
        let finds = |violation: &String| violation.starts_with(&format!("{rule}: "));
        assert!(violations.iter().any(finds), "row {at}: {rule} is not broken: {violations:?}");
    }
}
