//! `meshd probe`: asks the daemon of this very pod, by a socket no other pod has.

use std::time::Duration;

use anyhow::bail;

use crate::args::{ProbeArgs, Question};
use crate::ask::ask;

/// A daemon that does not answer within this time hangs. Shorter than the patience of a probe with `timeoutSeconds: 5`, so
/// that the kubelet hears why.
const TIMEOUT: Duration = Duration::from_secs(4);

/// `meshd probe live|ready`.
pub fn run(args: &ProbeArgs) -> anyhow::Result<()> {
    let (path, asked) = match args.question {
        Question::Live => ("/healthz", "live"),
        Question::Ready => ("/readyz", "ready"),
    };
    let answer = ask(&args.socket, path, TIMEOUT)?;
    if answer.ok {
        return Ok(());
    }
    // What does not hold is what the kubelet's event should say.
    let text = String::from_utf8_lossy(&answer.body);
    let missing: Vec<&str> = text.lines().filter(|line| !line.starts_with("[+]")).collect();
    bail!("not {asked}: {}", missing.join("; "))
}
