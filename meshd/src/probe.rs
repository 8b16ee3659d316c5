//! `meshd probe`: asks the daemon of this very pod, by a socket no other pod has.
//!
//! Synchronous and small: a kubelet starts it every few seconds.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::args::{ProbeArgs, Question};

/// A daemon that does not answer within this time hangs.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer read: a line per condition.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// `meshd probe live|ready`.
pub fn run(args: &ProbeArgs) -> anyhow::Result<()> {
    let path = match args.question {
        Question::Live => "/healthz",
        Question::Ready => "/readyz",
    };
    let answer = ask(&args.socket, path)
        .with_context(|| format!("ask {}: has the daemon started?", args.socket.display()))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("200") {
        return Ok(());
    }
    // What does not hold is what the kubelet's event should say.
    let missing: Vec<&str> = body.lines().filter(|line| !line.starts_with("[+]")).collect();
    bail!("not {:?}: {}", args.question, missing.join("; "))
}

fn ask(socket: &Path, path: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: meshd\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
