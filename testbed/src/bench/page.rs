//! Pages of the documentation that are written from figures.

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

use super::figures::{Figure, Of, Report, digits};

/// Stands before the second section of a page.
const MARK: &str = "<!-- the relay -->\n";

/// Which part of a page is written; the other stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    First,
    Second,
}

/// Whether a file can be written there, before an hour is spent on what it is to hold.
pub(super) fn check(path: &Path) -> Result<()> {
    read(path)?;
    temporary(path).map(drop)
}

/// Writes one section of the page at `path`.
pub(super) fn put(path: &Path, section: Section, text: &str) -> Result<()> {
    replace(path, &replaced(&read(path)?, section, text))
}

/// Writes a file, whole or not at all.
pub(super) fn replace(path: &Path, text: &str) -> Result<()> {
    let mut file = temporary(path)?;
    let cannot = || format!("cannot write {}", path.display());
    file.write_all(text.as_bytes()).with_context(cannot)?;
    // As a file of the repository is, whoever measures.
    let mode = fs::Permissions::from_mode(0o644);
    file.as_file().set_permissions(mode).with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(())
}

/// A page that is not there yet is empty; one that cannot be read would lose its other section.
fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("cannot read {}", path.display())),
    }
}

/// In the same folder, so that it can take the file's place.
fn temporary(path: &Path) -> Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
        .with_context(|| format!("cannot write beside {}", path.display()))
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
        row(text, figure, report);
    }
    if !report.programs.is_empty() {
        let _ = writeln!(text, "\nBeside {}.", report.programs.join(", "));
    }
    if !report.left_out.is_empty() {
        text.push_str("\nNot measured here:\n\n");
        for line in &report.left_out {
            let _ = writeln!(text, "- {line}");
        }
    }
}

fn row(text: &mut String, figure: &Figure, report: &Report) {
    let with_spread = |value: f64, [low, high]: [f64; 2], rounds: Option<usize>| {
        let few = report.too_few(rounds).map_or_else(String::new, |few| format!(", {few} rounds"));
        format!("{} ({}–{}{few})", digits(value), digits(low), digits(high))
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
        with_spread(figure.value, figure.spread.ours, figure.spread.rounds),
        figure.peer.unwrap_or_default(),
        theirs.map_or_else(String::new, |(value, spread)| {
            with_spread(value, spread, figure.spread.peer_rounds)
        }),
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

    #[test]
    fn a_file_is_replaced_whole_and_one_that_cannot_be_is_said_before() {
        let folder = tempfile::tempdir().expect("a folder");
        let page = folder.path().join("page.md");
        check(&page).expect("it can be written");
        assert!(!page.exists(), "nothing is left of the check");
        put(&page, Section::First, "# One\n").expect("written");
        assert_eq!(fs::read_to_string(&page).expect("a page"), "# One\n");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
        // No text: its other section would be lost.
        fs::write(&page, [0xff]).expect("written");
        assert!(check(&page).is_err() && put(&page, Section::First, "# Two\n").is_err());
        assert_eq!(fs::read(&page).expect("a page"), [0xff]);
        assert!(check(&folder.path().join("none/page.md")).is_err());
    }
}
