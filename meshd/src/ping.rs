//! `meshd ping`: the way to another node, as the daemon knows it and as measured through the tunnel.
//!
//! The measure is a TCP connection to a port of the other node's overlay address where nobody listens: its refusal is a round
//! trip through the tunnel, and takes neither a privilege nor a program on the other side.

use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use mesh_types::defaults;
use mesh_types::limits::PING_COUNT_MAX;
use mesh_types::net::overlay_address;
use mesh_types::status::{PathKind, PeerStatus, Status};
use serde::{Deserialize, Serialize};

use crate::args::PingArgs;
use crate::status;

/// No answer within this time is none.
const PATIENCE: Duration = Duration::from_secs(1);

/// An address that left so many questions unanswered, and answered none, is asked no more.
const UNANSWERED_MAX: usize = 3;

/// The way from one node to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ping {
    pub node: String,
    /// The other, as this daemon sees it.
    pub peer: PeerStatus,
    pub measures: Vec<Measure>,
}

/// Questions to one overlay address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    pub address: IpAddr,
    pub sent: usize,
    /// Of those that were answered, in their order.
    pub rtts_ms: Vec<f64>,
    /// What came of those that were not, in words; empty where all were.
    pub problem: String,
}

/// `meshd ping`.
pub fn run(args: &PingArgs) -> anyhow::Result<()> {
    let body = status::fetch(&args.run_dir)?;
    let status: Status = serde_json::from_slice(&body).context("read the daemon's answer")?;
    let ping = ping(&status, &args.node, args.count)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &ping).context("print")?;
        writeln!(out).context("print")?;
    } else {
        out.write_all(text(&ping).as_bytes()).context("print")?;
    }
    let answered = ping.measures.iter().any(|measure| !measure.rtts_ms.is_empty());
    ensure!(answered || args.json, "node {} does not answer", ping.peer.node);
    Ok(())
}

fn ping(status: &Status, node: &str, count: u8) -> anyhow::Result<Ping> {
    let Some(peer) = status.peers.iter().find(|peer| peer.node.as_str() == node) else {
        bail!("{}", no_peer(status, node));
    };
    let overlay = peer.allowed_ips.iter().filter_map(|prefix| overlay_address(*prefix));
    // Nobody listens on the TCP port of the same number.
    let measures = overlay.map(|ip| measure(SocketAddr::new(ip, defaults::UDP_PORT), count));
    Ok(Ping { node: status.node.to_string(), peer: peer.clone(), measures: measures.collect() })
}

/// Why `node` is no peer, in words.
pub fn no_peer(status: &Status, node: &str) -> String {
    if status.node.as_str() == node {
        return format!("node {node} is the one that was asked: name another");
    }
    let why: Vec<&str> = status
        .refused
        .iter()
        .filter(|refused| refused.node == node)
        .map(|refused| refused.reason.as_str())
        .collect();
    match why.is_empty() {
        true => format!("node {} knows no node {node}", status.node),
        false => format!("node {node} is not meshed with {}: {}", status.node, why.join("; ")),
    }
}

fn measure(address: SocketAddr, count: u8) -> Measure {
    let mut measure =
        Measure { address: address.ip(), sent: 0, rtts_ms: Vec::new(), problem: String::new() };
    for _ in 0..count.min(PING_COUNT_MAX) {
        measure.sent += 1;
        let began = Instant::now();
        match TcpStream::connect_timeout(&address, PATIENCE).map(drop) {
            // Somebody listens after all: as good an answer.
            Ok(()) => measure.rtts_ms.push(began.elapsed().as_secs_f64() * 1000.0),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                measure.rtts_ms.push(began.elapsed().as_secs_f64() * 1000.0);
            }
            Err(error) => measure.problem = error.to_string(),
        }
        if measure.rtts_ms.is_empty() && measure.sent == UNANSWERED_MAX {
            break;
        }
    }
    measure
}

/// What people read.
pub fn text(ping: &Ping) -> String {
    let peer = &ping.peer;
    let path = match (peer.path, peer.endpoint) {
        (PathKind::None, _) => "no path".to_owned(),
        (path, endpoint) => {
            let to = endpoint.map(|endpoint| format!(" to {endpoint}")).unwrap_or_default();
            format!("{}{to}", status::path_word(path))
        }
    };
    let handshake = match peer.last_handshake_s {
        Some(age) => format!("last handshake {age} s ago"),
        None => "no handshake yet".to_owned(),
    };
    let took = peer.rtt_ms.map(|rtt| format!(", which took {rtt:.1} ms")).unwrap_or_default();
    let mut text = format!("{} -> {}: {path}, {handshake}{took}\n", ping.node, peer.node);
    if !peer.problem.is_empty() {
        text.push_str(&format!("  problem: {}\n", peer.problem));
    }
    for measure in &ping.measures {
        text.push_str(&measure_text(measure));
    }
    text
}

fn measure_text(measure: &Measure) -> String {
    let Measure { address, sent, rtts_ms, problem } = measure;
    let mut sorted = rtts_ms.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2);
    let times = match (sorted.first(), median, sorted.last()) {
        (Some(min), Some(median), Some(max)) => {
            format!(", {min:.1}/{median:.1}/{max:.1} ms min/median/max")
        }
        _ => String::new(),
    };
    let problem = if problem.is_empty() { String::new() } else { format!(" ({problem})") };
    format!("  {address}: {} of {sent} answered{times}{problem}\n", sorted.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::sample;

    #[test]
    fn a_refused_connection_is_a_round_trip_and_a_listener_answers_too() {
        // Bound and closed again: nobody listens there, and loopback refuses.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        assert_eq!(measure(address, 2).rtts_ms.len(), 2);
        drop(listener);
        let measure = measure(address, PING_COUNT_MAX + 1);
        assert_eq!(measure.rtts_ms.len(), usize::from(PING_COUNT_MAX));
        assert_eq!(measure.problem, "");
    }

    #[test]
    fn an_address_without_a_way_is_given_up_soon_and_says_why() {
        // An address of no family the socket could use at once: multicast takes no connection.
        let measure = measure("224.0.0.1:9".parse().expect("address"), PING_COUNT_MAX);
        assert_eq!((measure.sent, measure.rtts_ms.len()), (UNANSWERED_MAX, 0));
        assert!(!measure.problem.is_empty());
    }

    #[test]
    fn a_node_that_is_no_peer_says_why() {
        let status = status::build(&sample().snapshot());
        let told = |node| format!("{:#}", ping(&status, node, 1).expect_err("no peer"));
        assert!(told("node-4").contains("it has no pod CIDR"));
        assert!(told("node-1").contains("name another"));
        assert!(told("node-9").contains("knows no node node-9"));
    }

    #[test]
    fn the_text_says_path_endpoint_handshake_and_measure() {
        let status = status::build(&sample().snapshot());
        let peer = status.peers[0].clone();
        let measures = vec![Measure {
            address: "10.244.2.1".parse().expect("address"),
            sent: 4,
            rtts_ms: vec![3.0, 1.0, 2.0],
            problem: "timed out".into(),
        }];
        let text = text(&Ping { node: "node-1".into(), peer, measures });
        assert_eq!(
            text,
            "node-1 -> node-2: direct to 203.0.113.2:15190, last handshake 37 s ago, which took 1.5 ms\n  \
             10.244.2.1: 3 of 4 answered, 1.0/2.0/3.0 ms min/median/max (timed out)\n"
        );
    }
}
