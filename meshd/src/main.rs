//! `meshd`: parse, log, run, exit status.

use std::process::ExitCode;

use anyhow::Context;
use meshd::args::{self, CniInstallArgs, Command, LogFormat};
use meshd::config;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(status) => return status,
    };
    let filter = match &args.command {
        Command::Wg(wg) => wg.filter().unwrap_or(&args.log),
        _ => &args.log,
    };
    if let Err(error) = log(filter, args.log_format) {
        return fail(&error);
    }
    let result = match &args.command {
        Command::Run(run) => meshd::app::run(run),
        Command::Status(status) => meshd::status::print(status),
        Command::Netcheck(args) => meshd::netcheck::print(args),
        Command::Ping(ping) => meshd::ping::run(ping),
        Command::Uninstall(uninstall) => meshd::uninstall::run(uninstall),
        Command::CniInstall(install) => cni_install(install),
        Command::Probe(probe) => meshd::probe::run(probe),
        Command::PodCheck(check) => meshd::pod_check::run(check),
        Command::Wg(wg) => meshd::wg::run(wg),
        Command::Hold => meshd::app::hold(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn cni_install(args: &CniInstallArgs) -> anyhow::Result<()> {
    let wanted = config::cni_install(args)?;
    if args.remove {
        return meshd::cni_install::run_remove(&wanted);
    }
    let result = meshd::cni_install::run(&wanted);
    if let (Err(error), Some(node)) = (&result, &args.node_name) {
        let node = node.parse().context("--node-name")?;
        meshd::app::last_words(None, &node, &meshd::one_line(error));
    }
    result
}

/// One line with every cause; stderr, because the log filter may hide it.
#[allow(clippy::print_stderr)]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("meshd: {}", meshd::one_line(error));
    ExitCode::FAILURE
}

fn log(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .with_context(|| format!("--log {filter:?} is no filter; write for example info"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Complaining about a closed stderr goes to stderr, and panics.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
