//! The cross-platform configuration socket of userspace WireGuard.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use mesh_types::key::{PrivateKey, PublicKey};

use crate::lab::Daemon;

/// How long the socket may take to appear, and an answer to come.
const READY: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) key: PublicKey,
    pub(super) endpoint: String,
    pub(super) allowed: Vec<String>,
}

/// Writes key, port and peers to the socket, waiting for it.
pub(super) fn configure(
    path: &Path,
    daemon: &Daemon,
    key: &PrivateKey,
    port: u16,
    peers: &[Peer],
) -> Result<()> {
    let mut socket = connect(path, daemon)?;
    socket.set_read_timeout(Some(READY))?;
    socket.write_all(settings(key, port, peers).as_bytes())?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    ensure!(answer.trim() == "errno=0", "{} answered {answer:?}", path.display());
    Ok(())
}

fn connect(path: &Path, daemon: &Daemon) -> Result<UnixStream> {
    let end = Instant::now() + READY;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(error) if Instant::now() > end || !daemon.is_alive() => {
                bail!("{}: {error}; {}", path.display(), daemon.log())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn settings(key: &PrivateKey, port: u16, peers: &[Peer]) -> String {
    let mut text = format!("set=1\nprivate_key={}\nlisten_port={port}\n", hex(key.expose()));
    for peer in peers {
        let _ =
            writeln!(text, "public_key={}\nendpoint={}", hex(peer.key.as_bytes()), peer.endpoint);
        for prefix in &peer.allowed {
            let _ = writeln!(text, "allowed_ip={prefix}");
        }
    }
    text.push('\n');
    text
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use wg_engine::{generate_private_key, public_key};

    use super::*;

    #[test]
    fn settings_end_with_an_empty_line() {
        let key = generate_private_key();
        let peer = Peer {
            key: public_key(&key),
            endpoint: "192.0.2.1:7".to_owned(),
            allowed: vec!["10.0.0.0/8".to_owned()],
        };
        let text = settings(&key, 7, &[peer]);
        assert!(text.starts_with("set=1\nprivate_key="), "{text}");
        assert!(text.ends_with("endpoint=192.0.2.1:7\nallowed_ip=10.0.0.0/8\n\n"), "{text}");
    }
}
