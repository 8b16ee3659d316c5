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

/// A script in the place of the copy tells what it was started with.
#[test]
fn the_copy_on_the_host_uninstalls_where_there_is_one() {
    use std::os::unix::fs::PermissionsExt as _;
    let state = tempfile::tempdir().expect("scratch");
    let run = state.path().join("run");
    let place = |path: &std::path::Path| path.to_str().expect("plain").to_owned();
    let (state_dir, run_dir) = (place(state.path()), place(&run));
    let argv = [
        "uninstall",
        "--by-host-copy",
        "--dry-run",
        "--state-dir",
        &state_dir,
        "--run-dir",
        &run_dir,
    ];
    let alone = |stdout: &str| !stdout.contains("copy:");
    let (_, stdout, stderr) = meshd(&argv);
    assert!(alone(&stdout) && stderr.contains("there is no copy"), "{stdout}{stderr}");

    let copy = state.path().join("bin/meshd");
    std::fs::create_dir(state.path().join("bin")).expect("folder");
    std::fs::write(&copy, "#!/bin/sh\necho \"copy: $*\"\nexit 7\n").expect("script");
    let mode = |bits| {
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(bits)).expect("mode");
    };
    mode(0o755);
    let (code, stdout, _) = meshd(&argv);
    let told = format!("copy: uninstall --dry-run --state-dir {state_dir} --run-dir {run_dir}");
    assert_eq!((code, stdout.trim()), (7, told.as_str()));

    mode(0o600);
    let (_, stdout, stderr) = meshd(&argv);
    assert!(alone(&stdout) && stderr.contains("cannot be started"), "{stdout}{stderr}");
}

#[test]
fn an_environment_name_that_is_empty_counts_as_not_there() {
    // All that an operator's unit file may have left empty; what is then said is of the missing interface.
    let names =
        ["WG_TUN_FD", "WG_UAPI_FD", "WG_PROCESS_FOREGROUND", "MESHD_SHARDS", "MESHD_BUSY_POLL_US"];
    let with = |value: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_meshd"))
            .args(["wg", "no/such/name"])
            .env_clear()
            .envs(names.map(|name| (name, value)))
            .output()
            .expect("the binary runs");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let (empty, wrong) = (with(""), with("nonsense"));
    assert!(empty.contains("no/such/name"), "{empty}");
    assert!(wrong.contains("nonsense"), "{wrong}");
}
