//! The program: streams and environment of the process handed to [`meshd_cni::command::run`].

use std::io::Write as _;
use std::process::ExitCode;

use meshd_cni::attach::Linux;
use meshd_cni::command::{Streams, run};

fn main() -> ExitCode {
    // Runtimes give no arguments: somebody looks at which program this is.
    if std::env::args_os().len() > 1 {
        let about = meshd_cni::command::about();
        return ExitCode::from(u8::from(writeln!(std::io::stdout(), "{about}").is_err()));
    }
    let mut streams = Streams {
        stdin: &mut std::io::stdin().lock(),
        stdout: &mut std::io::stdout().lock(),
        stderr: &mut std::io::stderr().lock(),
    };
    ExitCode::from(run(|name| std::env::var(name).ok(), &mut streams, &Linux))
}
