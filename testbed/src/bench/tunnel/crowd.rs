//! Many peers of one node, answered by one process: each has its key, its port and a session, and says nothing else.

use std::net::{SocketAddr, UdpSocket as StdSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use mesh_core::packet::Ecn;
use mesh_core::tunnel::engine::{EngineFactory as _, OwnKeyId};
use mesh_core::tunnel::{PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::time::MonoTime;
use rustix::event::{PollFd, PollFlags, poll};
use wg_engine::BoringFactory;

use crate::lab::{Daemon, run_in_netns};

/// More have no ports and no prefixes.
const COUNT_MAX: usize = 1_024;

const FIRST_PORT: u16 = 20_000;

/// Nobody listens there (RFC 863).
const DISCARD_PORT: u16 = 9;

/// From one greeting to the next: 500 handshakes a second.
const BETWEEN: Duration = Duration::from_millis(2);

/// How long all of them may take to have a session.
const GREETED: Duration = Duration::from_secs(60);

/// Between looks at timers: less often than anything is due, so that the crowd costs nothing while others are measured.
const TICK: Duration = Duration::from_millis(500);

/// Whoever was heard within this time has a session now (they end after 180 s: whitepaper section 6.1).
const LATELY: Duration = Duration::from_secs(30);

/// One of the crowd, by its number.
#[derive(Debug, Clone)]
pub(super) struct Member {
    number: usize,
    pub(super) key: PrivateKey,
}

#[derive(Debug, Clone, clap::Args)]
pub struct CrowdOptions {
    /// Public key of the node whose peers these are
    #[arg(long)]
    of: PublicKey,
    /// How many
    #[arg(long)]
    count: usize,
}

impl Member {
    pub(super) fn name(&self) -> String {
        format!("crowd-{}", self.number)
    }

    /// Below 10.244, where the two nodes are.
    pub(super) fn prefix(&self) -> String {
        format!("10.{}.{}.0/24", 240 + (self.number >> 8), self.number & 255)
    }

    pub(super) fn endpoint(&self, host: &str) -> String {
        format!("{host}:{}", self.port())
    }

    fn port(&self) -> u16 {
        FIRST_PORT + u16::try_from(self.number).unwrap_or(0)
    }

    fn address(&self) -> String {
        format!("10.{}.{}.1:{DISCARD_PORT}", 240 + (self.number >> 8), self.number & 255)
    }
}

/// The first `count` of them. Their keys are known to everybody: nothing of them is secret.
pub(super) fn members(count: usize) -> Vec<Member> {
    let member = |number: usize| {
        let mut bytes = [0x42; 32];
        // Not in the first byte, whose low bits mean nothing in a private key (RFC 7748 section 5).
        bytes[8..16].copy_from_slice(&(number as u64).to_le_bytes());
        Member { number, key: PrivateKey::from_bytes(bytes) }
    };
    (0..count.min(COUNT_MAX)).map(member).collect()
}

/// How long greeting so many takes, where each answers.
pub(super) fn greeting(count: usize) -> Duration {
    let sent = u32::try_from(count).unwrap_or(0);
    if sent == 0 { Duration::ZERO } else { BETWEEN * sent + 2 * TICK }
}

/// One packet from the node at `netns` to each, until all have been heard lately: the sessions of an earlier measurement
/// may have ended.
pub(super) fn greet(netns: &Path, crowd: &Daemon, count: usize) -> Result<()> {
    let end = Instant::now() + GREETED;
    let all = members(count);
    loop {
        run_in_netns(netns, || {
            let socket = StdSocket::bind("0.0.0.0:0")?;
            for member in &all {
                // A tunnel without a session yet is no error here.
                let _ = socket.send_to(b"?", member.address());
                std::thread::sleep(BETWEEN);
            }
            Ok(())
        })?;
        // The crowd says how many at each of its ticks.
        std::thread::sleep(2 * TICK);
        let log = crowd.log();
        let heard = log.lines().filter_map(|line| line.strip_prefix("heard ")).next_back();
        if heard.is_some_and(|heard| heard == count.to_string()) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end && crowd.is_alive(),
            "only {} of {count} peers answered: {}",
            heard.unwrap_or("0"),
            crate::lab::last_lines(&log)
        );
    }
}

struct Answering {
    socket: StdSocket,
    tunnel: Tunnel<BoringFactory>,
    /// Packets received.
    heard: u64,
    heard_last: Option<MonoTime>,
}

/// Answers as all of them until it is killed; says how many have been heard lately.
pub(in super::super) fn answer(options: &CrowdOptions) -> Result<()> {
    use std::io::Write as _;
    ensure!(options.count <= COUNT_MAX, "--count is at most {COUNT_MAX}");
    let everybody: Result<Vec<Answering>> =
        members(options.count).iter().map(|member| start(member, options.of)).collect();
    let mut everybody = everybody?;
    let (mut said, mut ticked) = (None, netcfg::clock::now());
    loop {
        let due = TICK.saturating_sub(netcfg::clock::now().since(ticked));
        let asked = wait(&everybody, due)?;
        let now = netcfg::clock::now();
        for place in asked {
            serve(&mut everybody[place], now);
        }
        if now.since(ticked) < TICK {
            continue;
        }
        ticked = now;
        for one in &mut everybody {
            serve(one, now);
        }
        let lately = |at: MonoTime| now.since(at) < LATELY;
        let heard = everybody.iter().filter(|one| one.heard_last.is_some_and(lately)).count();
        if said != Some(heard) {
            said = Some(heard);
            writeln!(std::io::stdout(), "heard {heard}")?;
        }
    }
}

/// Who has something to read, by their places; for so long at most.
fn wait(everybody: &[Answering], longest: Duration) -> Result<Vec<usize>> {
    let mut sockets: Vec<_> =
        everybody.iter().map(|one| PollFd::new(&one.socket, PollFlags::IN)).collect();
    match poll(&mut sockets, Some(&longest.try_into()?)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let asked = sockets.iter().enumerate().filter(|(_, socket)| !socket.revents().is_empty());
    Ok(asked.map(|(place, _)| place).collect())
}

fn start(member: &Member, of: PublicKey) -> Result<Answering> {
    let socket = StdSocket::bind(("0.0.0.0", member.port()))
        .with_context(|| format!("cannot bind port {}", member.port()))?;
    socket.set_nonblocking(true)?;
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), &member.key);
    let mut tunnel = Tunnel::new(TunnelConfig::default(), factory, rand::random());
    let any: IpNet = "0.0.0.0/0".parse()?;
    let peer = PeerConfig {
        key: of,
        preshared: None,
        allowed_ips: vec![any],
        candidates: Vec::new(),
        keepalive: None,
        mtu: 1420,
        role: Default::default(),
        relays: Vec::new(),
    };
    let refused = tunnel.set_peers(netcfg::clock::now(), &[peer]);
    ensure!(refused.is_empty(), "{refused:?}");
    Ok(Answering { socket, tunnel, heard: 0, heard_last: None })
}

