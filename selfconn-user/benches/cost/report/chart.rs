//! The chart: the rates of connections and of `bind()` while each tool traces, relative to the rate without tracing.
//! SVG in colours for light and dark pages.

use std::fmt::Write as _;

use super::{CostRow, INSIDE, OUTSIDE, TargetOutcome};

const WIDTH: f64 = 640.0;
const BAR: f64 = 24.0;
const GAP: f64 = 12.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 48.0;
const HEADING: f64 = 28.0;
/// The labelled values of the axis.
const TICKS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// The groups that are shown, each below a heading.
const SECTIONS: [(&str, &str); 4] = [
    ("churn", "127.0.0.1 to 127.0.0.2"),
    (OUTSIDE, "127.0.0.1 to itself, a port outside the port range: nearly every service"),
    (INSIDE, "127.0.0.1 to itself, a port inside the port range"),
    ("bind", "calls of bind() a second: the other tools don't look at them"),
];

/// A line of the chart.
enum Line<'a> {
    Heading(&'a str),
    Bar { name: &'a str, value: f64, low: f64, high: f64 },
}

impl Line<'_> {
    fn height(&self) -> f64 {
        match self {
            Self::Heading(_) => HEADING,
            Self::Bar { .. } => BAR + GAP,
        }
    }
}

/// The chart of the rows that compare with the untraced rate on this host.
pub(crate) fn svg<'a>(rows: &'a [CostRow]) -> String {
    let bars_of = |group: &str| -> Vec<Line<'a>> {
        let shown = rows.iter().filter(|row| row.group == group && row.outcome != TargetOutcome::Skipped);
        let bar = |row: &'a CostRow| -> Option<Line<'a>> {
            let estimate = row.estimate?;
            let name = row.what.strip_suffix(", to untraced")?;
            Some(Line::Bar { name, value: estimate.value, low: estimate.low, high: estimate.high })
        };
        shown.filter_map(bar).collect()
    };
    let section = |(group, heading)| {
        let bars = bars_of(group);
        let heading = (!bars.is_empty()).then_some(Line::Heading(heading));
        heading.into_iter().chain(bars)
    };
    let lines: Vec<Line<'_>> = SECTIONS.into_iter().flat_map(section).collect();
    let height = TOP + lines.iter().map(Line::height).sum::<f64>() + 16.0;
    let full = lines.iter().fold(1.0, |full: f64, line| match line {
        Line::Bar { high, .. } => full.max(*high),
        Line::Heading(_) => full,
    });
    let x = |share: f64| LEFT + share / full * (WIDTH - LEFT - RIGHT);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#808080\">\n\
         <title>Connections and calls of bind() a second while each tool traces, to untraced</title>\n\
         <text x=\"{LEFT}\" y=\"20\" font-weight=\"bold\">connections a second, to untraced</text>\n"
    );
    for tick in TICKS {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"11\">{tick}</text>",
            x(tick),
            TOP - 10.0
        );
    }
    let mut y = TOP;
    for line in &lines {
        let top = y;
        y += line.height();
        let (name, value, low, high) = match line {
            Line::Heading(text) => {
                let _ = writeln!(out, "<text x=\"10\" y=\"{:.0}\">{text}</text>", top + HEADING - 8.0);
                continue;
            }
            Line::Bar { name, value, low, high } => (*name, *value, *low, *high),
        };
        let y = top;
        // The grid is drawn for each bar, so that it does not cross the headings.
        for at in TICKS.map(x) {
            let _ = writeln!(
                out,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.0}\" y2=\"{:.0}\" stroke=\"#808080\" \
                 stroke-opacity=\"0.4\"/>",
                y - GAP / 2.0,
                y + BAR + GAP / 2.0
            );
        }
        let middle = y + BAR / 2.0;
        let colour = if name == "selfconn" { "#2f81f7" } else { "#9aa4af" };
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"3\" fill=\"{colour}\"/>\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"#d29922\" \
             stroke-width=\"2\"/><text x=\"{:.1}\" y=\"{:.1}\">{value:.2}</text>",
            LEFT - 10.0,
            middle + 4.5,
            name.replace('_', " "),
            x(value) - LEFT,
            x(low),
            x(high),
            x(high) + 8.0,
            middle + 4.5,
        );
    }
    out.push_str("</svg>\n");
    out
}
