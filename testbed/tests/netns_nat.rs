//! The NAT laboratory: every kind of site is what it says, and every pair is connected as the table says.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use testbed::lab::Lab;
use testbed::nat::{
    Host, Kind, NatLab, PARALLEL, Side, Site, Sockets, connect_pairs, measure, reaches_by_tcp,
    wanted,
};

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
    for (site, measured) in sites.iter().zip(measured) {
        let (kind, side) = (site.kind, site.side);
        let measured = measured.unwrap_or_else(|error| panic!("{kind} {side:?}: {error:#}"));
        assert_eq!(measured, kind.behaviour(), "{kind} {side:?}");
        assert!(reaches_by_tcp(site).expect("a try"), "{kind} {side:?}: TCP gets out everywhere");
    }
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
        assert_eq!(pair.direct_ms.is_some(), pair.got == testbed::nat::Got::Direct, "{pair:?}");
    }
}
