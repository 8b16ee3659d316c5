//! The figures that somebody else has too, as bars: everybody's value, a group for each figure.

use std::fmt::Write as _;

use super::super::figures::{Better, Figure, Report, digits};

const WIDTH: usize = 900;
const LEFT: usize = 190;
const ROW: usize = 16;
const GAP: usize = 14;

/// What a bar may be long.
const LONGEST: f64 = 480.0;

/// Draws it.
pub(super) fn draw(report: &Report) -> String {
    let groups = groups(&report.figures);
    let rows: usize = groups.iter().map(|group| group.bars.len()).sum();
    let height = 60 + rows * ROW + groups.len() * (GAP + ROW);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"13\">{}</text>\n",
        escape(&report.setting())
    );
    let mut y = 44;
    for group in groups {
        y += GAP;
        let better = if group.better == Better::Higher { "more" } else { "less" };
        let _ = writeln!(
            text,
            "<text x=\"16\" y=\"{}\" font-weight=\"bold\">{} ({}, {better} is better)</text>",
            y + 2,
            group.name,
            group.unit
        );
        y += ROW;
        let most = group.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        for (name, value) in group.bars {
            let length = (value / most * LONGEST).max(1.0);
            let color = if name == OURS { "#1f6f43" } else { "#9aa5b1" };
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{LEFT}\" y=\"{}\" width=\"{length:.1}\" height=\"11\" fill=\"{color}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text>",
                LEFT - 8,
                y + 2,
                y - 8,
                LEFT as f64 + length + 6.0,
                y + 2,
                digits(value)
            );
            y += ROW;
        }
    }
    text.push_str("</svg>\n");
    text
}

const OURS: &str = "meshd";

struct Group<'a> {
    name: &'a str,
    unit: &'static str,
    better: Better,
    bars: Vec<(&'static str, f64)>,
}

/// Figures come sorted by name already.
fn groups(figures: &[Figure]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for figure in figures {
        let (Some(peer), Some(value)) = (figure.peer, figure.peer_value) else { continue };
        if groups.last().is_none_or(|group| group.name != figure.name) {
            groups.push(Group {
                name: &figure.name,
                unit: figure.unit,
                better: figure.better,
                bars: vec![(OURS, figure.value)],
            });
        }
        if let Some(group) = groups.last_mut() {
            group.bars.push((peer, value));
        }
    }
    groups
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::super::figures::Target;
    use super::*;

    #[test]
    fn everybody_has_a_bar_in_the_figures_group() {
        let what = ("tcp", "Gbit/s", Better::Higher);
        let figures = [("a", 1.0), ("b", 2.0)].map(|(peer, value)| {
            Figure::beside(what, &[4.0], Some((peer, &[value])), Target::NONE)
        });
        let svg = draw(&Report::new(1, figures.to_vec()));
        assert_eq!(svg.matches("<rect").count(), 1 + 3, "{svg}");
        assert_eq!(svg.matches("font-weight").count(), 1, "{svg}");
        assert!(svg.ends_with("</svg>\n"));
    }
}
