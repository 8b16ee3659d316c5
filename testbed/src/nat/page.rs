//! `docs/guide/nat.md`, and what people see on a terminal.

use std::fmt::Write as _;

use super::expected::{Expected, Reason, reason};
use super::kind::{Behaviour, Filtering, Kind, Lifetime, Mapping, Neighbours, Ports};
use super::pair::Pair;
use super::{Report, steps};
use crate::setting::Setting;

const HEAD: &str = "\
# Who reaches whom directly

Written by `./testbed/nat --page docs/guide/nat.md`: change the program, not this file.

Two nodes exchange packets directly wherever their NATs and firewalls allow it; else the relay carries them, still encrypted. What
allows it is known (RFC 4787, RFC 5128), and the laboratory in `testbed/src/nat` proves it: every kind of site below is built out of
network namespaces with nftables, measured from inside (RFC 5780), and connected with every other.

Pairs are connected by what users run: a daemon at either site and two relays between them ([keyrelay.md](keyrelay.md)). By itself the
laboratory connects them by hole punching with plain sockets, too, which shows what the sites allow to whoever does it.

## Sites

";

const HOW: &str = "
*Mapping* says which external address and port a socket gets: one for all it speaks to, or another for each. *Filtering* says who may
send to it: everybody, those addresses that were sent to, or those addresses and ports. *Hairpinning*: whether two nodes behind the NAT
meet at its public address. *Mappings live*: what the NAT is set to; measured is whether one is there or gone after 25 s of silence.

## Pairs

Two of the same kind have a NAT each, but for hairpin, no-hairpin and shared, which are behind one. Letters are explained below.

|";

