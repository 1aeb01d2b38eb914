// The alert rules and the dashboard as a jsonnet mixin. ../prometheus and ../grafana are their only source; this file
// replaces what differs between sites. docs/metrics.md shows how to use it. It needs jsonnet 0.18 (std.parseYaml).

local rules = std.parseYaml(importstr '../prometheus/selfconn.rules.yml');
local dashboard = import '../grafana/selfconn.json';

// As in the shipped files.
local shipped = {
  selector: 'job=~"(.+/)?selfconn"',
  runbook: 'docs/runbook.md',
};

{
  _config+:: {
    // Selects the targets of selfconn. It is inserted between {} in each expression.
    selfconnSelector: shipped.selector,
    // The address of the runbook. `#` and the name of the alert follow.
    runbookUrl: shipped.runbook,
  },

  prometheusAlerts+:: {
    groups+: [
      group {
        rules: [
          rule {
            expr: std.strReplace(rule.expr, shipped.selector, $._config.selfconnSelector),
            annotations+: {
              runbook_url: std.strReplace(super.runbook_url, shipped.runbook, $._config.runbookUrl),
            },
          }
          for rule in group.rules
        ],
      }
      for group in rules.groups
    ],
  },

  grafanaDashboards+:: {
    local selector = $._config.selfconnSelector,
    // The shipped dashboard shows every job that exports the metrics. With a selector of your own it shows those only.
    local narrow(query) =
      if selector == shipped.selector then query
      else std.strReplace(
        std.strReplace(query, 'job=~"$job"', 'job=~"$job",' + selector),
        '(selfconn_build_info,',
        '(selfconn_build_info{%s},' % selector
      ),
    'selfconn.json': dashboard {
      panels: [
        // A row has no targets.
        panel {
          [if 'targets' in panel then 'targets']: [target { expr: narrow(target.expr) } for target in panel.targets],
        }
        for panel in dashboard.panels
      ],
      templating+: {
        list: [variable { query: narrow(variable.query) } for variable in dashboard.templating.list],
      },
    },
  },
}
