//! What every namespace test needs.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at the first thing that is wrong"
)]
#![allow(dead_code, reason = "each test program uses its own part of this")]

pub(crate) mod kernel;
pub(crate) mod mesh;
pub(crate) mod wg;
pub(crate) mod wireguard_go;

use testbed::lab::Programs;

/// Whether the test may run. Without root it fails in CI and says so elsewhere.
pub(crate) fn root() -> bool {
    if testbed::lab::require_root().is_ok() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "namespace tests need root, and CI must run them");
    let _ =
        std::io::Write::write_all(&mut std::io::stderr(), b"skipped: namespace tests need root\n");
    false
}

/// A lab name nobody else uses.
pub(crate) fn lab_name(what: &str) -> String {
    format!("t-{what}-{}", std::process::id())
}

/// The programs of this build.
pub(crate) fn programs() -> Programs {
    Programs::beside(std::path::Path::new(env!("CARGO_BIN_EXE_testbed"))).expect("programs")
}
