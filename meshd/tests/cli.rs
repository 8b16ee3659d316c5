//! The command line as an operator meets it: every mistake is one line on stderr and a status above 0.

#![allow(clippy::expect_used)] // tests stand on it

use std::process::Command;

fn meshd(argv: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_meshd"))
        .args(argv)
        .env_clear()
        .output()
        .expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().expect("no signal"), text(output.stdout), text(output.stderr))
}

#[test]
fn every_mistake_is_one_line_that_names_what_to_change() {
    let cluster = ["run", "--node-name", "n", "--cluster-cidr", "10.244.0.0/16"];
    let with = |more: &[&'static str]| [&cluster[..], more].concat();
    let table: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "subcommand"),
        (vec!["fly"], "fly"),
        (vec!["run", "--node-name", "n"], "--cluster-cidr"),
        (vec!["run", "--node-name", "n", "--cluster-cidr", "nonsense"], "nonsense"),
        (vec!["run", "--node-name", "n", "--cluster-cidr", "10.244.0.1/16"], "10.244.0.0/16"),
        (vec!["run", "--node-name", "n", "--cluster-cidr", "0.0.0.0/0"], "0.0.0.0/0"),
        (with(&["--listen-port", "0"]), "--listen-port"),
        (with(&["--tun-name", "much-too-long-a-name"]), "--tun-name"),
        (with(&["--mark", "0"]), "--mark"),
        (with(&["--table", "254"]), "--table"),
        (with(&["--state-dir", "relative"]), "--state-dir"),
        (with(&["--service-cidr", "10.244.9.0/24"]), "--service-cidr"),
        (with(&["--log", "=="]), "--log"),
        (vec!["status", "--run-dir", "/nonexistent/meshd"], "/nonexistent/meshd"),
        (vec!["uninstall", "--state-dir", "relative"], "--state-dir"),
    ];
    for (argv, culprit) in table {
        let (code, stdout, stderr) = meshd(&argv);
        assert!(code > 0, "{argv:?}");
        assert_eq!(stdout, "", "{argv:?}");
        assert_eq!(stderr.lines().count(), 1, "{argv:?}: {stderr}");
        assert!(stderr.starts_with("meshd: ") && stderr.contains(culprit), "{argv:?}: {stderr}");
    }
}

#[test]
fn help_and_version_go_to_stdout_and_succeed() {
    let (code, stdout, _) = meshd(&["--version"]);
    assert_eq!((code, stdout.trim()), (0, concat!("meshd ", env!("CARGO_PKG_VERSION"))));
    for argv in [vec!["--help"], vec!["run", "--help"], vec!["uninstall", "--help"]] {
        let (code, stdout, _) = meshd(&argv);
        assert!(code == 0 && stdout.contains("Usage:"), "{argv:?}");
    }
}