const WHEN: &str = "
A punch gets through when the first packet of either side does: sent to a mapping that is the same for all, and taken by a filter that
lets everybody in, or knows the address (both have sent to each other's), or knows the port as well, because the sender's mapping is the
same for all. The answer goes to where the packet came from. Ports are not predicted.
";

const TAIL: &str = "
## What a pair lives through

A TCP stream between the two nodes begins with their first packet and numbers its bytes both ways. It has to survive all of this, in this
order; the times are those of datagrams sent every 20 ms beside it.

| | what happens | what is measured | bound |
|---|---|---|---|
| all | both daemons start at once while somebody speaks | `start_ms`: first answered packet | 2 s |
| all | both are registered, and somebody begins to speak | `first_packet_ms` | 2 s |
| direct | the relay's way gives place to the direct one | `direct_ms`: both daemons say so | 5 s |
| direct | UDP between the two sites is blocked: the relay carries | `blocked_ms`: without an answer | 5 s |
| direct | and let through again | `direct_again_ms`: both say direct | 5 s |
| relayed | six seconds, in which neither may say direct | | |
| all | the first site's NAT forgets everything and gives another port; an open node gets another address | `address_change_ms`: without an answer | 1 s of a node that everybody can reach, else 5 s |
| short-mappings | nobody speaks for 30 s | `after_silence_ms`: first answered packet | 2 s |
| relayed | the relay in use is killed | `relay_move_ms`: without an answer | 2 s |
| all | all UDP of the first site is blocked: the relay carries over TLS | `udp_blocked_ms`: without an answer | 2 s |
| direct | both relays are killed: nothing may be noticed | `relays_gone_ms`: without an answer | 0.5 s |
";

/// Begins the section of measured figures.
const MEASURED: &str = "
## What it took

";

const REST: &str = "
## To try it

`./testbed/nat` builds the laboratory, connects every pair and takes it down, in about five minutes on any Linux with root.

| | |
|---|---|
| `--only A,B` | one pair of kinds |
| `--only A` | every pair with one kind |
| `--by sockets` | by plain sockets, in less than a minute |
| `--json` | one document for programs |

The document has `pairs`, `duration_s` and `problems`. A pair has `a`, `b`, `by` (what connected it: `daemons` or `sockets`), `expected`
and `got` (`direct` or `relayed`; `got` also `nothing`), `first_packet_ms` and `direct_ms` (from the word to connect until there was a first
packet, by whatever way, and until a direct path had proved itself both ways; `null` where that never was), `stream_survived` (`null`:
plain sockets carry no stream), `ok`, the times above, `late` (what took longer than its bound) and `error` (what broke). Exit status
0: every pair is as expected, in time. By sockets, sites without UDP find that out by five questions without an answer, which takes the
second that their `first_packet_ms` shows.

The namespace tests in `testbed/tests/netns_nat.rs` measure every kind of site, connect all pairs by sockets, and by daemons some of each
reason and of each kind.
";

/// The guide, with the figures of this run.
pub(super) fn page(report: &Report) -> String {
    with_figures(&steps::table(report, &Setting::here().to_string()))
}

fn with_figures(measured: &str) -> String {
    let mut text = HEAD.to_owned();
    text.push_str(
        "| site | what it is | mapping | filtering | ports | hairpinning | mappings live |\n",
    );
    text.push_str("|---|---|---|---|---|---|---|\n");
    for kind in Kind::ALL {
        let _ = writeln!(text, "| {kind} | {} | {} |", about(kind), behaviour(kind.behaviour()));
    }
    text.push_str(HOW);
    matrix(&mut text);
    [TAIL, MEASURED, measured, REST].into_iter().for_each(|part| text.push_str(part));
    text
}

/// One letter a pair, and what the letters mean.
fn matrix(text: &mut String) {
    for kind in Kind::ALL {
        let _ = write!(text, " | {kind}");
    }
    let _ = writeln!(text, " |\n|---{}|", "|:-:".repeat(Kind::ALL.len()));
    for a in Kind::ALL {
        let _ = write!(text, "| {a}");
        for b in Kind::ALL {
            let _ = write!(text, " | {}", cell(a, b));
        }
        text.push_str(" |\n");
    }
    text.push_str("\n| | | why |\n|---|---|---|\n");
    for reason in Reason::ALL {
        let expected = reason.expected();
        let _ = writeln!(text, "| {} | {expected} | {} |", letter(reason), reason.text());
    }
    text.push_str(WHEN);
}

/// Relayed pairs stand out.
fn cell(a: Kind, b: Kind) -> String {
    let reason = reason(a, b);
    match reason.expected() {
        Expected::Direct => letter(reason).to_owned(),
        Expected::Relayed => format!("**{}**", letter(reason)),
    }
}

fn letter(reason: Reason) -> &'static str {
    match reason {
        Reason::Punched => "d",
        Reason::SameNetwork => "n",
        Reason::Hairpinned => "h",
        Reason::NotHairpinned => "H",
        Reason::Shut => "S",
        Reason::NoCommonFamily => "F",
        Reason::NoUdp => "U",
    }
}

fn about(kind: Kind) -> &'static str {
    match kind {
        Kind::Open => "a server: IPv4 and IPv6, no NAT, no firewall",
        Kind::FullCone => "NAT that lets everybody in",
        Kind::AddressRestricted => "NAT that lets in who was spoken to, from any port",
        Kind::PortRestricted => "most homes: Linux masquerading",
        Kind::Symmetric => "a port for each destination, each the next: some firewalls",
        Kind::SymmetricRandom => {
            "a port for each destination, at random: many clouds and mobile carriers"
        }
        Kind::Cgnat => "a home's NAT behind its carrier's (RFC 6888)",
        Kind::Hairpin => "two networks of one NAT, kept apart, as with a guest network",
        Kind::NoHairpin => "the same where the NAT does not turn traffic round",
        Kind::Shared => "two nodes in one network behind one NAT",
        Kind::UdpBlocked => "a firewall that lets TCP alone out",
        Kind::V6Only => "IPv6 behind a firewall (RFC 6092), no IPv4",
        Kind::ShortMappings => "NAT that forgets in 20 s what is silent",
    }
}

