//! docs/guide/conformance.md names tests: they exist.
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
            for test in text.split("#[test]").skip(1) {
                let name = test.split_once("fn ").and_then(|(_, rest)| rest.split_once('('));
                names.extend(name.map(|(name, _)| name.to_owned()));
            }
        }
    }
}

#[test]
fn every_test_that_the_conformance_page_names_exists() {
    let page = std::fs::read_to_string(root().join("docs/guide/conformance.md")).expect("a page");
    let mut tests = BTreeSet::new();
    for folder in FOLDERS {
        collect(&root().join(folder), &mut tests);
    }
    assert!(tests.len() > 500, "only {} tests found", tests.len());
    // Code in a line stands between single backticks; a sentence as a name has many words.
    let named = page.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() > 3);
    let (mut count, mut missing) = (0, Vec::new());
    for name in named {
        count += 1;
        if !tests.contains(name) {
            missing.push(name);
        }
    }
    assert!(count > 80, "only {count} names found");
    assert_eq!(missing, Vec::<&str>::new());
    for row in page.lines().filter(|line| line.starts_with("| ") && line.contains("| ours:")) {
        assert!(row.matches('`').count() >= 4, "no test: {row}");
    }
}
