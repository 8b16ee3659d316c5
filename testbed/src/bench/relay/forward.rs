//! A relay that checks nothing: what the system calls alone cost.
//!
//! It receives and sends as keyrelay does, by the same code and with as many threads, and knows where to by arithmetic: near
//! client 10.64.x.y is far client 10.65.x.y, at the same port.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_types::limits::{RELAY_RECEIVE_MESSAGES, RELAY_THREADS_MAX};
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};

use super::site::NEAR_NET;

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
    let threads: Vec<_> =
        sockets.into_iter().map(|socket| thread::spawn(move || carry(socket))).collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(())
}

fn carry(mut socket: UdpSocket) -> Result<()> {
    socket.let_wait(WAIT)?;
    let mut batch = RecvBatch::new(RELAY_RECEIVE_MESSAGES);
    loop {
        socket.recv_or_wait(&mut batch)?;
        for message in batch.iter() {
            let Some(to) = other_end(message.source) else { continue };
            // What does not get out is lost, as at any router.
            let _ = socket.send(to, None, message.ecn, message.segment_len, message.bytes);
        }
    }
}

fn other_end(source: SocketAddr) -> Option<SocketAddr> {
    let IpAddr::V4(ip) = source.ip() else { return None };
    let [10, net, high, low] = ip.octets() else { return None };
    let net = if net == NEAR_NET { NEAR_NET + 1 } else { NEAR_NET };
    Some((IpAddr::from([10, net, high, low]), source.port()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_is_where_one_came_from() {
        let near: SocketAddr = "10.64.1.2:20000".parse().expect("an address");
        let far = other_end(near).expect("its other end");
        assert_eq!(far.to_string(), "10.65.1.2:20000");
        assert_eq!(other_end(far), Some(near));
        assert_eq!(other_end("192.0.2.1:1".parse().expect("an address")), None);
    }
}
