//! What namespace tests need.

use std::io::Write as _;

/// Whether the test may run: without root it fails in CI and says so elsewhere.
pub(crate) fn root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "namespace tests need root, and CI must run them");
    let _ = std::io::stderr().write_all(b"skipped: namespace tests need root\n");
    false
}
