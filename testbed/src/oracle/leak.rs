//! Leaks on purpose: packets a node without a guard would send in clear.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};

use super::{Oracle, Report, Watch};
use crate::canary::Canary;
use crate::lab::{Lab, Namespace};

/// The discard port (RFC 863).
const PORT: u16 = 9;

/// One node and where it leaks to: pod addresses, and an ordinary address that only the canary gives away.
#[derive(Debug, Clone)]
pub struct Leak {
    pub node: Namespace,
    pub targets: Vec<SocketAddr>,
}

impl Leak {
    /// Leaks from `node` to `targets`, port 9.
    pub fn new(node: &Namespace, targets: &[std::net::IpAddr]) -> Self {
        let targets = targets.iter().map(|address| SocketAddr::new(*address, PORT)).collect();
        Self { node: node.clone(), targets }
    }

    /// Sends one datagram to each target; how many left.
    pub fn send(&self, watch: &Watch) -> Result<u64> {
        let mut payload = vec![0; 256];
        watch.canary.fill(0, &mut payload);
        self.node.run_in(|| {
            let mut sent = 0;
            for target in &self.targets {
                socket_towards(target)?
                    .send_to(&payload, target)
                    .with_context(|| format!("{} cannot leak to {target}", self.node.name()))?;
                sent += 1;
            }
            Ok(sent)
        })
    }
}

/// Sends the canary to each of these from where the caller stands; how many there is a way to from there. What becomes of it
/// then is not asked.
pub fn send_canary(canary: &Canary, targets: &[SocketAddr]) -> Result<usize> {
    let mut payload = [0; 256];
    canary.fill(0, &mut payload);
    let mut routed = 0;
    for target in targets {
        // What a filter of this machine stops is an error to the sender, too.
        let sent = socket_towards(target)?.send_to(&payload, target);
        routed +=
            usize::from(!sent.is_err_and(|error| error.kind() == ErrorKind::NetworkUnreachable));
    }
    Ok(routed)
}

fn socket_towards(target: &SocketAddr) -> std::io::Result<UdpSocket> {
    UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })
}

/// Leaks from every node in `leaks` and fails unless each leak was caught on that node's own wire. Only sound
/// before a guard stands.
pub fn prove(lab: &Lab, watch: &Watch, leaks: &[Leak]) -> Result<Report> {
    let oracle = Oracle::start(lab, watch)?;
    let mut sent = Vec::new();
    for leak in leaks {
        sent.push((leak.node.name(), leak.send(watch)?));
    }
    let report = oracle.finish()?;
    for (node, count) in sent {
        ensure!(
            report.plaintext_at(node) >= count,
            "{node} leaked {count} packets on purpose and the oracle caught {}: it cannot be believed",
            report.plaintext_at(node)
        );
    }
    Ok(report)
}
