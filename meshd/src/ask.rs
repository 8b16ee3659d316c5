//! One question to the daemon of this node, over one of its sockets.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use mesh_types::limits::FILE_BYTES_MAX;
use tokio::net::UnixStream;

/// What the daemon said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether its HTTP status means success.
    pub ok: bool,
    pub body: Vec<u8>,
}

/// Asks `uri` at `socket`. `Err` if nobody answers within `patience`, in words that say what to do.
pub fn ask(socket: &Path, uri: &str, patience: Duration) -> anyhow::Result<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a reactor")?;
    runtime.block_on(async {
        match tokio::time::timeout(patience, get(socket, uri)).await {
            Ok(answer) => answer,
            Err(_) => bail!(
                "the daemon behind {} took more than {} s to answer: look at its log",
                socket.display(),
                patience.as_secs()
            ),
        }
    })
}

async fn get(socket: &Path, uri: &str) -> anyhow::Result<Answer> {
    let stream =
        UnixStream::connect(socket).await.map_err(|error| anyhow!(why(socket, error.kind())))?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.context("speak to the daemon")?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::get(uri)
        .header("host", "meshd")
        .body(Empty::<Bytes>::new())
        .context("form the request")?;
    let response = sender
        .send_request(request)
        .await
        .context("the daemon closed the connection: only root may ask")?;
    let ok = response.status().is_success();
    let limit = usize::try_from(FILE_BYTES_MAX).unwrap_or(usize::MAX);
    let body = Limited::new(response.into_body(), limit)
        .collect()
        .await
        .map_err(|error| anyhow!("read the answer: {error}"))?
        .to_bytes();
    driver.abort();
    Ok(Answer { ok, body: body.to_vec() })
}

fn why(socket: &Path, kind: ErrorKind) -> String {
    let why = match kind {
        ErrorKind::NotFound => "meshd has not run here, or listens elsewhere (--run-dir, --socket)",
        ErrorKind::ConnectionRefused => {
            "meshd is not running: no pod reaches another node until it is started, and nothing leaves in clear"
        }
        ErrorKind::PermissionDenied => "only root may ask",
        _ => "cannot be asked",
    };
    format!("{}: {why}", socket.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_takes_the_question_and_says_nothing_is_waited_for_no_longer_than_told() {
        let dir = tempfile::tempdir().expect("scratch");
        let socket = dir.path().join("s");
        let _silent = std::os::unix::net::UnixListener::bind(&socket).expect("bind");
        let told = ask(&socket, "/healthz", Duration::ZERO).expect_err("no answer");
        assert!(format!("{told:#}").contains("look at its log"), "{told:#}");
    }
}
