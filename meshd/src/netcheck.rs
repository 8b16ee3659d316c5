//! `meshd netcheck`: what this node sees of itself, found out anew.
//!
//! ```text
//! netcheck ── /netcheck ──> daemon ── check ──> shards ── questions ──> every relay (mesh_core::tunnel::sight)
//!    table <── document ── as soon as nothing is being looked for, or after PATIENCE
//! ```
//! The daemon asks, and not the command: what a NAT does it does to the socket whose port the mesh uses.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_types::defaults::OVERHEAD_V4;
use mesh_types::nat::{Filtering, Mapping};
use mesh_types::netcheck::{NETCHECK_VERSION, Netcheck, Udp};
use mesh_types::status::{KeyrelayStatus, Over};
use tokio::time::{Instant, sleep};

use crate::args::StatusArgs;
use crate::ask::{Answer, ask};
use crate::port_mapping::State;
use crate::status::{columns, nat_words};
use crate::view::{Snapshot, View};
use crate::{config, status};

/// How long the daemon looks: three tries a second apart, and the first for the address alone.
const PATIENCE: Duration = Duration::from_secs(6);
/// How often it is asked whether it has all.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Has the data plane look anew, and waits for it.
pub async fn run(view: Arc<View>) -> anyhow::Result<Netcheck> {
    view.check_relays();
    let until = Instant::now() + PATIENCE;
    loop {
        sleep(LOOK_EVERY).await;
        let port_mapping = view.port_mapping();
        let view = Arc::clone(&view);
        let taken = tokio::task::spawn_blocking(move || view.snapshot()).await;
        let snapshot = taken.context("take a snapshot")?;
        ensure!(snapshot.answered, "the data plane does not answer: look at the daemon's log");
        let looking = snapshot.data.peers.iter().any(|peer| peer.session && peer.sight.looking);
        if !looking || Instant::now() >= until {
            return Ok(build(&snapshot, port_mapping, !looking));
        }
    }
}

fn build(snapshot: &Snapshot, port_mapping: State, complete: bool) -> Netcheck {
    let status = status::build(snapshot);
    let relays = status.keyrelays;
    let udp = udp(&relays);
    let seen = |v4: bool| {
        let addresses = relays.iter().flat_map(|relay| [relay.reflexive, relay.reflexive_v6]);
        addresses.flatten().find(|address| address.is_ipv4() == v4)
    };
    let mut found = Netcheck {
        version: NETCHECK_VERSION,
        node: status.node,
        udp,
        nat: status.nat,
        ipv4: seen(true),
        ipv6: seen(false),
        endpoints: status.endpoints,
        port_mapping: port_mapping.words(),
        mtu: relays.iter().filter_map(|relay| relay.mtu).min(),
        relays,
        advice: Vec::new(),
        complete,
    };
    found.advice = advice(&found, status.listen_port, status.mtu);
    found
}

/// Blocked is said only where a relay itself shows that it is up and knows this node.
fn udp(relays: &[KeyrelayStatus]) -> Udp {
    if relays.is_empty() {
        Udp::Unknown
    } else if relays.iter().any(answers_over_udp) {
        Udp::Works
    } else if relays.iter().any(answers_over_tls) {
        Udp::Blocked
    } else {
        Udp::Unanswered
    }
}

/// Now, and not some time in its session, which outlives a relay by minutes: the longest packet is forgotten before the check
/// asks for it anew, and 1,280 bytes arrive wherever the mesh is of use.
fn answers_over_udp(relay: &KeyrelayStatus) -> bool {
    relay.over == Some(Over::Udp) && relay.mtu.is_some()
}

/// While the connection stands: afterwards its endpoint is the bridge's.
fn answers_over_tls(relay: &KeyrelayStatus) -> bool {
    relay.over == Some(Over::Tls) && relay.endpoint.is_some_and(|at| !at.ip().is_loopback())
}

/// What the operator of this node can do about what was found.
fn advice(found: &Netcheck, port: u16, mesh_mtu: u32) -> Vec<String> {
    let mut advice = Vec::new();
    match found.udp {
        Udp::Unknown => advice.push(
            "no keyrelay is configured, so nobody outside can say how this node looks: set --keyrelay".to_owned(),
        ),
        Udp::Blocked => advice.push(format!(
            "relays answer over TLS and not over UDP: let UDP out of this network, from port {port} and to the relays' ports; until then everything goes through a relay"
        )),
        Udp::Unanswered => advice.push(format!(
            "no relay answers at all: see below what each needs; if they are up and know this node's key, let UDP out of this network, from port {port} and to the relays' ports"
        )),
        Udp::Works => {}
    }
    match (found.nat.mapping, found.nat.filtering) {
        (Mapping::Dependent, _) => advice.push(format!(
            "the NAT gives each destination another port, so nodes behind strict NATs are reached through a relay only: if the router is yours, forward UDP port {port} to this node and set its meshd.dev/endpoint annotation"
        )),
        (Mapping::None, Filtering::PortDependent) => advice.push(format!(
            "a firewall lets in answers only: let UDP to port {port} in, and every node reaches this one directly"
        )),
        (Mapping::Unknown, _) if found.udp == Udp::Works => advice.push(
            "the mapping could not be measured: let UDP in to the relay's second port (--probe-port of keyrelay)".to_owned(),
        ),
        _ => {}
    }
    if let Some(mtu) = found.mtu.filter(|mtu| u32::from(*mtu) < mesh_mtu + OVERHEAD_V4) {
        advice.push(format!(
            "packets of more than {mtu} bytes do not arrive whole at the relay, and the mesh makes longer ones, which go in fragments: set the MTU of this node's uplink to {mtu} (ip link set dev NAME mtu {mtu}), and the mesh follows"
        ));
    }
    for relay in found.relays.iter().filter(|relay| !relay.problem.is_empty()) {
        let at = relay
            .candidates
            .first()
            .map_or_else(|| relay.public_key.to_string(), ToString::to_string);
        advice.push(format!("relay {at}: {}", relay.problem));
    }
    advice
}