fn serve(one: &mut Answering, now: MonoTime) {
    let mut buffer = [0; 2048];
    while let Ok((length, source)) = one.socket.recv_from(&mut buffer) {
        let meta =
            UdpMeta { source, local: None, segment_len: 0, ecn: Ecn::from_bits(0), carried: None };
        one.tunnel.handle_udp_input(now, &meta, &mut buffer[..length]);
        while one.tunnel.poll_tun().is_some() {}
    }
    one.tunnel.handle_timeout(now);
    one.tunnel.flush(now);
    while let Some(transmit) = one.tunnel.poll_transmit() {
        let (to, bytes): (SocketAddr, &[u8]) = (transmit.dst, transmit.bytes);
        // The node may be gone already.
        let _ = one.socket.send_to(bytes, to);
    }
    let heard = one.tunnel.counters().rx_packets;
    if heard != one.heard {
        (one.heard, one.heard_last) = (heard, Some(now));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn members_differ_in_everything_and_keep_off_the_nodes() {
        let all = members(COUNT_MAX + 1);
        assert_eq!(all.len(), COUNT_MAX);
        let keys: BTreeSet<_> =
            all.iter().map(|member| wg_engine::public_key(&member.key)).collect();
        let prefixes: BTreeSet<_> = all.iter().map(Member::prefix).collect();
        let ports: BTreeSet<_> = all.iter().map(Member::port).collect();
        assert_eq!((keys.len(), prefixes.len(), ports.len()), (COUNT_MAX, COUNT_MAX, COUNT_MAX));
        assert!(prefixes.iter().all(|prefix| !prefix.starts_with("10.244.")));
    }
}
