//! Pages of the documentation that are written from figures.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::figures::{Figure, Of, Report, digits};

/// Stands before the second section of a page.
const MARK: &str = "<!-- the relay -->\n";

/// Which part of a page is written; the other stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    First,
    Second,
}

/// Writes one section of the page at `path`.
pub(super) fn put(path: &Path, section: Section, text: &str) -> Result<()> {
    // A page that is not there yet has no other section.
    let before = fs::read_to_string(path).unwrap_or_default();
    fs::write(path, replaced(&before, section, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn replaced(page: &str, section: Section, text: &str) -> String {
    let (first, second) =
        page.split_once(MARK).map_or((page, None), |(first, second)| (first, Some(second)));
    let (first, second) = match section {
        Section::First => (text, second),
        Section::Second => (first, Some(text)),
    };
    let first = first.trim_end();
    second.map_or_else(|| format!("{first}\n"), |second| format!("{first}\n\n{MARK}{second}"))
}

/// All figures as a table, and what is missing in it.
pub(super) fn table(text: &mut String, ours: &str, report: &Report) {
    let _ =
        writeln!(text, "| figure | unit | {ours} | beside | its value | ratio | must | aim | |");
    text.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for figure in &report.figures {
        row(text, figure);
    }
    if !report.left_out.is_empty() {
        text.push_str("\nNot measured here:\n\n");
        for line in &report.left_out {
            let _ = writeln!(text, "- {line}");
        }
    }
}

fn row(text: &mut String, figure: &Figure) {
    let with_spread = |value: f64, [low, high]: [f64; 2]| {
        format!("{} ({}–{})", digits(value), digits(low), digits(high))
    };
    let theirs = figure.peer_value.zip(figure.spread.peer);
    let bound = |value: Option<f64>| match (value, figure.must_of) {
        (Some(value), Of::Ratio) => format!("{value} ×"),
        (Some(value), Of::Value) => format!("{value} {}", figure.unit),
        (None, _) => String::new(),
    };
    let verdict = match (figure.must, figure.ok) {
        (None, _) => "",
        (_, true) => "ok",
        (_, false) => "**missed**",
    };
    let _ = writeln!(
        text,
        "| {} | {} | {} | {} | {} | {} | {} | {} | {verdict} |",
        figure.name,
        figure.unit,
        with_spread(figure.value, figure.spread.ours),
        figure.peer.unwrap_or_default(),
        theirs.map_or_else(String::new, |(value, spread)| with_spread(value, spread)),
        figure.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
        bound(figure.must),
        bound(figure.aim),
    );
}

/// One section of the documentation's page of figures, as it is in the repository.
#[cfg(test)]
pub(super) fn written(section: Section) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/performance.md");
    let page = fs::read_to_string(path).unwrap_or_default();
    let (first, second) = page.split_once(MARK).unwrap_or((&page, ""));
    match section {
        Section::First => first.to_owned(),
        Section::Second => second.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_written_anew_and_the_other_stays() {
        let both = replaced("# One\n", Section::Second, "## Two\n");
        assert_eq!(both, "# One\n\n<!-- the relay -->\n## Two\n");
        let again = replaced(&both, Section::First, "# Three\n");
        assert_eq!(again, "# Three\n\n<!-- the relay -->\n## Two\n");
        let again = replaced(&again, Section::Second, "## Four\n");
        assert_eq!(again, "# Three\n\n<!-- the relay -->\n## Four\n");
    }
}