/// `meshd netcheck`.
pub fn print(args: &StatusArgs) -> anyhow::Result<()> {
    let paths = config::Paths { state_dir: "/".into(), run_dir: args.run_dir.clone() };
    let Answer { ok, body } = ask(&paths.socket(), "/netcheck", PATIENCE * 2)?;
    ensure!(ok, "the daemon answered: {}", String::from_utf8_lossy(&body).trim());
    let mut out = std::io::stdout().lock();
    if args.json {
        out.write_all(&body).and_then(|()| out.write_all(b"\n")).context("print")?;
    } else {
        let found: Netcheck = serde_json::from_slice(&body)
            .context("the daemon's answer is not understood: is it of another version?")?;
        out.write_all(table(&found).as_bytes()).context("print")?;
    }
    out.flush().context("print")
}

/// What people read.
fn table(found: &Netcheck) -> String {
    let mut text = String::new();
    let seen = |address: Option<std::net::SocketAddr>| {
        address.map_or_else(|| "not seen by any relay".to_owned(), |it| format!("seen at {it}"))
    };
    let udp = match found.udp {
        Udp::Works => "works",
        Udp::Blocked => "blocked: relays answer over TLS alone",
        Udp::Unanswered => "not answered by any relay: blocked, or none is up and knows this node",
        Udp::Unknown => "unknown",
    };
    let mtu = found.mtu.map_or_else(|| "unknown".to_owned(), |it| format!("{it} bytes"));
    let filtering = match found.nat.mapping {
        Mapping::Unknown | Mapping::NoUdp => "unknown",
        _ => found.nat.filtering.as_str(),
    };
    let rows = [
        ("node", found.node.to_string()),
        ("UDP", udp.to_owned()),
        ("IPv4", seen(found.ipv4)),
        ("IPv6", seen(found.ipv6)),
        ("NAT mapping", found.nat.mapping.as_str().to_owned()),
        ("NAT lets in", filtering.to_owned()),
        ("port mapping", found.port_mapping.clone()),
        ("MTU to relays", mtu),
    ];
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    text.push_str(&columns(&rows));
    if !found.relays.is_empty() {
        let head = ["KEYRELAY", "LATENCY", "MTU", "SEES US AT", "NAT", "PROBLEM"];
        let mut rows = vec![head.map(String::from).to_vec()];
        rows.extend(found.relays.iter().map(relay_row));
        text.push('\n');
        text.push_str(&columns(&rows));
    }
    for advice in &found.advice {
        let _ = writeln!(text, "\n- {advice}");
    }
    if !found.complete {
        text.push_str("\nnot everything was answered in time\n");
    }
    text
}

fn relay_row(relay: &KeyrelayStatus) -> Vec<String> {
    let or_dash = |text: Option<String>| text.filter(|it| !it.is_empty()).unwrap_or("-".into());
    let at = relay.endpoint.or(relay.candidates.first().copied());
    let [v4, v6] =
        [relay.reflexive, relay.reflexive_v6.filter(|_| relay.reflexive != relay.reflexive_v6)];
    let seen: Vec<String> = [v4, v6].into_iter().flatten().map(|it| it.to_string()).collect();
    vec![
        or_dash(at.map(|it| it.to_string())),
        or_dash(relay.rtt_ms.filter(|_| relay.registered).map(|rtt| format!("{rtt:.1} ms"))),
        or_dash(relay.mtu.map(|it| it.to_string())),
        or_dash(Some(seen.join(" "))),
        nat_words(relay.nat),
        or_dash(Some(relay.problem.clone())),
    ]
}

#[cfg(test)]
mod tests {
    use mesh_core::tunnel::config::PeerSnapshot;
    use mesh_core::tunnel::sight::Sight;
    use mesh_types::nat::Nat;

    use super::*;
    use crate::relay_link::Link;
    use crate::view::RelayFacts;
    use crate::view::tests::{key, sample};

