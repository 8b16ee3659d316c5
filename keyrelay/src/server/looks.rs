//! The ports by which members measure their NATs: one that answers, and one that only sends.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};

use super::{Sockets, turn_until_stopped};
use crate::clock;
use crate::core::relay::Worker;
use crate::core::{Reach, Source};
use crate::shared::Shared;

/// Of the second port: an idle one needs little, and a flood of it is to be lost.
const LOOK_RECEIVE_MESSAGES: usize = 4;
const LOOK_BUFFER_BYTES: usize = 64 * 1024;

/// What NATs are measured by: a port that answers, and one that only sends.
#[derive(Debug)]
pub struct LookSockets {
    pub(super) other: UdpSocket,
    pub(super) elsewhere: UdpSocket,
}

impl LookSockets {
    /// The one that answers.
    pub fn port(&self) -> u16 {
        self.other.local_port()
    }
}

/// Opens them at the address of the main port: `port`, and one that the kernel chooses.
pub fn open_looks(main: SocketAddr, port: u16) -> anyhow::Result<LookSockets> {
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let open = |port| {
        UdpSocket::open(&UdpOptions {
            address: Some(main.ip()).filter(|ip| *ip != any),
            port,
            gro: false,
            gso: false,
            buffer_bytes: LOOK_BUFFER_BYTES,
            ..UdpOptions::default()
        })
    };
    let other = open(port).with_context(|| format!("cannot use UDP port {port}"))?;
    Ok(LookSockets { other, elsewhere: open(0)? })
}

/// The thread of the other port: a few questions from each member in a day, and whatever else the internet sends.
pub(super) struct Looks {
    socket: UdpSocket,
    batch: RecvBatch,
    worker: Worker,
    shared: Arc<Shared>,
}

impl Looks {
    pub(super) fn new(socket: UdpSocket, shared: Arc<Shared>) -> Self {
        let counters = shared.counters.last().cloned().unwrap_or_default();
        let batch = RecvBatch::new(LOOK_RECEIVE_MESSAGES);
        Self { socket, batch, worker: Worker::new(counters), shared }
    }

    pub(super) fn run(&mut self) {
        let (shared, port) = (Arc::clone(&self.shared), self.socket.local_port());
        turn_until_stopped(&shared, port, || self.turn());
    }

    fn turn(&mut self) -> io::Result<()> {
        let filled = self.socket.recv_or_wait(&mut self.batch)?;
        let now = clock::now();
        for slot in 0..filled {
            let Some(message) = self.batch.get(slot) else { continue };
            let from = Reach { source: Source::Udp(message.source), local: message.local };
            let Some(bytes) = self.batch.bytes_mut(slot) else { continue };
            let mut out = Sockets { udp: &mut self.socket, shared: &self.shared };
            self.shared.relay.handle_other(now, from, bytes, &mut self.worker, &mut out);
        }
        Ok(())
    }
}
