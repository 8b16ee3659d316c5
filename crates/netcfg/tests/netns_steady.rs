//! Looking at what is whole starts no program.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a helper's panic fails its test

mod common;

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::lab::{attach, cluster, lab, mesh_rules, pod_config, problems};
use common::privileged;
use netcfg::guard::{self, GuardConfig, GuardState};
use netcfg::pod;

/// Names the folder with the counting `nft` to the test started anew with that folder first on its path.
const COUNTED: &str = "NETCFG_TEST_COUNTED_NFT";

/// An `nft` that notes each of its starts and goes on as the real one.
fn counting_nft(folder: &Path) {
    let real = netcfg::find_nft(&std::env::var_os("PATH").unwrap()).expect("an nft");
    let script = format!(
        "#!/bin/sh\necho start >> {}\nexec {} \"$@\"\n",
        folder.join("starts").display(),
        real.display()
    );
    let program = folder.join("nft");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_is_whole_is_looked_at_and_counted_without_starting_a_program() {
    if !privileged() {
        return;
    }
    let Some(folder) = std::env::var_os(COUNTED).map(PathBuf::from) else {
        let folder = tempfile::tempdir().unwrap();
        counting_nft(folder.path());
        let mut path = OsString::from(folder.path());
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        let again = Command::new(std::env::current_exe().unwrap())
            .args(["--nocapture", "--exact"])
            .arg("what_is_whole_is_looked_at_and_counted_without_starting_a_program")
            .env(COUNTED, folder.path())
            .env("PATH", path)
            .output()
            .unwrap();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
        return;
    };
    let starts = || std::fs::read_to_string(folder.join("starts")).unwrap().lines().count();
    let lab = lab();
    mesh_rules(&lab);
    let config = GuardConfig::new(cluster());
    assert!(lab.node.run(|| guard::ensure(&config)));
    let one = attach(&lab, "one", 5);
    let before = starts();
    assert!(before >= 4, "each table is loaded and sealed: {before}");
    assert_eq!(lab.node.run(|| guard::verify(&config)), GuardState::Intact);
    assert!(!lab.node.run(|| guard::ensure(&config)));
    assert_eq!(lab.node.run(|| pod::host_state(&pod_config())).table, GuardState::Intact);
    lab.node.run(|| pod::repair(&pod_config(), std::slice::from_ref(&one.attachment)));
    assert_eq!(problems(&lab, &one), Vec::<String>::new());
    lab.node.run(|| guard::drops(&config.table));
    lab.node.run(|| pod::drops("meshd-cni"));
    assert_eq!(starts(), before);
}
