//! Draws line and bar charts as SVG files that are readable on light and dark backgrounds.
//!
//! A style sheet in each file adapts the colours to the reader's colour scheme. The common chart
//! libraries do not support style sheets, so this module writes the SVG code itself. Series have
//! different dashes and markers as well as different colours.

use std::fmt::{self, Write as _};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
/// The borders of the data area: left, top, right and bottom.
const LEFT: f64 = 80.0;
const TOP: f64 = 68.0;
const RIGHT: f64 = WIDTH - 24.0;
const BOTTOM: f64 = HEIGHT - 84.0;
/// Number of styles for series; further series use the same styles again.
const STYLES: usize = 4;
/// Maximum number of points of a line that has markers.
const MARKED_POINTS_MAX: usize = 40;
/// Maximum number of powers of ten on a logarithmic axis that has further ticks between the powers
/// of ten.
const FEW_POWERS: f64 = 3.0;
/// Intended number of intervals between the ticks of a linear axis.
const INTERVALS: f64 = 5.0;

const STYLE: &str = "
svg { color-scheme: light dark; }
.background { fill: #ffffff; }
text { font: 13px system-ui, \"Segoe UI\", Roboto, \"DejaVu Sans\", sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: #d1d9e0; stroke-width: 1; }
.axis { stroke: #59636e; stroke-width: 1; }
.line { fill: none; stroke-width: 2; }
.c0 { stroke: #0550ae; } .f0 { fill: #0550ae; }
.c1 { stroke: #bc4c00; stroke-dasharray: 7 3; } .f1 { fill: #bc4c00; }
.c2 { stroke: #1a7f37; stroke-dasharray: 2 3; } .f2 { fill: #1a7f37; }
.c3 { stroke: #8250df; stroke-dasharray: 9 3 2 3; } .f3 { fill: #8250df; }
@media (prefers-color-scheme: dark) {
  .background { fill: #0d1117; }
  text { fill: #e6edf3; }
  .grid { stroke: #30363d; }
  .axis { stroke: #9198a1; }
  .c0 { stroke: #79c0ff; } .f0 { fill: #79c0ff; }
  .c1 { stroke: #ffa657; } .f1 { fill: #ffa657; }
  .c2 { stroke: #7ee787; } .f2 { fill: #7ee787; }
  .c3 { stroke: #d2a8ff; } .f3 { fill: #d2a8ff; }
}
";

/// The form in which a chart shows its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Lines,
    Bars,
}

/// An axis. The title of the axis contains the unit.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    title: &'static str,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// A linear axis that starts at 0.
    Linear,
    Logarithmic,
    Categories(Vec<String>),
}

impl Axis {
    pub(super) fn linear(title: &'static str) -> Self {
        let kind = Kind::Linear;
        Self { title, kind }
    }

    pub(super) fn logarithmic(title: &'static str) -> Self {
        let kind = Kind::Logarithmic;
        Self { title, kind }
    }

    /// An axis with a position for each name. A value on this axis is the number of a position,
    /// from 0.
    pub(super) fn categories(title: &'static str, names: impl Iterator<Item = String>) -> Self {
        let kind = Kind::Categories(names.collect());
        Self { title, kind }
    }
}

/// The points of one line, or the bars of one style.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

impl Series {
    /// A series with one value for each category.
    pub(super) fn of_categories(name: &str, values: impl Iterator<Item = f64>) -> Self {
        let points = values
            .enumerate()
            .map(|(place, value)| (index(place), value));
        Self {
            name: name.to_owned(),
            points: points.collect(),
        }
    }
}

/// A chart. `Display` writes the SVG file.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    pub(super) title: &'static str,
    /// The conditions of the measurement.
    pub(super) subtitle: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) mark: Mark,
    pub(super) series: Vec<Series>,
}

fn index(place: usize) -> f64 {
    f64::from(u32::try_from(place).unwrap_or(u32::MAX))
}

/// An axis with its range of values. The scale converts values to positions on the page.
struct Scale {
    kind: Kind,
    low: f64,
    high: f64,
    /// The positions of `low` and `high` on the page.
    page: (f64, f64),
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, page: (f64, f64)) -> Self {
        // A logarithmic axis cannot show zero.
        let is_shown = |value: &f64| {
            value.is_finite() && (*value > 0.0 || !matches!(axis.kind, Kind::Logarithmic))
        };
        let values: Vec<f64> = values.filter(is_shown).collect();
        let largest = values.iter().copied().fold(0.0, f64::max);
        let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let (low, high) = match &axis.kind {
            Kind::Linear => {
                let step = step(largest);
                (0.0, (largest / step).ceil().max(1.0) * step)
            }
            Kind::Logarithmic if values.is_empty() => (1.0, 10.0),
            Kind::Logarithmic => {
                let low = smallest.log10().floor();
                let high = largest.log10().ceil();
                (10_f64.powf(low), 10_f64.powf(high.max(low + 1.0)))
            }
            Kind::Categories(names) => (0.0, index(names.len().max(1))),
        };
        Self {
            kind: axis.kind.clone(),
            low,
            high,
            page,
        }
    }

    /// The position of a value on the page.
    fn at(&self, value: f64) -> f64 {
        let part = match self.kind {
            Kind::Logarithmic => {
                let value = value.max(self.low);
                (value / self.low).log10() / (self.high / self.low).log10()
            }
            Kind::Linear | Kind::Categories(_) => (value - self.low) / (self.high - self.low),
        };
        let (from, to) = self.page;
        from + (to - from) * part
    }

    /// Positions and labels of the ticks.
    fn ticks(&self) -> Vec<(f64, String)> {
        match &self.kind {
            Kind::Categories(names) => {
                let names = names.iter().enumerate();
                names
                    .map(|(place, name)| (self.at(index(place) + 0.5), name.clone()))
                    .collect()
            }
            Kind::Linear => {
                let step = step(self.high);
                let values = (0..=20).map(|number| f64::from(number) * step);
                values
                    .take_while(|value| *value <= self.high * 1.000_1)
                    .map(|value| (self.at(value), label(value)))
                    .collect()
            }
            Kind::Logarithmic => {
                let powers = (self.high / self.low).log10().round();
                // An axis with few powers of ten also has ticks at 2 and 5 times each power of ten.
                let factors: &[f64] = if powers > FEW_POWERS {
                    &[1.0]
                } else {
                    &[1.0, 2.0, 5.0]
                };
                let first = self.low.log10().round();
                let values = (0..=12).flat_map(|power| {
                    let power = 10_f64.powf(first + f64::from(power));
                    factors.iter().map(move |factor| factor * power)
                });
                values
                    .take_while(|value| *value <= self.high * 1.000_1)
                    .map(|value| (self.at(value), label(value)))
                    .collect()
            }
        }
    }
}

/// The distance between two ticks: 1, 2 or 5 times a power of ten.
fn step(largest: f64) -> f64 {
    if largest <= 0.0 {
        return 1.0;
    }
    let rough = largest / INTERVALS;
    let power = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let fitting = steps.into_iter().find(|step| *step >= rough * 0.999_9);
    fitting.unwrap_or(10.0 * power)
}

/// Formats a number without unnecessary zeros.
fn label(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

impl fmt::Display for Chart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Scale::new(&self.x, points().map(|point| point.0), (LEFT, RIGHT));
        let y = Scale::new(&self.y, points().map(|point| point.1), (BOTTOM, TOP));
        let (title, subtitle) = (escaped(self.title), escaped(&self.subtitle));
        writeln!(
            f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             role=\"img\" aria-label=\"{title}\">"
        )?;
        writeln!(f, "<title>{title}</title>\n<style>{STYLE}</style>")?;
        writeln!(
            f,
            "<rect class=\"background\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>"
        )?;
        writeln!(
            f,
            "<text class=\"title\" x=\"{LEFT}\" y=\"26\">{title}</text>\n<text x=\"{LEFT}\" y=\"46\">{subtitle}</text>"
        )?;
        self.axes(f, &x, &y)?;
        for (number, series) in self.series.iter().enumerate() {
            writeln!(
                f,
                "<g class=\"series\"><title>{}</title>",
                escaped(&series.name)
            )?;
            match self.mark {
                Mark::Lines => line(f, series, number % STYLES, &x, &y)?,
                Mark::Bars => bars(f, series, number, self.series.len(), &x, &y)?,
            }
            writeln!(f, "</g>")?;
        }
        self.legend(f)?;
        writeln!(f, "</svg>")
    }
}

impl Chart {
    fn axes(&self, f: &mut fmt::Formatter<'_>, x: &Scale, y: &Scale) -> fmt::Result {
        for (at, label) in y.ticks() {
            writeln!(
                f,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{RIGHT}\" y2=\"{at:.1}\"/>\n\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 8.0,
                at + 4.0
            )?;
        }
        for (at, label) in x.ticks() {
            writeln!(
                f,
                "<line class=\"axis\" x1=\"{at:.1}\" y1=\"{BOTTOM}\" x2=\"{at:.1}\" y2=\"{:.1}\"/>\n\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                BOTTOM + 5.0,
                BOTTOM + 20.0,
                escaped(&label)
            )?;
        }
        writeln!(
            f,
            "<path class=\"axis\" fill=\"none\" d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\"/>"
        )?;
        let (middle_x, middle_y) = (f64::midpoint(LEFT, RIGHT), f64::midpoint(TOP, BOTTOM));
        writeln!(
            f,
            "<text x=\"{middle_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(18 {middle_y:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            BOTTOM + 42.0,
            escaped(self.x.title),
            escaped(self.y.title)
        )
    }

    fn legend(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = (RIGHT - LEFT) / index(self.series.len().max(1));
        let y = HEIGHT - 18.0;
        for (number, series) in self.series.iter().enumerate() {
            let (style, x) = (number % STYLES, LEFT + width * index(number));
            match self.mark {
                Mark::Lines => writeln!(
                    f,
                    "<line class=\"line c{style}\" x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
                    y - 4.0,
                    x + 28.0,
                    y - 4.0
                )?,
                Mark::Bars => writeln!(
                    f,
                    "<rect class=\"f{style}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"28\" height=\"11\"/>",
                    y - 10.0
                )?,
            }
            let name = escaped(&series.name);
            writeln!(f, "<text x=\"{:.1}\" y=\"{y:.1}\">{name}</text>", x + 36.0)?;
        }
        Ok(())
    }
}

fn line(
    f: &mut fmt::Formatter<'_>,
    series: &Series,
    style: usize,
    x: &Scale,
    y: &Scale,
) -> fmt::Result {
    let mut path = String::new();
    for (number, (at_x, at_y)) in series.points.iter().enumerate() {
        let command = if number == 0 { 'M' } else { 'L' };
        write!(path, "{command}{:.1} {:.1}", x.at(*at_x), y.at(*at_y))?;
    }
    writeln!(f, "<path class=\"line c{style}\" d=\"{path}\"/>")?;
    if series.points.len() > MARKED_POINTS_MAX {
        return Ok(());
    }
    for (at_x, at_y) in &series.points {
        writeln!(
            f,
            "<circle class=\"f{style}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"/>",
            x.at(*at_x),
            y.at(*at_y)
        )?;
    }
    Ok(())
}

/// The bars of one series. In each category, the bars of all series are side by side.
fn bars(
    f: &mut fmt::Formatter<'_>,
    series: &Series,
    number: usize,
    count: usize,
    x: &Scale,
    y: &Scale,
) -> fmt::Result {
    // A fifth of the width of each category remains empty.
    let width = (x.at(1.0) - x.at(0.0)) * 0.8 / index(count.max(1));
    for (category, value) in &series.points {
        let left = x.at(category + 0.1) + width * index(number);
        let top = y.at(*value);
        writeln!(
            f,
            "<rect class=\"f{}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            number % STYLES,
            (width - 4.0).max(1.0),
            (BOTTOM - top).max(0.0),
            left + (width - 4.0) / 2.0,
            top - 5.0,
            label((value * 10.0).round() / 10.0)
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_and_reach_the_largest_value() {
        for (largest, expected) in [
            (0.97, 0.2),
            (1.0, 0.2),
            (37.0, 10.0),
            (1_941.0, 500.0),
            (0.0, 1.0),
        ] {
            assert!(
                (step(largest) - expected).abs() < 1e-9,
                "{largest}: {}",
                step(largest)
            );
            let axis = Axis::linear("x");
            let scale = Scale::new(&axis, [largest].into_iter(), (0.0, 100.0));
            assert!(scale.at(largest) <= 100.0 + 1e-9, "{largest}");
            let ticks = scale.ticks();
            assert!((2..=12).contains(&ticks.len()), "{ticks:?}");
        }
        assert_eq!(label(0.2), "0.2");
        assert_eq!(label(500.0), "500");
    }

    #[test]
    fn a_logarithmic_axis_has_a_tick_for_each_power_of_ten() {
        let values = [0.4, 0.0, 1_400.0];
        let scale = Scale::new(&Axis::logarithmic("ms"), values.into_iter(), (100.0, 0.0));
        let labels: Vec<String> = scale.ticks().into_iter().map(|tick| tick.1).collect();
        assert_eq!(labels, ["0.1", "1", "10", "100", "1000", "10000"]);
        assert!(scale.at(0.4) > scale.at(1_400.0));
        let scale = Scale::new(&Axis::logarithmic("ms"), [30.0].into_iter(), (100.0, 0.0));
        let labels: Vec<String> = scale.ticks().into_iter().map(|tick| tick.1).collect();
        assert_eq!(labels, ["10", "20", "50", "100"]);
    }

    #[test]
    fn a_chart_without_values_and_with_special_characters_is_still_a_chart() {
        let chart = Chart {
            title: "<a> & \"b\"",
            subtitle: String::new(),
            x: Axis::logarithmic("x"),
            y: Axis::linear("y"),
            mark: Mark::Lines,
            series: vec![Series {
                name: "none".to_owned(),
                points: Vec::new(),
            }],
        };
        let text = chart.to_string();
        assert!(text.contains("&lt;a&gt; &amp; &quot;b&quot;"), "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf\""), "{text}");
    }
}