fn behaviour(behaviour: Option<Behaviour>) -> String {
    let Some(behaviour) = behaviour else { return ["–"; 5].join(" | ") };
    let mapping = match behaviour.mapping {
        Mapping::None => "none",
        Mapping::EndpointIndependent => "endpoint-independent",
        Mapping::AddressDependent => "address-dependent",
        Mapping::AddressAndPortDependent => "address- and port-dependent",
    };
    let filtering = match behaviour.filtering {
        Filtering::EndpointIndependent => "endpoint-independent",
        Filtering::AddressDependent => "address-dependent",
        Filtering::AddressAndPortDependent => "address- and port-dependent",
    };
    let ports = match behaviour.ports {
        Ports::Preserved => "preserved",
        Ports::Sequential => "counting up",
        Ports::Unrelated => "others",
    };
    let hairpinning = match behaviour.hairpinning {
        None => "–",
        Some(true) => "yes",
        Some(false) => "no",
    };
    let lifetime = match (behaviour.filtering, behaviour.lifetime) {
        (Filtering::EndpointIndependent, _) if behaviour.mapping == Mapping::None => "–",
        (_, Lifetime::Short) => "20 s",
        (_, Lifetime::Long) => "300 s",
    };
    [mapping, filtering, ports, hairpinning, lifetime].join(" | ")
}

/// One line about a pair that is not as expected.
pub(super) fn problem(pair: &Pair) -> String {
    let why = pair.error.iter().chain(&pair.late).map(String::as_str).collect::<Vec<_>>();
    let why = if why.is_empty() { String::new() } else { format!(": {}", why.join("; ")) };
    let apart = match pair.a.neighbours().filter(|_| pair.a == pair.b) {
        Some(Neighbours::SameNetwork) => " (one network)",
        Some(Neighbours::SeparateNetworks) => " (one NAT)",
        None => "",
    };
    let Pair { a, b, expected, got, .. } = pair;
    format!("{a} and {b}{apart}: expected {expected}, got {got}{why}")
}

/// A line a pair, for a terminal.
pub(super) fn table(report: &Report) -> String {
    let mut text = format!(
        "{:<19}{:<19}{:<10}{:<9}{:>13}{:>11}{:>11}{:>11}{:>8}\n",
        "A", "B", "EXPECTED", "GOT", "FIRST PACKET", "DIRECT", "MOVED", "RELAY", "STREAM"
    );
    let ms = |ms: Option<f64>| ms.map_or("–".to_owned(), |ms| format!("{ms:.1} ms"));
    for pair in &report.pairs {
        let (first, direct) = (ms(pair.first_packet_ms), ms(pair.direct_ms));
        let (moved, relay) = (ms(pair.address_change_ms), ms(pair.relay_move_ms));
        let stream = match pair.stream_survived {
            None => "–",
            Some(true) => "lives",
            Some(false) => "broke",
        };
        let verdict = if pair.ok { "" } else { "   NOT OK" };
        let _ = writeln!(
            text,
            "{:<19}{:<19}{:<10}{:<9}{first:>13}{direct:>11}{moved:>11}{relay:>11}{stream:>8}{verdict}",
            pair.a, pair.b, pair.expected, pair.got
        );
    }
    let good = report.pairs.iter().filter(|pair| pair.ok).count();
    let _ = writeln!(
        text,
        "{good} of {} pairs as expected, in {:.1} s",
        report.pairs.len(),
        report.duration_s
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guide_is_what_this_program_writes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/guide/nat.md");
        let found = std::fs::read_to_string(path).unwrap_or_default();
        let measured = found.split_once(MEASURED).and_then(|(_, it)| it.split_once(REST));
        let (measured, _) = measured.unwrap_or_default();
        assert!(
            found == with_figures(measured),
            "docs/guide/nat.md is not what this program writes: ./testbed/nat --page docs/guide/nat.md"
        );
        steps::tests::check_written(measured);
    }

    #[test]
    fn every_reason_has_a_letter_of_its_own() {
        let mut letters: Vec<&str> = Reason::ALL.into_iter().map(letter).collect();
        letters.sort_unstable();
        letters.dedup();
        assert_eq!(letters.len(), Reason::ALL.len());
    }
}
