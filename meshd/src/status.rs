//! `meshd status`: the document the daemon builds, and the table people read.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_core::tunnel::config::PeerSnapshot;
use mesh_core::tunnel::sight::{self, Sight};
use mesh_types::key::PublicKey;
use mesh_types::nat::{Filtering, Mapping, Nat};
use mesh_types::status::{
    KeyrelayStatus, Over, PathKind, PeerStatus, RefusedNode, STATUS_VERSION, Status,
};

use crate::args::StatusArgs;
use crate::ask::{Answer, ask};
use crate::config;
use crate::view::{Facts, PeerFacts, RelayFacts, Snapshot};

/// How long a daemon may take to answer before we say that it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The document behind `meshd status --json`.
pub fn build(snapshot: &Snapshot) -> Status {
    let Snapshot { identity, facts, conditions, data, .. } = snapshot;
    let seen: BTreeMap<_, _> = data.peers.iter().map(|seen| (seen.key, seen)).collect();
    Status {
        version: STATUS_VERSION,
        node: identity.node.clone(),
        site: facts.site.to_string(),
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        public_key: identity.public_key,
        listen_port: identity.listen_port,
        endpoints: facts.endpoints.clone(),
        cluster_prefixes: identity.prefixes.as_slice().to_vec(),
        pod_cidrs: facts.pod_cidrs.clone(),
        mtu: facts.mtu,
        ready: conditions.iter().all(|condition| condition.ok),
        conditions: conditions.clone(),
        peers: facts.peers.iter().map(|peer| peer_status(peer, &seen, snapshot)).collect(),
        keyrelays: facts.relays.iter().map(|relay| relay_status(relay, &seen, snapshot)).collect(),
        nat: nat_of(facts, &seen),
        refused: facts
            .refused
            .iter()
            .map(|node| RefusedNode { node: node.node.clone(), reason: node.reason.clone() })
            .collect(),
        drops: data.drops.clone(),
    }
}

/// `meshd status`.
pub fn print(args: &StatusArgs) -> anyhow::Result<()> {
    let body = fetch(&args.run_dir)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        out.write_all(&body).and_then(|()| out.write_all(b"\n")).context("print")?;
    } else {
        let status: Status = serde_json::from_slice(&body)
            .context("the daemon's answer is not understood: is it of another version?")?;
        out.write_all(table(&status).as_bytes()).context("print")?;
    }
    out.flush().context("print")
}

/// What people read: the node, what does not hold, every peer, every node that is none.
pub fn table(status: &Status) -> String {
    let mut text = String::new();
    let join = |items: Vec<String>| if items.is_empty() { "-".into() } else { items.join(" ") };
    let strings = |nets: &[ipnet::IpNet]| join(nets.iter().map(ToString::to_string).collect());
    let site = if status.site.is_empty() { "-" } else { &status.site };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "node {}  site {site}  meshd {}\nkey {}  port {}  mtu {}\nendpoints {}\npods {} of {}",
        status.node,
        status.daemon_version,
        status.public_key,
        status.listen_port,
        status.mtu,
        join(status.endpoints.iter().map(ToString::to_string).collect()),
        strings(&status.pod_cidrs),
        strings(&status.cluster_prefixes),
    );
    let _ = writeln!(text, "ready {}", if status.ready { "yes" } else { "no" });
    for condition in status.conditions.iter().filter(|c| !c.ok || !c.message.is_empty()) {
        let mark = if condition.ok { "+" } else { "-" };
        let _ = writeln!(text, "  {mark} {}: {}", condition.name, condition.message);
    }
    let asked =
        if status.keyrelays.is_empty() { " (no keyrelay is configured to tell)" } else { "" };
    let _ = writeln!(text, "NAT {}{asked}", nat_words(status.nat));
    peers(&mut text, status);
    if !status.keyrelays.is_empty() {
        let head = ["KEYRELAY", "ENDPOINT", "REGISTERED", "OVER", "SEES US AT", "RTT", "PROBLEM"];
        let mut rows = vec![head.map(String::from).to_vec()];
        rows.extend(status.keyrelays.iter().map(relay_row));
        text.push('\n');
        text.push_str(&columns(&rows));
    }
    let refused = status.refused.iter().map(|node| format!("{}: {}", node.node, node.reason));
    block(&mut text, "not meshed", refused);
    let dropped = status.drops.iter().filter(|drop| drop.count > 0);
    let dropped = dropped.map(|drop| format!("{}: {}", drop.reason, drop.count));
    block(&mut text, "dropped packets", dropped);
    text
}

