//! `kubectl mesh`; linked as `kubectl_complete-mesh` it completes its command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    meshd::inspect::main(std::env::args_os().collect())
}
