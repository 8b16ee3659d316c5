//! `meshd pod-check`: what the pods of `helm test` run. Each serves at its own addresses, finds the others by name, exchanges
//! with each over TCP and UDP in every family it has, and is told the address it was seen at: another than its own is NAT.
//!
//! ```text
//! "check NODE\n"  ──>        asks; over TCP and UDP
//!                 <──  "NODE ADDRESS\n"      who answers, and the asker's address as seen there
//! "done NODE\n"   ──>        NODE has exchanged with everybody; over TCP
//! ```
//!
//! Nobody leaves before everybody is done: a pod that ends takes its addresses with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use mesh_types::limits::POD_CHECK_ADDRESSES_MAX;

use crate::args::PodCheckArgs;

/// The longest line: a word, a node's name of 253 bytes or an address.
const LINE_BYTES_MAX: usize = 320;

/// For one attempt. A first handshake between nodes takes a few round trips; attempts are repeated.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Between rounds, and between looks whether the others are done.
const PAUSE: Duration = Duration::from_millis(200);

/// A pod's last answer is lost with its network: how long it stays for it to arrive.
const LINGER: Duration = Duration::from_secs(2);

/// `meshd pod-check`.
pub fn run(args: &PodCheckArgs) -> anyhow::Result<()> {
    ensure!(args.port != 0, "--port: write the port all pods of the check serve at");
    let host = (args.peers.as_str(), args.port);
    let resolve = || std::net::ToSocketAddrs::to_socket_addrs(&host).map(Iterator::collect);
    let check = Check {
        node: args.node_name.clone(),
        serve_at: args.pod_ips.iter().map(|ip| SocketAddr::new(*ip, args.port)).collect(),
        others: args.count.saturating_sub(1) as usize,
        linger: LINGER,
    };
    check.run(resolve, Duration::from_secs(args.timeout_s))?;
    tracing::info!(
        node = check.node,
        "exchanged with {} nodes over TCP and UDP, without NAT, at {}",
        check.others,
        args.pod_ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

struct Check {
    node: String,
    serve_at: Vec<SocketAddr>,
    /// How many other nodes there are.
    others: usize,
    linger: Duration,
}

/// A way to a node that has to work: its family and the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    v6: bool,
    udp: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.udp { "UDP" } else { "TCP" };
        write!(f, "{protocol} over IPv{}", if self.v6 { 6 } else { 4 })
    }
}

/// Names of nodes that said they are done.
type Done = Arc<Mutex<BTreeSet<String>>>;

impl Check {
    fn run(
        &self,
        resolve: impl Fn() -> std::io::Result<Vec<SocketAddr>>,
        timeout: Duration,
    ) -> anyhow::Result<()> {
        ensure!(!self.serve_at.is_empty(), "MESHD_POD_IPS names no address of this pod");
        let end = Instant::now() + timeout;
        let done = Done::default();
        for address in &self.serve_at {
            serve(*address, &self.node, &done)?;
        }
        let mut progress = Progress::default();
        while !progress.is_complete(self) {
            match resolve() {
                Ok(found) => progress.round(self, found)?,
                Err(error) => progress.trouble = format!("the name of the peers: {error}"),
            }
            if Instant::now() > end {
                bail!("{}", progress.complaint(self));
            }
            if !progress.is_complete(self) {
                std::thread::sleep(PAUSE);
            }
        }
        self.part(progress, &done, end)
    }

    /// Tells everybody, and waits to be told by everybody.
    fn part(&self, progress: Progress, done: &Done, end: Instant) -> anyhow::Result<()> {
        let mut untold = progress.nodes;
        loop {
            untold.retain(|_, node| tcp(node.address, &format!("done {}\n", self.node)).is_err());
            let heard = done.lock().unwrap_or_else(PoisonError::into_inner).len();
            if untold.is_empty() && heard >= self.others {
                std::thread::sleep(self.linger);
                return Ok(());
            }
            ensure!(
                Instant::now() <= end,
                "this node reaches all others, but {heard} of {} have reached all: see their logs",
                self.others
            );
            std::thread::sleep(PAUSE);
        }
    }

    fn ways(&self) -> impl Iterator<Item = Way> {
        [false, true]
            .into_iter()
            .filter(|v6| self.serve_at.iter().any(|own| own.is_ipv6() == *v6))
            .flat_map(|v6| [false, true].map(|udp| Way { v6, udp }))
    }