/// A row for each, then in words why packets take a relay, and what is wrong: sentences would tear columns apart.
fn peers(text: &mut String, status: &Status) {
    let head =
        ["NODE", "SITE", "KEY", "ENDPOINT", "PATH", "NAT", "HANDSHAKE", "RTT", "RX", "TX", "MTU"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(status.peers.iter().map(peer_row));
    text.push('\n');
    text.push_str(&columns(&rows));
    let relayed = status.peers.iter().filter(|peer| !peer.not_direct.is_empty()).map(|peer| {
        let (ours, theirs) = (nat_words(status.nat), nat_words(peer.nat));
        format!("{}: {} (its NAT: {theirs}; ours: {ours})", peer.node, peer.not_direct)
    });
    block(text, "relayed, not direct", relayed);
    let silent = status.peers.iter().filter(|peer| !peer.problem.is_empty());
    block(text, "problems", silent.map(|peer| format!("{}: {}", peer.node, peer.problem)));
}

/// A heading and its lines, if there are any.
fn block(text: &mut String, heading: &str, lines: impl Iterator<Item = String>) {
    let mut lines = lines.peekable();
    if lines.peek().is_some() {
        let _ = writeln!(text, "\n{heading}:");
    }
    for line in lines {
        let _ = writeln!(text, "  {line}");
    }
}

fn peer_status(
    peer: &PeerFacts,
    seen: &BTreeMap<PublicKey, &PeerSnapshot>,
    snapshot: &Snapshot,
) -> PeerStatus {
    let now = snapshot.data.now;
    let seen = seen.get(&peer.config.key);
    let problem = match seen {
        _ if !snapshot.answered => "the data plane does not answer".to_owned(),
        None => "the data plane does not know it yet".to_owned(),
        Some(seen) if seen.session || peer.left_out.is_empty() => seen.problem.to_owned(),
        Some(seen) => format!("{}; {}", seen.problem, peer.left_out),
    };
    PeerStatus {
        node: peer.node.clone(),
        site: peer.site.to_string(),
        public_key: peer.config.key,
        allowed_ips: peer.config.allowed_ips.clone(),
        candidates: peer.config.candidates.clone(),
        endpoint: seen.and_then(|seen| seen.endpoint).map(|at| beyond(at, snapshot)),
        path: seen.map_or(PathKind::None, |seen| seen.path),
        last_handshake_s: seen
            .and_then(|seen| seen.last_handshake)
            .map(|then| now.since(then).as_secs()),
        rtt_ms: seen.and_then(|seen| seen.rtt).map(|rtt| rtt.as_secs_f64() * 1000.0),
        rx_bytes: seen.map_or(0, |seen| seen.rx_bytes),
        tx_bytes: seen.map_or(0, |seen| seen.tx_bytes),
        mtu: peer.config.mtu,
        keepalive_s: peer
            .config
            .keepalive
            .map(|interval| u16::try_from(interval.as_secs()).unwrap_or(u16::MAX)),
        nat: seen.map_or_else(Nat::default, |seen| seen.nat),
        not_direct: seen.map_or("", |seen| seen.not_direct).to_owned(),
        problem,
    }
}

/// What all relays say together of the NAT before this node.
fn nat_of(facts: &Facts, seen: &BTreeMap<PublicKey, &PeerSnapshot>) -> Nat {
    let relays = facts.relays.iter().filter_map(|relay| seen.get(&relay.key));
    let known = |sight: &Sight| *sight != Sight::default();
    sight::nat_of(relays.map(|relay| relay.sight).filter(known))
}

/// What the tunnel calls a bridge's address is, for people, the relay behind it.
fn beyond(endpoint: SocketAddr, snapshot: &Snapshot) -> SocketAddr {
    let mut links = snapshot.relay_links.values();
    let link = links.find(|link| link.local == Some(endpoint));
    link.and_then(|link| link.remote).unwrap_or(endpoint)
}

fn relay_status(
    relay: &RelayFacts,
    seen: &BTreeMap<PublicKey, &PeerSnapshot>,
    whole: &Snapshot,
) -> KeyrelayStatus {
    let snapshot = seen.get(&relay.key);
    let sight = snapshot.map_or_else(Sight::default, |seen| seen.sight);
    // Its answer over a connection tells no address.
    let answered = sight.addresses().next().is_some() || sight.nat.mapping == Mapping::NoUdp;
    let registered = snapshot.is_some_and(|seen| seen.session) && answered;
    let link = whole.relay_links.get(&relay.key);
    let endpoint = snapshot.and_then(|seen| seen.endpoint);
    let tls = endpoint.is_some() && link.is_some_and(|link| link.local == endpoint);
    let over = registered.then_some(if tls { Over::Tls } else { Over::Udp });
    let problem = match snapshot {
        _ if relay.candidates.is_empty() => {
            let places: Vec<_> = relay.endpoints.iter().map(ToString::to_string).collect();
            format!("{} resolves to no address that may be used", places.join("+"))
        }
        _ if over == Some(Over::Udp) => String::new(),
        _ if over == Some(Over::Tls) => match link.filter(|link| link.remote.is_none()) {
            None => "reached over TLS, as no relay answers over UDP: is it blocked?".to_owned(),
            Some(link) => format!("the connection over TLS ended ({})", link.problem),
        },
        Some(seen) if seen.session => "it has not said yet where it sees us".to_owned(),
        _ => {
            let tls = link.filter(|link| !link.problem.is_empty());
            let tls = tls.map(|link| format!(" Over TLS: {}", link.problem)).unwrap_or_default();
            format!(
                "no answer: is it running, is this node's key in its roster, is UDP let out?{tls}"
            )
        }
    };
    KeyrelayStatus {
        public_key: relay.key,
        candidates: relay.candidates.clone(),
        endpoint: endpoint.map(|at| beyond(at, whole)),
        registered,
        over,
        reflexive: sight.v4.or(sight.v6),
        reflexive_v6: sight.v6,
        nat: sight.nat,
        mtu: sight.mtu,
        rtt_ms: sight.rtt.map(|rtt| rtt.as_secs_f64() * 1000.0),
        problem,
    }
}

fn relay_row(relay: &KeyrelayStatus) -> Vec<String> {
    let or_dash = |text: Option<String>| text.filter(|t| !t.is_empty()).unwrap_or("-".into());
    let at = relay.endpoint.or(relay.candidates.first().copied());
    vec![
        relay.public_key.to_string(),
        or_dash(at.map(|endpoint| endpoint.to_string())),
        if relay.registered { "yes" } else { "no" }.to_owned(),
        or_dash(relay.over.map(|over| match over {
            Over::Udp => "UDP".to_owned(),
            Over::Tls => "TLS".to_owned(),
        })),
        or_dash(relay.reflexive.map(|address| address.to_string())),
        or_dash(relay.rtt_ms.map(|rtt| format!("{rtt:.1} ms"))),
        or_dash(Some(relay.problem.clone())),
    ]
}

fn peer_row(peer: &PeerStatus) -> Vec<String> {
    let or_dash = |text: Option<String>| text.filter(|t| !t.is_empty()).unwrap_or("-".into());
    vec![
        peer.node.to_string(),
        or_dash(Some(peer.site.clone())),
        short(peer.public_key),
        or_dash(peer.endpoint.map(|endpoint| endpoint.to_string())),
        path_word(peer.path).to_owned(),
        nat_word(peer.nat).to_owned(),
        or_dash(peer.last_handshake_s.map(|age| format!("{age} s ago"))),
        or_dash(peer.rtt_ms.map(|rtt| format!("{rtt:.1} ms"))),
        bytes(peer.rx_bytes),
        bytes(peer.tx_bytes),
        peer.mtu.to_string(),
    ]
}

/// As much of a key as tells it from others; `wg` and the document show all of it.
fn short(key: PublicKey) -> String {
    let text = key.to_string();
    format!("{}…", text.get(..8).unwrap_or_default())
}

/// What a NAT does, in a word that fits into a column: the kinds of `docs/guide/nat.md`.
fn nat_word(nat: Nat) -> &'static str {
    match (nat.mapping, nat.filtering) {
        (Mapping::Unknown, _) => "-",
        (Mapping::NoUdp, _) => "no UDP",
        (Mapping::Dependent, _) => "symmetric",
        (Mapping::None, Filtering::PortDependent) => "firewall",
        (Mapping::None, _) => "open",
        (Mapping::EndpointIndependent, Filtering::PortDependent) => "restricted",
        (Mapping::EndpointIndependent, Filtering::PortIndependent) => "cone",
        (Mapping::EndpointIndependent, Filtering::Unknown) => "NAT",
    }
}

