//! The program: streams and environment of the process handed to [`meshd_cni::command::run`].

use std::process::ExitCode;

use meshd_cni::attach::Linux;
use meshd_cni::command::{Streams, run};

fn main() -> ExitCode {
    let mut streams = Streams {
        stdin: &mut std::io::stdin().lock(),
        stdout: &mut std::io::stdout().lock(),
        stderr: &mut std::io::stderr().lock(),
    };
    ExitCode::from(run(|name| std::env::var(name).ok(), &mut streams, &Linux))
}
