//! What keys that were taken back leave in the memory of `meshd wg`: read from outside, as root can.
#![allow(clippy::expect_used)] // helpers of a test say what failed by panicking

mod common;

use std::fs::{DirEntry, File};
use std::os::unix::fs::FileExt as _;

use common::wg::{Bench, Node, Program, ensure, wait_for};
use mesh_types::key::{KEY_LEN, PrivateKey};
use wg_engine::{generate_private_key, public_key};

/// What the daemon holds: heaps and globals. Stacks are left out: a frame's bytes stay until another comes to lie there.
fn memory(node: &Node) -> Vec<Vec<u8>> {
    let process = format!("/proc/{}", node.daemon().process().pid);
    let maps = std::fs::read_to_string(format!("{process}/maps")).expect("its maps");
    let memory = File::open(format!("{process}/mem")).expect("its memory");
    let stacks = stack_pointers(&process);
    let region = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let (from, to) = (address(from)?, address(to)?);
        let is_heap = rest.starts_with("rw") && !stacks.iter().any(|at| (from..to).contains(at));
        let mut bytes = vec![0; (to - from) as usize];
        // What was given back meanwhile is gone.
        (is_heap && memory.read_exact_at(&mut bytes, from).is_ok()).then_some(bytes)
    };
    maps.lines().filter_map(region).collect()
}

/// Of every thread, which all sleep in a system call as soon as nothing is to be done.
fn stack_pointers(process: &str) -> Vec<u64> {
    let threads = std::fs::read_dir(format!("{process}/task")).expect("its threads");
    let pointer = |thread: std::io::Result<DirEntry>| {
        let syscall = thread.expect("a thread").path().join("syscall");
        wait_for("a thread that sleeps", || {
            // The number and six arguments, the stack pointer, the program counter (proc_pid_syscall(5)).
            let Ok(text) = std::fs::read_to_string(&syscall) else {
                // It has ended meanwhile.
                return Ok(None);
            };
            let pointer = text.split_whitespace().nth(7).and_then(address);
            pointer.map(Some).ok_or(text)
        })
    };
    threads.filter_map(pointer).collect()
}

fn address(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

fn holds(region: &[u8], form: &[u8]) -> bool {
    region.windows(form.len()).any(|part| part.first() == form.first() && part == form)
}

/// In which forms the key is there: its bytes, and as the protocol and `wg` write it.
fn forms(node: &Node, key: &[u8; KEY_LEN]) -> Vec<&'static str> {
    let base64 = PrivateKey::from_bytes(*key).to_base64();
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let forms = [
        ("bytes", &key[..]),
        ("hex", hex.as_bytes()),
        // Without what the clamped bits of its end are in.
        ("base64", &base64.as_bytes()[1..40]),
    ];
    let memory = memory(node);
    let there = |form: &[u8]| memory.iter().any(|region| holds(region, form));
    forms.into_iter().filter(|(_, form)| there(form)).map(|(name, _)| name).collect()
}

fn is_nowhere(node: &Node, key: &[u8; KEY_LEN], what: &str) {
    wait_for(what, || {
        let found = forms(node, key);
        ensure(found.is_empty(), found)
    });
}

/// One that is up, with its key and no peer.
fn started(what: &str) -> Bench {
    let mut bench = Bench::new(what);
    let meshd = bench.meshd();
    bench.nodes[0].start(Program::Meshd, &meshd);
    let a = &bench.nodes[0];
    a.bring_up();
    a.set(&format!("private-key {}", a.key_file()));
    bench
}

#[test]
fn a_private_key_that_was_taken_back_is_nowhere_in_memory() {
    if !common::root() {
        return;
    }
    let bench = started("memory-private");
    let a = &bench.nodes[0];
    assert_eq!(forms(a, a.key.expose()), ["bytes"], "it is in use");
    let second = generate_private_key();
    a.set(&format!("private-key {}", a.key_file_of(&second)));
    is_nowhere(a, a.key.expose(), "the first key gone");
    assert_eq!(forms(a, second.expose()), ["bytes"], "it is in use");
    a.set("private-key /dev/null");
    is_nowhere(a, second.expose(), "the second key gone");
}

#[test]
fn a_preshared_key_is_nowhere_in_memory_as_it_was_told() {
    if !common::root() {
        return;
    }
    // Any 32 bytes; so that it can be told in a file of the namespace.
    let psk = generate_private_key();
    let bench = started("memory-preshared");
    let a = &bench.nodes[0];
    let nobody = public_key(&generate_private_key());
    a.set(&format!("peer {nobody} preshared-key {}", a.key_file_of(&psk)));
    for what in ["told", "shown"] {
        wait_for(what, || {
            let found = forms(a, psk.expose());
            ensure(found == ["bytes"], found)
        });
        a.done("wg show wg0 preshared-keys");
    }
}
