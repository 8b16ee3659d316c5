//! A relay that checks nothing: what the system calls alone cost.
//!
//! It receives and sends as keyrelay does, by the same code of [`netcfg::udp`] and with as many threads: it gathers them while
//! one is enough, makes bursts of datagrams that came one by one, and names the address it sends from. Where to it knows by
//! arithmetic: near client 10.64.x.y is far client 10.65.x.y, at the same port.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_types::limits::{RELAY_RECEIVE_MESSAGES, RELAY_THREADS_MAX};
use netcfg::clock;
use netcfg::udp::{Carrying, Glue, Received, RecvBatch, UdpOptions, UdpSocket};

use super::site::{NEAR_NET, RELAY};

#[derive(Debug, Clone, clap::Args)]
pub struct ForwardOptions {
    #[arg(long)]
    port: u16,
}

/// An idle thread wakes so often, as one of keyrelay's.
const WAIT: Duration = Duration::from_millis(200);

/// Forwards until it is ended.
pub(in super::super) fn run(options: &ForwardOptions) -> Result<()> {
    let options = UdpOptions { port: options.port, ..UdpOptions::default() };
    let threads =
        thread::available_parallelism().map_or(1, usize::from).clamp(1, RELAY_THREADS_MAX);
    let sockets = UdpSocket::open_group(&options, threads, &[])?;
    writeln!(std::io::stdout(), "forwarding with {threads} threads").context("say so")?;
    let threads: Vec<_> = sockets
        .into_iter()
        .zip(Carrying::of(threads))
        .map(|(socket, carrying)| thread::spawn(move || carry(socket, carrying)))
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(())
}

fn carry(mut socket: UdpSocket, mut carrying: Carrying) -> Result<()> {
    socket.let_wait(WAIT)?;
    carrying.gather(&socket);
    let (mut batch, mut glue) = (RecvBatch::new(RELAY_RECEIVE_MESSAGES), Glue::default());
    loop {
        let filled = socket.recv_or_wait(&mut batch)?;
        carrying.measure(clock::now(), filled, &socket);
        glue.bursts(&mut batch, Burst::of, |burst, bytes| {
            let Some((to, from)) = other_end(burst.source) else { return };
            // What does not get out is lost, as at any router.
            let _ = socket.send(to, Some(from), burst.ecn, burst.segment_len, bytes);
        });
    }
}

/// What datagrams that go on together have in common; the address they came to as well, as with keyrelay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Burst {
    source: SocketAddr,
    local: Option<IpAddr>,
    segment_len: usize,
    ecn: u8,
}

impl Burst {
    fn of(message: &Received<'_>) -> Option<Self> {
        let Received { source, local, segment_len, ecn, .. } = *message;
        Some(Self { source, local, segment_len, ecn })
    }
}

/// The client to send to, and the address of ours it knows.
fn other_end(source: SocketAddr) -> Option<(SocketAddr, IpAddr)> {
    let IpAddr::V4(ip) = source.ip() else { return None };
    let [10, net, high, low] = ip.octets() else { return None };
    let [near, far] = RELAY.map(IpAddr::from);
    let (net, from) = if net == NEAR_NET { (NEAR_NET + 1, far) } else { (NEAR_NET, near) };
    Some(((IpAddr::from([10, net, high, low]), source.port()).into(), from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_is_where_one_came_from() {
        let near: SocketAddr = "10.64.1.2:20000".parse().expect("an address");
        let (far, from) = other_end(near).expect("its other end");
        assert_eq!((far.to_string(), from), ("10.65.1.2:20000".to_owned(), RELAY[1].into()));
        assert_eq!(other_end(far), Some((near, RELAY[0].into())));
        assert_eq!(other_end("192.0.2.1:1".parse().expect("an address")), None);
    }
}