    /// One exchange; the node that answered.
    fn exchange(&self, to: SocketAddr, way: Way) -> anyhow::Result<String> {
        let question = format!("check {}\n", self.node);
        let answer = if way.udp { udp(to, &question) } else { tcp(to, &question) };
        let answer = answer.with_context(|| format!("{to}, {way}"))?;
        let (node, seen) = answer.trim_end().split_once(' ').context("not an answer of ours")?;
        let seen: IpAddr = seen.parse().context("not an answer of ours")?;
        if !self.serve_at.iter().any(|own| own.ip() == seen) {
            return Err(Nat { node: node.to_owned(), to, way, seen }.into());
        }
        Ok(node.to_owned())
    }
}

/// The one finding that waiting does not heal.
#[derive(Debug)]
struct Nat {
    node: String,
    to: SocketAddr,
    way: Way,
    seen: IpAddr,
}

impl std::error::Error for Nat {}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, to, way, seen } = self;
        write!(
            f,
            "node {node} ({to}, {way}) saw this pod at {seen}: something translates addresses of pods; \
             look for masquerading of clusterCIDRs on this node"
        )
    }
}

#[derive(Debug)]
struct Reached {
    /// For the last words.
    address: SocketAddr,
    ways: BTreeSet<Way>,
}

#[derive(Debug, Default)]
struct Progress {
    nodes: BTreeMap<String, Reached>,
    trouble: String,
}

impl Progress {
    /// Asks every address in every way that is still open.
    fn round(&mut self, check: &Check, found: Vec<SocketAddr>) -> anyhow::Result<()> {
        let mut known = 0usize;
        for to in found.into_iter().filter(|to| !check.serve_at.contains(to)) {
            known += 1;
            ensure!(
                known <= POD_CHECK_ADDRESSES_MAX,
                "the name of the peers has more than {POD_CHECK_ADDRESSES_MAX} addresses"
            );
            for way in check.ways().filter(|way| way.v6 == to.is_ipv6()) {
                match check.exchange(to, way) {
                    Ok(node) if node == check.node => {}
                    Ok(node) => {
                        let reached = self.nodes.entry(node);
                        let reached =
                            reached.or_insert(Reached { address: to, ways: BTreeSet::new() });
                        reached.ways.insert(way);
                    }
                    Err(error) if error.is::<Nat>() => return Err(error),
                    Err(error) => self.trouble = crate::one_line(&error),
                }
            }
        }
        if known == 0 && check.others > 0 {
            self.trouble = "the name of the peers leads to nobody else yet".to_owned();
        }
        Ok(())
    }

    fn is_complete(&self, check: &Check) -> bool {
        let all = check.ways().count();
        self.nodes.values().filter(|node| node.ways.len() == all).count() >= check.others
    }

    fn complaint(&self, check: &Check) -> String {
        let partly = self.nodes.iter().filter_map(|(name, node)| {
            let open: Vec<String> = check
                .ways()
                .filter(|way| !node.ways.contains(way))
                .map(|way| way.to_string())
                .collect();
            (!open.is_empty()).then(|| format!("node {name} not by {}", open.join(", ")))
        });
        let mut parts = vec![format!("{} of {} other nodes found", self.nodes.len(), check.others)];
        parts.extend(partly);
        parts.push(format!("last: {}", self.trouble));
        parts.join("; ")
    }
}

/// Answers at one address, TCP and UDP, until the process ends.
fn serve(at: SocketAddr, node: &str, done: &Done) -> anyhow::Result<()> {
    let listener = TcpListener::bind(at).with_context(|| format!("cannot listen at {at} (TCP)"))?;
    let socket = UdpSocket::bind(at).with_context(|| format!("cannot listen at {at} (UDP)"))?;
    let name = node.to_owned();
    std::thread::spawn(move || {
        let mut buffer = [0; LINE_BYTES_MAX];
        loop {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            if buffer.get(..length).is_some_and(|text| text.starts_with(b"check ")) {
                // One that is gone asks no more.
                let _ = socket.send_to(answer(&name, from).as_bytes(), from);
            }
        }
    });
    let (name, done) = (node.to_owned(), Arc::clone(done));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                // One that fails asks again.
                Ok(stream) => drop(answer_tcp(stream, &name, &done)),
                Err(_) => std::thread::sleep(PAUSE), // out of files, most likely
            }
        }
    });
    Ok(())
}