    fn snapshot(sights: &[Sight]) -> Snapshot {
        let mut snapshot = sample().snapshot();
        let template = snapshot.data.peers[0].clone();
        for (number, sight) in (100..).zip(sights) {
            let at: std::net::SocketAddr = "203.0.113.1:15192".parse().expect("endpoint");
            snapshot.facts.relays.push(RelayFacts {
                key: key(number),
                endpoints: vec![at.to_string().parse().expect("endpoint")],
                candidates: vec![at],
            });
            let key = key(number);
            snapshot.data.peers.push(PeerSnapshot { key, sight: *sight, ..template.clone() });
        }
        snapshot
    }

    fn sight(mapping: Mapping, filtering: Filtering, mtu: Option<u16>) -> Sight {
        Sight {
            v4: Some("198.51.100.7:4242".parse().expect("endpoint")),
            nat: Nat { mapping, filtering },
            rtt: Some(Duration::from_millis(12)),
            mtu,
            ..Sight::default()
        }
    }

    #[test]
    fn a_home_behind_an_ordinary_nat_is_told_so_and_asked_for_nothing() {
        let home = sight(Mapping::EndpointIndependent, Filtering::PortDependent, Some(1_500));
        let found = build(&snapshot(&[home]), State::Off, true);
        assert_eq!((found.udp, found.advice.len()), (Udp::Works, 0), "{:?}", found.advice);
        let text = table(&found);
        for word in [
            "endpoint-independent",
            "known address and port",
            "198.51.100.7:4242",
            "12.0 ms",
            "1500 bytes",
        ] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
        let json = serde_json::to_string(&found).expect("json");
        assert_eq!(serde_json::from_str::<Netcheck>(&json).expect("back"), found);
    }

    #[test]
    fn what_can_be_done_is_said() {
        let advice =
            |sights: &[Sight]| build(&snapshot(sights), State::Off, true).advice.join("\n");
        assert!(advice(&[]).contains("no keyrelay is configured"));
        let strict = sight(Mapping::Dependent, Filtering::PortDependent, Some(1_400));
        let said = advice(&[strict]);
        assert!(
            said.contains("forward UDP port 15190") && said.contains("uplink to 1400"),
            "{said}"
        );
        let firewall = sight(Mapping::None, Filtering::PortDependent, Some(1_500));
        assert!(advice(&[firewall]).contains("let UDP to port 15190 in"));
        let unmeasured = sight(Mapping::Unknown, Filtering::PortDependent, Some(1_500));
        assert!(advice(&[unmeasured]).contains("--probe-port"));
        assert!(
            advice(&[Sight::default()]).contains("no answer")
                || advice(&[Sight::default()]).contains("not said yet")
        );
    }

    #[test]
    fn udp_is_said_to_be_blocked_only_where_a_relay_answers_over_tls() {
        let found = |snapshot: &Snapshot| build(snapshot, State::Off, true);
        let words = |found: &Netcheck| {
            let json = serde_json::to_value(found).expect("json");
            (json["udp"].as_str().unwrap_or_default().to_owned(), found.advice.join("\n"))
        };
        // A relay that is down, or does not know this node's key: no session.
        let mut silent = snapshot(&[Sight::default()]);
        silent.data.peers.last_mut().expect("the relay").session = false;
        let (udp, advice) = words(&found(&silent));
        assert_eq!(udp, "unanswered");
        assert!(advice.contains("no relay answers at all"), "{advice}");
        assert!(table(&found(&silent)).contains("not answered by any relay"));
        // One that died a moment ago: its session and what it said before are still there.
        let before = sight(Mapping::EndpointIndependent, Filtering::PortDependent, None);
        assert_eq!(words(&found(&snapshot(&[before]))).0, "unanswered");
        // One that a connection reaches.
        let no_udp =
            Sight { nat: Nat { mapping: Mapping::NoUdp, ..Nat::default() }, ..Sight::default() };
        let mut over_tls = snapshot(&[no_udp]);
        let relay = over_tls.data.peers.last_mut().expect("the relay");
        let local = "127.0.0.1:40001".parse().expect("an endpoint");
        relay.endpoint = Some(local);
        let remote = Some("203.0.113.1:443".parse().expect("an endpoint"));
        let link = Link { local: Some(local), remote, problem: String::new() };
        let key = relay.key;
        over_tls.relay_links.insert(key, link.clone());
        let (udp, advice) = words(&found(&over_tls));
        assert_eq!(udp, "blocked");
        assert!(advice.contains("let UDP out"), "{advice}");
        // The connection has ended since.
        over_tls.relay_links.insert(key, Link { remote: None, ..link });
        assert_eq!(words(&found(&over_tls)).0, "unanswered");
    }

    #[test]
    fn each_family_is_shown_as_a_relay_sees_it() {
        let v6 = Some("[2001:db8::7]:4242".parse().expect("endpoint"));
        let home = sight(Mapping::None, Filtering::PortIndependent, Some(1_500));
        let found = build(&snapshot(&[Sight { v6, ..home }]), State::Off, true);
        assert_eq!((found.ipv4, found.ipv6), (home.v4, v6));
        let text = table(&found);
        assert!(text.contains("seen at [2001:db8::7]:4242"), "{text}");
        let text = table(&build(&snapshot(&[home]), State::Off, true));
        assert!(text.contains("not seen by any relay"), "{text}");
    }
}
