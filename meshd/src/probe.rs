//! `meshd probe`: asks the daemon of this very pod, by a socket no other pod has.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::args::{ProbeArgs, Question};
use crate::ask::{Answer, ask};

/// A daemon that does not answer within this time hangs. Shorter than the patience of a probe with `timeoutSeconds: 5`, so
/// that the kubelet hears why.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Between two looks for the socket of a daemon that has only just been started.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// `meshd probe live|ready`.
pub fn run(args: &ProbeArgs) -> anyhow::Result<()> {
    let (path, asked) = match args.question {
        Question::Live => ("/healthz", "live"),
        Question::Ready => ("/readyz", "ready"),
    };
    let answer = match args.question {
        Question::Live => ask_once_it_listens(&args.socket, path, TIMEOUT)?,
        Question::Ready => ask(&args.socket, path, TIMEOUT)?,
    };
    if answer.ok {
        return Ok(());
    }
    // What does not hold is what the kubelet's event should say.
    let text = String::from_utf8_lossy(&answer.body);
    let missing: Vec<&str> = text.lines().filter(|line| !line.starts_with("[+]")).collect();
    bail!("not {asked}: {}", missing.join("; "))
}

/// The first probe comes when the process is a second old at most: one that failed would be an Event of every healthy start.
fn ask_once_it_listens(socket: &Path, uri: &str, patience: Duration) -> anyhow::Result<Answer> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match ask(socket, uri, left) {
            Err(_) if left > LOOK_INTERVAL => std::thread::sleep(LOOK_INTERVAL),
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_begins_to_listen_is_waited_for_and_one_that_never_does_is_told() {
        let dir = tempfile::tempdir().expect("scratch");
        let socket = dir.path().join("s");
        let error = ask_once_it_listens(&socket, "/healthz", Duration::ZERO).expect_err("nobody");
        assert!(format!("{error:#}").contains("has not run here"), "{error:#}");
        let late = std::thread::spawn({
            let socket = socket.clone();
            move || ask_once_it_listens(&socket, "/healthz", Duration::from_secs(60))
        });
        let listener = std::os::unix::net::UnixListener::bind(&socket).expect("bind");
        let (mut stream, _) = listener.accept().expect("asked");
        // Closed with a question unread, a socket takes its answer back (unix(7): ECONNRESET).
        let mut question = [0; 4_096];
        assert_ne!(std::io::Read::read(&mut stream, &mut question).expect("a question"), 0);
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .expect("answered");
        assert!(late.join().expect("no panic").expect("an answer").ok);
    }
}
