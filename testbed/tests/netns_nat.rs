//! The NAT laboratory: every kind of site is what it says, and every pair is connected as the table says.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use testbed::lab::{Lab, ProcessRef};
use testbed::nat::{
    Daemons, Got, Host, Kind, NatLab, PARALLEL, PARALLEL_DAEMONS, Reason, Side, Site, Sockets,
    connect_pairs, measure, reaches_by_tcp, reason, wanted,
};

/// Of a program that is stopped and goes on; more often than that it is not stopped.
const MAX_STOPS: u32 = 200;
const STANDS_STILL: Duration = Duration::from_millis(60);
const GOES_ON: Duration = Duration::from_millis(60);

fn build(name: &str, sides: &[Side]) -> (NatLab, Host) {
    let lab = Lab::create(&common::lab_name(name), common::programs()).expect("lab");
    let built = NatLab::build(lab, &Kind::ALL, sides).expect("sites");
    let host = Host::start(&built.host).expect("the host on the internet");
    (built, host)
}

#[test]
fn every_kind_of_site_does_to_udp_what_it_says() {
    if !common::root() {
        return;
    }
    let (built, _host) = build("natkinds", &Side::BOTH);
    let sites: Vec<&Site> = built.sites().collect();
    // Mostly they wait for mappings to be forgotten: all at once.
    let measured: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = sites.iter().map(|site| scope.spawn(|| measure(site))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a prober")).collect()
    });
    assert_eq!(sites.len(), 2 * Kind::ALL.len());
    let mut wrong = Vec::new();
    for (site, measured) in sites.iter().zip(measured) {
        let (kind, side) = (site.kind, site.side);
        match measured {
            Ok(measured) if measured == kind.behaviour() => {}
            Ok(measured) => wrong.push(format!("{kind} {side:?}: {measured:?}")),
            Err(error) => wrong.push(format!("{kind} {side:?}: {error:#}")),
        }
        assert!(reaches_by_tcp(site).expect("a try"), "{kind} {side:?}: TCP gets out everywhere");
    }
    assert!(wrong.is_empty(), "not what they say: {wrong:#?}");
}

#[test]
fn every_pair_of_sites_is_connected_as_the_table_says() {
    if !common::root() {
        return;
    }
    let (built, _host) = build("natpairs", &Side::BOTH);
    let pairs = connect_pairs(&built, &Sockets, &wanted(&[]), PARALLEL, |_| {});
    assert_eq!(pairs.len(), 91);
    let wrong: Vec<_> = pairs.iter().filter(|pair| !pair.ok).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    for pair in &pairs {
        assert!(pair.first_packet_ms.is_some(), "nothing came through: {pair:?}");
        assert_eq!(pair.direct_ms.is_some(), pair.got == Got::Direct, "{pair:?}");
    }
}

/// Of every reason some, and of every kind. The one with a silence of half a minute comes first, with a site that no other waits for.
const BY_DAEMONS: [(Kind, Kind); 14] = [
    (Kind::ShortMappings, Kind::Cgnat),
    (Kind::Open, Kind::SymmetricRandom),
    (Kind::Open, Kind::Open),
    (Kind::FullCone, Kind::PortRestricted),
    (Kind::AddressRestricted, Kind::Symmetric),
    (Kind::PortRestricted, Kind::PortRestricted),
    (Kind::PortRestricted, Kind::Symmetric),
    (Kind::Symmetric, Kind::SymmetricRandom),
    (Kind::Cgnat, Kind::V6Only),
    (Kind::Hairpin, Kind::Hairpin),
    (Kind::NoHairpin, Kind::NoHairpin),
    (Kind::Shared, Kind::Shared),
    (Kind::V6Only, Kind::V6Only),
    (Kind::UdpBlocked, Kind::PortRestricted),
];

#[test]
fn daemons_connect_a_pair_of_every_reason_and_of_every_kind() {
    for wanted in Reason::ALL {
        assert!(BY_DAEMONS.iter().any(|(a, b)| reason(*a, *b) == wanted), "none for {wanted:?}");
    }
    for wanted in Kind::ALL {
        assert!(BY_DAEMONS.iter().any(|(a, b)| [*a, *b].contains(&wanted)), "none of {wanted}");
    }
}

#[test]
fn daemons_connect_pairs_as_the_table_says_and_a_stream_lives_through_every_change() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("natdaemons"), common::programs()).expect("lab");
    let built = NatLab::build(lab, &Kind::ALL, &Side::BOTH).expect("sites");
    let daemons = Daemons::prepare(&built, PARALLEL_DAEMONS).expect("relays");
    let pairs = connect_pairs(&built, &daemons, &BY_DAEMONS, PARALLEL_DAEMONS, |_| {});
    assert_eq!(pairs.len(), BY_DAEMONS.len());
    // How long it took depends on who else uses this machine: that is for the laboratory's report.
    let wrong: Vec<_> = pairs.iter().filter(|pair| !pair.is_right()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    for pair in &pairs {
        assert!(pair.first_packet_ms.is_some() && pair.start_ms.is_some(), "{pair:?}");
        assert_eq!(pair.stream_survived, Some(true), "{pair:?}");
        assert!(pair.address_change_ms.is_some(), "{pair:?}");
        assert_eq!(pair.direct_ms.is_some(), pair.got == Got::Direct, "{pair:?}");
        assert_eq!(pair.direct_again_ms.is_some(), pair.got == Got::Direct, "{pair:?}");
        assert_eq!(pair.relay_move_ms.is_some(), pair.got == Got::Relayed, "{pair:?}");
        let is_short = [pair.a, pair.b].contains(&Kind::ShortMappings);
        assert_eq!(pair.after_silence_ms.is_some(), is_short, "{pair:?}");
        assert_eq!(pair.udp_blocked_ms.is_none(), pair.a == Kind::UdpBlocked, "{pair:?}");
    }
}

#[test]
fn a_run_that_stands_still_now_and_then_ends_as_any_other() {
    if !common::root() {
        return;
    }
    let mut run = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args([
            "nat",
            "--json",
            "--only",
            "udp-blocked,symmetric",
            "--by",
            "sockets",
            "--lab",
            &common::lab_name("natstop"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the testbed program");
    let process = ProcessRef::of(run.id()).expect("it runs");
    // Whoever waits with a timeout is interrupted each time.
    for _ in 0..MAX_STOPS {
        if run.try_wait().expect("status").is_some() {
            break;
        }
        process.signal(Signal::STOP).expect("stopped");
        std::thread::sleep(STANDS_STILL);
        process.signal(Signal::CONT).expect("going on");
        std::thread::sleep(GOES_ON);
    }
    let output = run.wait_with_output().expect("its report");
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert!(output.status.success(), "{report:#}");
    let [pair] = report["pairs"].as_array().expect("pairs").as_slice() else {
        panic!("{report:#}")
    };
    assert_eq!((&pair["a"], &pair["b"]), (&"udp-blocked".into(), &"symmetric".into()), "{pair}");
    assert_eq!((&pair["expected"], &pair["got"]), (&"relayed".into(), &"relayed".into()), "{pair}");
    assert_eq!((&pair["by"], &pair["ok"]), (&"sockets".into(), &true.into()), "{pair}");
    assert!(pair["direct_ms"].is_null() && pair["stream_survived"].is_null(), "{pair}");
}