fn answer_tcp(mut stream: TcpStream, name: &str, done: &Done) -> std::io::Result<()> {
    stream.set_read_timeout(Some(ATTEMPT_TIMEOUT))?;
    let from = stream.peer_addr()?;
    let mut text = String::new();
    std::io::Read::by_ref(&mut stream).take(LINE_BYTES_MAX as u64).read_to_string(&mut text)?;
    stream.write_all(answer(name, from).as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(node) = text.strip_prefix("done ").map(str::trim_end)
        && done.len() < POD_CHECK_ADDRESSES_MAX
    {
        done.insert(node.to_owned());
    }
    Ok(())
}

fn answer(node: &str, from: SocketAddr) -> String {
    format!("{node} {}\n", from.ip())
}

fn tcp(to: SocketAddr, question: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, ATTEMPT_TIMEOUT)?;
    stream.set_read_timeout(Some(ATTEMPT_TIMEOUT))?;
    stream.write_all(question.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut text = String::new();
    stream.take(LINE_BYTES_MAX as u64).read_to_string(&mut text)?;
    Ok(text)
}

fn udp(to: SocketAddr, question: &str) -> anyhow::Result<String> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    // What answers from another address is not heard.
    socket.connect(to)?;
    socket.set_read_timeout(Some(ATTEMPT_TIMEOUT))?;
    socket.send(question.as_bytes())?;
    let mut buffer = [0; LINE_BYTES_MAX];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// Addresses with ports free for both protocols a moment ago.
    fn addresses(ips: &[&str]) -> Vec<SocketAddr> {
        let free = |ip: &&str| TcpListener::bind((*ip, 0)).unwrap().local_addr().unwrap();
        ips.iter().map(free).collect()
    }

    fn check(node: &str, serve_at: &[SocketAddr], others: usize) -> Check {
        let linger = Duration::from_millis(300);
        Check { node: node.into(), serve_at: serve_at.to_vec(), others, linger }
    }

    #[test]
    fn three_nodes_find_one_another_in_both_families_and_part_together() {
        let places: Vec<Vec<SocketAddr>> =
            (0..3).map(|_| addresses(&["127.0.0.1", "::1"])).collect();
        let all: Vec<SocketAddr> = places.iter().flatten().copied().collect();
        std::thread::scope(|scope| {
            let jobs: Vec<_> = ["a", "b", "c"]
                .iter()
                .zip(&places)
                .map(|(node, own)| {
                    let all = all.clone();
                    scope.spawn(move || {
                        check(node, own, 2).run(|| Ok(all.clone()), Duration::from_secs(30))
                    })
                })
                .collect();
            for job in jobs {
                job.join().unwrap().unwrap();
            }
        });
    }

    #[test]
    fn a_node_seen_at_another_address_fails_at_once_and_says_where_it_was_seen() {
        let (there, own) = (addresses(&["127.0.0.1"]), addresses(&["127.0.0.9"]));
        serve(there[0], "b", &Done::default()).unwrap();
        let error =
            check("a", &own, 1).run(|| Ok(there.clone()), Duration::from_secs(30)).unwrap_err();
        let text = crate::one_line(&error);
        assert!(text.contains("node b") && text.contains("saw this pod at 127.0.0.1"), "{text}");
    }

    #[test]
    fn silence_is_told_with_what_is_missing() {
        let (there, own) = (addresses(&["127.0.0.1"]), addresses(&["127.0.0.1"]));
        let error = check("a", &own, 1).run(|| Ok(there.clone()), Duration::ZERO).unwrap_err();
        let text = crate::one_line(&error);
        assert!(text.contains("0 of 1 other nodes") && text.contains("127.0.0.1"), "{text}");
    }

    #[test]
    fn nobody_leaves_before_the_others_are_done() {
        let (there, own) = (addresses(&["127.0.0.1"]), addresses(&["127.0.0.1"]));
        serve(there[0], "b", &Done::default()).unwrap();
        let error =
            check("a", &own, 1).run(|| Ok(there.clone()), Duration::from_secs(1)).unwrap_err();
        assert!(crate::one_line(&error).contains("0 of 1 have reached all"), "{error:#}");
    }
}
