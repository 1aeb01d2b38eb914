//! The chart: the rate of connections while each tool traces, relative to the rate without tracing. SVG in
//! colours for light and dark pages.

use std::fmt::Write as _;

use super::{CostRow, TargetOutcome};

const WIDTH: f64 = 640.0;
const BAR: f64 = 24.0;
const GAP: f64 = 12.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 48.0;

/// The chart of the rows that compare with the untraced rate on this host.
pub(crate) fn svg(rows: &[CostRow]) -> String {
    let bars: Vec<(&str, f64, f64, f64)> = rows
        .iter()
        .filter(|row| row.group == "churn" && row.outcome != TargetOutcome::Skipped)
        .filter_map(|row| {
            let estimate = row.estimate?;
            Some((row.what.strip_suffix(", to untraced")?, estimate.value, estimate.low, estimate.high))
        })
        .collect();
    let height = TOP + bars.len() as f64 * (BAR + GAP) + 16.0;
    let full = bars.iter().map(|bar| bar.3).fold(1.0, f64::max);
    let x = |share: f64| LEFT + share / full * (WIDTH - LEFT - RIGHT);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#808080\">\n\
         <title>Connections a second while each tool traces, to untraced</title>\n\
         <text x=\"{LEFT}\" y=\"20\" font-weight=\"bold\">connections a second, to untraced</text>\n"
    );
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let at = x(tick);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.0}\" y2=\"{:.0}\" stroke=\"#808080\" \
             stroke-opacity=\"0.4\"/><text x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"11\">{tick}</text>",
            TOP - 6.0,
            height - 12.0,
            TOP - 10.0
        );
    }
    for (at, (name, value, low, high)) in bars.iter().enumerate() {
        let y = TOP + at as f64 * (BAR + GAP);
        let middle = y + BAR / 2.0;
        let colour = if *name == "selfconn" { "#2f81f7" } else { "#9aa4af" };
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"3\" fill=\"{colour}\"/>\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"#d29922\" \
             stroke-width=\"2\"/><text x=\"{:.1}\" y=\"{:.1}\">{value:.2}</text>",
            LEFT - 10.0,
            middle + 4.5,
            name.replace('_', " "),
            x(*value) - LEFT,
            x(*low),
            x(*high),
            x(*high) + 8.0,
            middle + 4.5,
        );
    }
    out.push_str("</svg>\n");
    out
}
