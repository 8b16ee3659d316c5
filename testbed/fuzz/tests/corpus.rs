//! The committed inputs, and what mutation makes of them, on any compiler.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

use std::path::{Path, PathBuf};

use fuzz::{INPUT_BYTES_MAX, TARGETS, run};
use proptest::prelude::*;
use proptest::sample::Index;

/// Inputs of a target: `corpus/NAME/*`, one file each.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let files = std::fs::read_dir(&folder);
    let files = files.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.expect("readable").path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("readable")).collect()
}

#[test]
fn every_target_has_inputs_a_fuzzer_and_holds_on_them() {
    for (name, _) in TARGETS {
        let inputs = corpus(name);
        assert!(!inputs.is_empty(), "{name} has none");
        let fuzzer = Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/fuzz_targets");
        assert!(fuzzer.join(format!("{name}.rs")).exists(), "{name} has no fuzzer");
        for input in &inputs {
            run(name, input);
        }
    }
}

#[derive(Debug, Clone)]
enum Mutation {
    Set(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Splice(Index, Index, Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, with)| Mutation::Set(at, with)),
        1 => any::<Index>().prop_map(Mutation::Cut),
        1 => (any::<Index>(), proptest::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        1 => (any::<Index>(), any::<Index>(), any::<Index>())
            .prop_map(|(other, from, at)| Mutation::Splice(other, from, at)),
    ]
}

fn mutate(input: &mut Vec<u8>, mutation: &Mutation, all: &[Vec<u8>]) {
    let at = |index: &Index, len: usize| index.index(len + 1);
    match mutation {
        Mutation::Set(place, with) if !input.is_empty() => {
            let place = place.index(input.len());
            input[place] = *with;
        }
        Mutation::Set(_, with) => input.push(*with),
        Mutation::Cut(place) => input.truncate(at(place, input.len())),
        Mutation::Insert(place, bytes) => {
            let place = at(place, input.len());
            input.splice(place..place, bytes.iter().copied());
        }
        Mutation::Splice(other, from, place) => {
            let other = other.get(all);
            let from = at(from, other.len());
            input.truncate(at(place, input.len()));
            input.extend_from_slice(&other[from..]);
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_target_holds_on_mutations_of_its_inputs(
        which in any::<Index>(),
        mutations in proptest::collection::vec(mutation(), 1..6),
    ) {
        for (name, _) in TARGETS {
            let all = corpus(name);
            let mut input = which.get(&all).clone();
            mutations.iter().for_each(|mutation| mutate(&mut input, mutation, &all));
            run(name, &input);
        }
    }

    #[test]
    fn every_target_holds_on_any_bytes(
        data in proptest::collection::vec(any::<u8>(), 0..2_000),
    ) {
        for (name, _) in TARGETS {
            run(name, &data);
        }
    }
}