/// What a NAT does, as people read it.
pub fn nat_words(nat: Nat) -> String {
    match nat.mapping {
        Mapping::Unknown | Mapping::NoUdp => nat.mapping.as_str().to_owned(),
        mapping => format!("{}, lets in {}", mapping.as_str(), nat.filtering.as_str()),
    }
}

/// A path as people read it.
pub fn path_word(path: PathKind) -> &'static str {
    match path {
        PathKind::None => "none",
        PathKind::Direct => "direct",
        PathKind::Roamed => "roamed",
        PathKind::Relayed => "relayed",
    }
}

/// Bytes as `wg` shows them: binary units, two digits.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.2} {unit}")
}

/// Left-aligned columns, two blanks apart, no blanks at line ends.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let line: String =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Asks the daemon over its socket for its status.
pub fn fetch(run_dir: &Path) -> anyhow::Result<Vec<u8>> {
    let socket = config::Paths { state_dir: "/".into(), run_dir: run_dir.to_owned() }.socket();
    let Answer { ok, body } = ask(&socket, "/status", ANSWER_TIMEOUT)?;
    ensure!(ok, "the daemon answered: {}", String::from_utf8_lossy(&body).trim());
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay_link::Link;
    use crate::view::tests::{key, sample};

    #[test]
    fn the_document_joins_what_is_wanted_with_what_the_data_plane_saw() {
        let status = build(&sample().snapshot());
        assert_eq!(status.peers.len(), 2);
        let live = &status.peers[0];
        assert_eq!(live.last_handshake_s, Some(37));
        assert_eq!(live.rtt_ms, Some(1.5));
        assert_eq!(live.problem, "");
        let silent = &status.peers[1];
        assert_eq!((silent.path, silent.endpoint), (PathKind::None, None));
        assert!(!silent.problem.is_empty());
        assert!(!status.ready);
        let text = serde_json::to_string(&status).expect("json");
        assert_eq!(serde_json::from_str::<Status>(&text).expect("back"), status);
    }

    #[test]
    fn a_relay_over_tls_is_shown_by_its_own_address_and_with_the_reason() {
        let mut snapshot = sample().snapshot();
        let addr = |text: &str| text.parse::<SocketAddr>().expect("an endpoint");
        let (local, remote) = (addr("127.0.0.1:40001"), addr("192.0.2.20:443"));
        let key = snapshot.data.peers[0].key;
        snapshot.facts.relays = vec![RelayFacts {
            key,
            endpoints: vec!["192.0.2.20:15192".parse().expect("a hint")],
            candidates: vec![addr("192.0.2.20:15192")],
        }];
        snapshot.data.peers[0].sight.v4 = Some(addr("198.51.100.7:5000"));
        let relay = |snapshot: &Snapshot| build(snapshot).keyrelays.remove(0);
        assert_eq!(relay(&snapshot).over, Some(Over::Udp));
        assert_eq!(relay(&snapshot).problem, "");
        snapshot.data.peers[0].endpoint = Some(local);
        let link = Link { local: Some(local), remote: Some(remote), problem: String::new() };
        snapshot.relay_links.insert(key, link);
        let over_tls = relay(&snapshot);
        assert_eq!((over_tls.over, over_tls.endpoint), (Some(Over::Tls), Some(remote)));
        assert!(over_tls.problem.contains("UDP"), "{}", over_tls.problem);
        assert_eq!(build(&snapshot).peers[0].endpoint, Some(remote), "what it carries, too");
        assert!(table(&build(&snapshot)).contains("TLS"));
        snapshot.data.peers[0].session = false;
        let failed = Link { local: Some(local), remote: None, problem: "refused".into() };
        snapshot.relay_links.insert(key, failed);
        let gone = relay(&snapshot);
        assert_eq!(gone.over, None);
        assert!(gone.problem.contains("Over TLS: refused"), "{}", gone.problem);
    }

    #[test]
    fn why_a_peer_has_no_session_names_the_endpoints_that_are_not_tried() {
        let mut snapshot = sample().snapshot();
        snapshot.data.peers.push(PeerSnapshot {
            key: snapshot.facts.peers[1].config.key,
            session: false,
            problem: "no endpoint known",
            ..snapshot.data.peers[0].clone()
        });
        let problem = &build(&snapshot).peers[1].problem;
        assert_eq!(problem, "no endpoint known; 10.0.0.3:1 is private");
        snapshot.answered = false;
        assert!(build(&snapshot).peers[1].problem.contains("does not answer"));
    }

    #[test]
    fn the_table_shows_every_peer_every_refused_node_and_every_unmet_condition() {
        let text = table(&build(&sample().snapshot()));
        for wanted in [
            "node-2",
            "203.0.113.2:15190",
            "direct",
            "37 s ago",
            "1.5 ms",
            "2.00 KiB",
            "5.00 MiB",
            "1380",
            "node-4: it has no pod CIDR",
            "guard: not reached yet",
            "source_not_allowed: 7",
            "ready no",
            "NAT unknown (no keyrelay is configured to tell)",
            "problems:\n  node-3: the data plane does not know it yet",
        ] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert!(!text.contains("relayed, not direct"), "nobody is\n{text}");
        assert!(text.lines().all(|line| line == line.trim_end()));
    }

    #[test]
    fn the_table_shows_the_nat_of_both_ends_and_why_a_peer_is_not_reached_directly() {
        let mut snapshot = sample().snapshot();
        let nat = |mapping, filtering| Nat { mapping, filtering };
        let strict = nat(Mapping::Dependent, Filtering::PortDependent);
        let home = nat(Mapping::EndpointIndependent, Filtering::PortDependent);
        let direct = snapshot.data.peers[0].clone();
        snapshot.data.peers[0].nat = home;
        snapshot.data.peers.push(PeerSnapshot {
            key: snapshot.facts.peers[1].config.key,
            endpoint: Some("192.0.2.20:15192".parse().expect("an endpoint")),
            path: PathKind::Relayed,
            nat: strict,
            not_direct: "the NATs of both ends give each destination another port",
            ..direct.clone()
        });
        let relay = key(20);
        snapshot.facts.relays =
            vec![RelayFacts { key: relay, endpoints: Vec::new(), candidates: Vec::new() }];
        let v4 = Some("198.51.100.7:5000".parse().expect("an endpoint"));
        let sight = Sight { v4, nat: strict, ..Sight::default() };
        snapshot.data.peers.push(PeerSnapshot { key: relay, sight, ..direct });
        let text = table(&build(&snapshot));
        let row = |node: &str| {
            let line = text.lines().find(|line| line.starts_with(node));
            line.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let nat = row("NODE").iter().position(|head| head == "NAT").expect("a column");
        assert_eq!(row("node-2")[nat - 1..=nat], ["direct", "restricted"], "{text}");
        assert_eq!(row("node-3")[nat - 1..=nat], ["relayed", "symmetric"], "{text}");
        let strict = "another port for each destination, lets in known address and port only";
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.contains(&format!("NAT {strict}").as_str()), "{text}");
        let why = format!(
            "  node-3: the NATs of both ends give each destination another port (its NAT: {strict}; ours: {strict})"
        );
        let at = lines.iter().position(|line| *line == "relayed, not direct:").expect("a heading");
        assert_eq!(lines[at + 1..=at + 2], [why.as_str(), ""], "nobody else\n{text}");
        let rows =
            lines.iter().filter(|line| line.starts_with("node-") || line.starts_with("NODE"));
        let widest = rows.map(|line| line.chars().count()).max();
        assert!(widest.is_some_and(|width| width <= TABLE_COLUMNS), "{widest:?}\n{text}");
    }

    /// What fits on people's screens.
    const TABLE_COLUMNS: usize = 120;

    #[test]
    fn every_kind_of_nat_has_a_word_that_fits_into_the_column() {
        let mut words = Vec::new();
        for mapping in [Mapping::None, Mapping::EndpointIndependent, Mapping::Dependent] {
            for filtering in [Filtering::PortIndependent, Filtering::PortDependent] {
                words.push(nat_word(Nat { mapping, filtering }));
            }
        }
        assert_eq!(words, ["open", "firewall", "cone", "restricted", "symmetric", "symmetric"]);
        assert_eq!(nat_word(Nat::default()), "-");
    }

    #[test]
    fn a_daemon_that_is_down_is_told_in_words() {
        let dir = tempfile::tempdir().expect("scratch");
        let args = StatusArgs { json: false, run_dir: dir.path().to_owned() };
        let error = format!("{:#}", print(&args).expect_err("no socket"));
        assert!(error.contains("has not run here"), "{error}");
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("meshd.sock")).expect("bind"));
        let error = format!("{:#}", print(&args).expect_err("nobody listens"));
        assert!(error.contains("not running"), "{error}");
    }

    #[test]
    fn bytes_are_shown_in_binary_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(u64::MAX), "16.00 EiB");
    }
}
