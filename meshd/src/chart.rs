//! What the chart says of this program, checked against the program: names it does not know would be ignored in silence.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use mesh_types::annotations;

use crate::args::Args;

/// Keys the daemon may write, besides those this version writes: rotation is to come, and a policy is not upgraded with every
/// daemon.
const RESERVED: [&str; 1] = [annotations::NEXT_PUBLIC_KEY];

fn chart(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm").join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Words that begin with `prefix` and go on with letters, digits, `-` and `_`.
fn words<'t>(text: &'t str, prefix: &'t str) -> impl Iterator<Item = &'t str> {
    text.match_indices(prefix).map(move |(at, _)| {
        let rest = &text[at..];
        let inside = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = rest[prefix.len()..].find(|c: char| !inside(c));
        &rest[..end.map_or(rest.len(), |end| prefix.len() + end)]
    })
}

fn variables(command: &clap::Command, all: &mut BTreeSet<String>) {
    let own = command.get_arguments().filter_map(clap::Arg::get_env);
    all.extend(own.map(|name| name.to_string_lossy().into_owned()));
    command.get_subcommands().for_each(|command| variables(command, all));
}

#[test]
fn every_variable_the_chart_sets_is_one_this_program_reads() {
    let mut known = BTreeSet::new();
    variables(&Args::command(), &mut known);
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(chart("tests/golden")).expect("renders") {
        let path = entry.expect("entry").path();
        let text = read(&path);
        for name in words(&text, "name: MESHD_").filter_map(|word| word.strip_prefix("name: ")) {
            assert!(known.contains(name), "{name} in {}", path.display());
            seen.insert(name.to_owned());
        }
    }
    assert!(seen.len() > 20, "{seen:?}");
}

#[test]
fn the_policies_name_the_annotations_this_program_uses() {
    let ours = [
        annotations::PUBLIC_KEY,
        annotations::ENDPOINTS,
        annotations::KEYRELAY,
        annotations::VERSION,
        annotations::OVERLAY,
    ];
    let mut daemon: BTreeSet<&str> = ours.into_iter().collect();
    daemon.extend(RESERVED);
    let helpers = read(&chart("meshd/templates/_helpers.tpl"));
    let (_, keys) = helpers.split_once("define \"meshd.daemonKeys\"").expect("the list");
    let (keys, _) = keys.split_once("end }}").expect("its end");
    assert_eq!(words(keys, "meshd.dev/").collect::<BTreeSet<_>>(), daemon);
    // Nothing else is named in any expression of a policy.
    let policies = read(&chart("meshd/templates/admissionpolicies.yaml"));
    let named: BTreeSet<&str> = words(&policies, "'meshd.dev/").map(|word| &word[1..]).collect();
    let named: BTreeSet<&str> = named.into_iter().filter(|word| *word != "meshd.dev/").collect();
    assert_eq!(named, BTreeSet::from([annotations::ENDPOINT_OVERRIDE, annotations::OVERLAY]));
}
