//! docs/guide/conformance.md and SECURITY.md name tests: they exist.
#![allow(clippy::expect_used)] // helpers of a test say what failed by panicking

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const FOLDERS: [&str; 4] = ["crates", "meshd", "keyrelay", "testbed"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Adds the names of all tests below `folder`.
fn collect(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("text");
            let text = text.replace("#[tokio::test]", "#[test]");
            for test in text.split("#[test]").skip(1) {
                let name = test.split_once("fn ").and_then(|(_, rest)| rest.split_once('('));
                names.extend(name.map(|(name, _)| name.to_owned()));
            }
        }
    }
}

/// All there are.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for folder in FOLDERS {
        collect(&root().join(folder), &mut tests);
    }
    assert!(tests.len() > 500, "only {} tests found", tests.len());
    tests
}

/// What stands between single backticks.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The names on a page of tests that exist; panics at one that does not.
fn named(page: &str) -> usize {
    let tests = tests();
    // A sentence as a name has many words.
    let named = code(page).filter(|word| word.matches('_').count() > 3);
    let (there, missing): (Vec<_>, Vec<_>) = named.partition(|name| tests.contains(*name));
    assert_eq!(missing, Vec::<&str>::new());
    there.len()
}

#[test]
fn every_test_that_the_conformance_page_names_exists() {
    let page = std::fs::read_to_string(root().join("docs/guide/conformance.md")).expect("a page");
    let count = named(&page);
    assert!(count > 80, "only {count} names found");
    let (tests, mut of_tests, mut rows) = (tests(), false, 0);
    for line in page.lines() {
        let Some(cells) = line.strip_prefix("| ") else {
            of_tests &= line.starts_with("|--");
            continue;
        };
        let last = cells.trim_end_matches(" |").rsplit(" | ").next().unwrap_or_default();
        if !of_tests {
            of_tests = last.starts_with("test");
            continue;
        }
        // Short names too; files and options have other signs.
        let mut named = code(last).filter(|word| !word.contains(['/', ' ', '.', '-'])).peekable();
        assert!(named.peek().is_some(), "no test: {line}");
        assert_eq!(named.find(|name| !tests.contains(*name)), None, "{line}");
        rows += 1;
    }
    assert!(rows > 60, "only {rows} rows of tests found");
}

#[test]
fn every_test_that_the_page_on_security_names_exists() {
    let page = std::fs::read_to_string(root().join("SECURITY.md")).expect("a page");
    let count = named(&page);
    assert!(count > 35, "only {count} names found");
}
