//! The socket of a mesh node's device: `wg show` sees it, nobody changes it, and it tells no secret.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use zeroize::Zeroizing;

use super::controller::WallClock;
use super::socket::Socket;
use crate::config::Kernel;
use crate::uapi::Refusal;
use crate::uapi::device::{Device, Figures, Live};
use crate::uapi::line::Line;
use crate::uapi::server::{self, Handler, Service};
use crate::view::{Snapshot, View};

/// Serves until dropped; the socket goes with it.
pub struct MeshSocket {
    socket: Socket,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for MeshSocket {
    fn drop(&mut self) {
        self.task.abort();
        self.socket.remove();
    }
}

/// Answers `wg` about the device of the mesh, in `dir`.
pub fn serve_mesh(dir: &Path, kernel: &Kernel, view: Arc<View>) -> anyhow::Result<MeshSocket> {
    let listener = server::listen(dir, &kernel.tun)?;
    let socket = Socket::ours(&listener, server::path(dir, &kernel.tun));
    listener.set_nonblocking(true).context("serve the configuration socket")?;
    let listener =
        tokio::net::UnixListener::from_std(listener).context("serve the configuration socket")?;
    let refusals = Arc::clone(&view.refused_requests);
    let answers = Answers { view, mark: kernel.mark, clocks: Mutex::default() };
    let task = tokio::spawn(server::serve(listener, Service::new(answers, refusals)));
    Ok(MeshSocket { socket, task })
}

struct Answers {
    view: Arc<View>,
    mark: u32,
    clocks: Mutex<WallClock>,
}

impl Handler for Answers {
    fn get(&self) -> Result<Zeroizing<String>, Refusal> {
        let snapshot = self.view.snapshot();
        if !snapshot.answered {
            return Err(Refusal::Unknown);
        }
        let mut clocks = self.clocks.lock().unwrap_or_else(PoisonError::into_inner);
        let device = device(&snapshot, self.mark)?;
        Ok(device.print(&live(&snapshot, &mut clocks)))
    }

    fn set(&self, _: Vec<Line>) -> Result<(), Refusal> {
        Err(Refusal::NotPermitted)
    }

    fn is_writable(&self) -> bool {
        false
    }
}

/// The node as a device would be told to be it, keys left out.
fn device(snapshot: &Snapshot, mark: u32) -> Result<Device, Refusal> {
    let mut lines = vec![Line::ListenPort(snapshot.identity.listen_port), Line::Fwmark(mark)];
    for peer in &snapshot.facts.peers {
        let config = &peer.config;
        let keepalive = config.keepalive.map_or(0, |interval| interval.as_secs());
        lines.push(Line::PublicKey(config.key.into()));
        lines.push(Line::Keepalive(u16::try_from(keepalive).unwrap_or(u16::MAX)));
        lines.extend(config.allowed_ips.iter().map(|prefix| Line::AllowedIp(*prefix)));
    }
    Device::default().apply(&lines)
}

fn live(snapshot: &Snapshot, clocks: &mut WallClock) -> Live {
    let data = &snapshot.data;
    clocks.keep(&data.peers.iter().map(|peer| peer.key).collect());
    let mut figures = |peer: &mesh_core::tunnel::config::PeerSnapshot| Figures {
        endpoint: peer.endpoint,
        last_handshake: peer.last_handshake.map(|at| clocks.tell(peer.key, at, data.now)),
        rx_bytes: peer.rx_bytes,
        tx_bytes: peer.tx_bytes,
    };
    data.peers.iter().map(|peer| (peer.key.into(), figures(peer))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::sample;

    fn answers(view: View) -> Answers {
        Answers { view: Arc::new(view), mark: 4, clocks: Mutex::default() }
    }

    #[test]
    fn a_node_is_shown_without_keys_and_lets_nobody_change_it() {
        let answers = answers(sample());
        let text = answers.get().expect("an answer");
        assert!(text.starts_with("listen_port=15190\nfwmark=4\npublic_key=0202"), "{}", *text);
        assert!(!text.contains("private_key"));
        assert!(text.contains("\nallowed_ip=10.244.2.0/24\n") && text.contains("rx_bytes=2048\n"));
        assert!(text.contains("endpoint=203.0.113.2:15190\n"));
        assert!(text.contains("persistent_keepalive_interval=25\n"));
        // A handshake happened once, whenever one asks.
        assert_eq!(*answers.get().expect("an answer"), *text);
        assert!(!answers.is_writable());
        assert_eq!(answers.set(vec![]), Err(Refusal::NotPermitted));
    }

    #[test]
    fn a_data_plane_that_hangs_is_told_as_an_error() {
        let view = sample();
        view.set_data_source(crate::view::tests::Hanging);
        assert_eq!(answers(view).get().err(), Some(Refusal::Unknown));
    }
}
