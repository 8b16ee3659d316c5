//! The `testbed` program: shows the mesh at work on one machine.

mod args;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.command {
        Command::Demo(options) => testbed::demo::run(options),
        Command::Bench(options) => testbed::bench::run(options),
        Command::Nat(options) => testbed::nat::run(options),
        Command::Holder(options) => testbed::lab::hold(options).map(|()| true),
        Command::Apiserver(options) => testbed::api::process::serve(options).map(|()| true),
        Command::Kube(options) => testbed::kube::run(options),
        Command::Forward(options) => testbed::kube::forward(options).map(|()| true),
        Command::Tool(options) => testbed::tool::run(options).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        // The program has said what is wrong.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Nothing to be done where even stderr is gone.
            let _ = writeln!(std::io::stderr(), "testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
