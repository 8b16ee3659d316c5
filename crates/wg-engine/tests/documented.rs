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

/// The names on a page of tests that exist; panics at one that does not.
fn named(page: &str) -> usize {
    let mut tests = BTreeSet::new();
    for folder in FOLDERS {
        collect(&root().join(folder), &mut tests);
    }
    assert!(tests.len() > 500, "only {} tests found", tests.len());
    // Code in a line stands between single backticks; a sentence as a name has many words.
    let named = page.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() > 3);
    let (there, missing): (Vec<_>, Vec<_>) = named.partition(|name| tests.contains(*name));
    assert_eq!(missing, Vec::<&str>::new());
    there.len()
}

#[test]
fn every_test_that_the_conformance_page_names_exists() {
    let page = std::fs::read_to_string(root().join("docs/guide/conformance.md")).expect("a page");
    let count = named(&page);
    assert!(count > 80, "only {count} names found");
    for row in page.lines().filter(|line| line.starts_with("| ") && line.contains("| ours:")) {
        assert!(row.matches('`').count() >= 4, "no test: {row}");
    }
}

#[test]
fn every_test_that_the_page_on_security_names_exists() {
    let page = std::fs::read_to_string(root().join("SECURITY.md")).expect("a page");
    let count = named(&page);
    assert!(count > 35, "only {count} names found");
}
