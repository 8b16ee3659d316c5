//! What pods say to each other, checked byte by byte.
//!
//! Every check opens its sockets on threads inside the two pods' network namespaces and runs against a deadline. A
//! pair is good only when all bytes arrived unchanged both ways *and* the receiver saw the sender's own address.

mod icmp;
mod probe;
pub mod sctp;
mod tcp;
mod udp;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_types::status::PathKind;
use serde::Serialize;

use crate::canary::Canary;
use crate::lab::Pod;
use crate::parallel;

pub(crate) use icmp::first_answer;
pub use probe::{Gap, GapProbe};
pub use tcp::throughput_gbps;
pub(crate) use udp::would_block;

/// Longest any step of a check may take. A first handshake needs a few round trips; retries come after 5 s.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(8);

/// Bytes sent each way over TCP.
pub const TCP_BYTES: usize = 1 << 20;

/// One end of a pair: a network namespace and its addresses.
#[derive(Debug, Clone)]
pub struct Party {
    pub name: String,
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
}

impl Party {
    pub fn of(pod: &Pod) -> Self {
        Self { name: pod.name.clone(), netns: pod.netns(), addresses: pod.addresses.clone() }
    }

    /// The address of a family.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let found = self.addresses.iter().find(|address| Family::of(**address) == family);
        found
            .copied()
            .with_context(|| format!("{} has no IPv{} address", self.name, family.number()))
    }

    fn run_in<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        crate::lab::run_in_netns(&self.netns, work)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

impl Serialize for Family {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.number())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// 1 MiB each way, every byte compared.
    Tcp,
    /// A small datagram and one of 8 KiB that has to be fragmented, both echoed.
    Udp,
    /// Echo request and reply.
    Icmp,
}

/// One ordered pair, family and protocol.
#[derive(Debug, Clone, Serialize)]
pub struct PairResult {
    pub from: String,
    pub to: String,
    pub family: Family,
    pub protocol: Protocol,
    pub ok: bool,
    pub rtt_ms: Option<f64>,
    /// How packets from the one's node to the other's travel; none within a node, or where nobody looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathKind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Checks one pair.
pub fn check(
    from: &Party,
    to: &Party,
    family: Family,
    protocol: Protocol,
    canary: &Canary,
) -> PairResult {
    let outcome = match protocol {
        Protocol::Tcp => tcp::check(from, to, family, canary),
        Protocol::Udp => udp::check(from, to, family, canary),
        Protocol::Icmp => icmp::check(from, to, family, canary),
    };
    PairResult {
        from: from.name.clone(),
        to: to.name.clone(),
        family,
        protocol,
        ok: outcome.is_ok(),
        rtt_ms: outcome.as_ref().ok().map(|rtt| rtt.as_secs_f64() * 1e3),
        path: None,
        error: outcome.err().map(|error| format!("{error:#}")),
    }
}

/// Checks every ordered pair in both families and all protocols, at most `parallel` at a time, in a fixed order.
pub fn matrix(
    parties: &[Party],
    canary: &Canary,
    parallel: usize,
    progress: impl Fn(&PairResult) + Sync,
) -> Vec<PairResult> {
    let jobs = jobs(parties);
    parallel::run(
        &jobs,
        parallel,
        |_| [(); 0],
        |(from, to, family, protocol)| {
            let result = check(from, to, *family, *protocol, canary);
            progress(&result);
            result
        },
    )
}

type Job<'a> = (&'a Party, &'a Party, Family, Protocol);

fn jobs(parties: &[Party]) -> Vec<Job<'_>> {
    let mut jobs = Vec::new();
    for from in parties {
        for to in parties.iter().filter(|to| to.name != from.name) {
            for family in [Family::V4, Family::V6] {
                for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
                    jobs.push((from, to, family, protocol));
                }
            }
        }
    }
    jobs
}

/// "and that the receiver saw the true source address".
fn check_source(seen: IpAddr, from: &Party, family: Family) -> Result<()> {
    let expected = from.address(family)?;
    ensure!(
        seen == expected,
        "the receiver saw {seen} instead of {expected}: somebody translates addresses"
    );
    Ok(())
}

fn unspecified(family: Family) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::from(([0, 0, 0, 0], 0)),
        Family::V6 => SocketAddr::from(([0u16; 8], 0)),
    }
}
