//! The WireGuard project's Go implementation as a peer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use testbed::lab::{Daemon, Namespace};

/// How long it may take to be ready.
const READY: Duration = Duration::from_secs(20);

/// Builds wireguard-go and starts it on `wg0`.
pub(crate) fn start(namespace: &Namespace) -> Daemon {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/wireguard-go.sh");
    let built = Command::new(script).output().expect("the build script runs");
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "wireguard-go was not built: {said}");
    let program = String::from_utf8_lossy(&built.stdout).trim().to_owned();
    let mut command = namespace.command(program);
    command.args(["-f", "wg0"]).env("LOG_LEVEL", "verbose");
    namespace.spawn(command, "wireguard-go").expect("wireguard-go starts")
}

/// Writes a configuration to its socket.
pub(crate) fn configure(namespace: &Namespace, daemon: &Daemon, settings: &str) {
    let path = namespace.path("/run/wireguard/wg0.sock");
    let deadline = Instant::now() + READY;
    let mut socket = loop {
        match UnixStream::connect(&path) {
            Ok(socket) => break socket,
            Err(error) if Instant::now() > deadline || !daemon.is_alive() => {
                panic!("{}: {error}; {}", path.display(), daemon.log())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    socket.set_read_timeout(Some(READY)).expect("a timeout");
    write!(socket, "set=1\n{settings}\n").expect("written");
    socket.shutdown(std::net::Shutdown::Write).expect("closed");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    assert_eq!(answer.trim(), "errno=0", "{settings}");
}

pub(crate) fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
