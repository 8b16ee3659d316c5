//! What is measured at a site, and the figures each measurement gives.

use std::net::{IpAddr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::super::cost;
use super::addresses::WIRE;
use super::cost::Repairs;
use super::crowd;
use super::flood;
use super::load::{self, Place, Stream, Way};
use super::site::{PORT, Shape, Site, said};
use super::subject::Subject;

/// Payload of the small and the large UDP test: an answer of a name server, and what fills a packet of 1,400 bytes.
const UDP_BYTES: [u32; 2] = [64, 1372];

/// How long a daemon with many peers is left alone before its rest is measured: passive keepalives come after 10 s.
const SETTLE: Duration = Duration::from_secs(15);

/// The stream runs alone for so long before the latency beside it is measured.
const LEAD: Duration = Duration::from_millis(500);

/// Values of every figure and subject, one per round.
pub(super) type Samples = super::super::found::Samples<Subject>;

/// A measurement: what runs, and the names of what it gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measure {
    pub(super) figures: &'static [&'static str],
    kind: Kind,
    shape: Shape,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Tcp {
        streams: u8,
        way: Way,
        congestion: &'static str,
        v6: bool,
        pods: bool,
    },
    /// TCP that also counts what it cost.
    TcpWithCost {
        congestion: &'static str,
    },
    Udp {
        bytes: u32,
    },
    PingIdle,
    RequestsIdle,
    UnderLoad,
    Flood,
    Rest,
}

const FEW: Shape = Shape { mtu: 1420, peers: 1, pods: true };
const JUMBO: Shape = Shape { mtu: 8920, peers: 1, pods: false };
const HUNDRED: Shape = Shape { mtu: 1420, peers: 100, pods: false };
const THOUSAND: Shape = Shape { mtu: 1420, peers: 1000, pods: false };

/// Every site, in the order they are built.
pub(super) const SHAPES: [Shape; 4] = [FEW, JUMBO, HUNDRED, THOUSAND];

const fn tcp(
    figures: &'static [&'static str],
    streams: u8,
    way: Way,
    congestion: &'static str,
) -> Measure {
    let kind = Kind::Tcp { streams, way, congestion, v6: false, pods: false };
    Measure { figures, kind, shape: FEW }
}

/// The same between pods.
const fn between_pods(measure: Measure) -> Measure {
    match measure.kind {
        Kind::Tcp { streams, way, congestion, v6, .. } => {
            let kind = Kind::Tcp { streams, way, congestion, v6, pods: true };
            Measure { kind, ..measure }
        }
        _ => measure,
    }
}

const fn shaped(figures: &'static [&'static str], streams: u8, shape: Shape) -> Measure {
    let kind =
        Kind::Tcp { streams, way: Way::Forward, congestion: "cubic", v6: false, pods: false };
    Measure { figures, kind, shape }
}

const fn at(figures: &'static [&'static str], kind: Kind, shape: Shape) -> Measure {
    Measure { figures, kind, shape }
}

const V6: Kind =
    Kind::Tcp { streams: 1, way: Way::Forward, congestion: "cubic", v6: true, pods: false };

/// Costs are taken with cubic, which every kernel has.
pub(super) const MEASURES: [Measure; 26] = [
    tcp(&["tcp_1_bbr"], 1, Way::Forward, "bbr"),
    tcp(&["tcp_4_bbr"], 4, Way::Forward, "bbr"),
    tcp(&["tcp_reverse_bbr"], 1, Way::Reverse, "bbr"),
    at(
        &[
            "tcp_1_cubic",
            "cpu_per_gbit",
            "out_of_order",
            "retransmits",
            "decrypt_errors",
            "resident_few",
        ],
        Kind::TcpWithCost { congestion: "cubic" },
        FEW,
    ),
    tcp(&["tcp_4_cubic"], 4, Way::Forward, "cubic"),
    tcp(&["tcp_reverse_cubic"], 1, Way::Reverse, "cubic"),
    tcp(&["tcp_both"], 1, Way::Both, "cubic"),
    at(&["tcp_1_v6"], V6, FEW),
    between_pods(tcp(&["pod_tcp_1_bbr"], 1, Way::Forward, "bbr")),
    between_pods(tcp(&["pod_tcp_4_bbr"], 4, Way::Forward, "bbr")),
    between_pods(tcp(&["pod_tcp_reverse_bbr"], 1, Way::Reverse, "bbr")),
    between_pods(tcp(&["pod_tcp_1_cubic"], 1, Way::Forward, "cubic")),
    between_pods(tcp(&["pod_tcp_4_cubic"], 4, Way::Forward, "cubic")),
    between_pods(tcp(&["pod_tcp_reverse_cubic"], 1, Way::Reverse, "cubic")),
    at(&["udp_64"], Kind::Udp { bytes: UDP_BYTES[0] }, FEW),
    at(&["udp_1372"], Kind::Udp { bytes: UDP_BYTES[1] }, FEW),
    at(&["ping_idle"], Kind::PingIdle, FEW),
    at(&["rr_idle_p50", "rr_idle_p99", "rr_idle_p99_9"], Kind::RequestsIdle, FEW),
    at(
        &["ping_load", "ping_load_lost", "rr_load_p50", "rr_load_p99", "rr_load_p99_9"],
        Kind::UnderLoad,
        FEW,
    ),
    at(&["flood_loss"], Kind::Flood, FEW),
    at(&["idle_cpu_few"], Kind::Rest, FEW),
    shaped(&["tcp_1_mtu_8920"], 1, JUMBO),
    shaped(&["tcp_4_mtu_8920"], 4, JUMBO),
    shaped(&["tcp_1_peers_100"], 1, HUNDRED),
    at(&["idle_cpu_1000", "resident_1000"], Kind::Rest, THOUSAND),
    shaped(&["tcp_1_peers_1000"], 1, THOUSAND),
];

impl Measure {
    pub(super) fn shape(self) -> Shape {
        self.shape
    }

    /// The congestion control it needs.
    pub(super) fn congestion(self) -> Option<&'static str> {
        match self.kind {
            Kind::Tcp { congestion, .. } | Kind::TcpWithCost { congestion } => Some(congestion),
            _ => None,
        }
    }

    /// Whether it says anything about this subject.
    pub(super) fn applies_to(self, subject: Subject) -> bool {
        let of_a_daemon = matches!(self.kind, Kind::Rest);
        let of_wireguard = matches!(self.kind, Kind::Flood);
        !(of_a_daemon && subject.is_for_scale())
            && (!of_wireguard || subject.takes_many_peers())
            && (self.shape.peers == 1 || subject.takes_many_peers())
    }

    /// What comes before the measurement itself.
    pub(super) fn settle(self) -> Duration {
        let itself = match self.kind {
            Kind::Rest => SETTLE,
            Kind::UnderLoad => LEAD,
            _ => Duration::ZERO,
        };
        itself + crowd::greeting(self.shape.peers.saturating_sub(1))
    }

    /// One round of `time` with this subject.
    pub(super) fn run(
        self,
        subject: Subject,
        site: &Site,
        time: Duration,
        samples: &mut Samples,
    ) -> Result<()> {
        self.measure(subject, site, time, samples)
            .with_context(|| format!("{}{}", self.figures[0], said(&site.daemons)))
    }

    fn measure(
        self,
        subject: Subject,
        site: &Site,
        time: Duration,
        samples: &mut Samples,
    ) -> Result<()> {
        let nodes = [&site.nodes[0], &site.nodes[1]];
        let far = nodes[1].v4;
        site.greet_crowd()?;
        match self.kind {
            Kind::Tcp { streams, way, congestion, v6, pods } => {
                let places = match &site.pods {
                    Some([from, to]) if pods => [from, to],
                    _ => nodes,
                };
                let address = if v6 { far_v6(places[1])? } else { places[1].v4 };
                let stream = Stream::Tcp { streams, way, congestion };
                let received = load::iperf3(places, address, stream, time)?;
                samples.push(self.figures[0], subject, received.bits_per_second / 1e9);
            }
            Kind::TcpWithCost { congestion } => {
                self.with_cost(subject, site, congestion, time, samples)?;
            }
            Kind::Udp { bytes } => {
                let received = load::iperf3(nodes, far, Stream::Udp { bytes, bitrate: "0" }, time)?;
                let value = match bytes {
                    64 => received.packets_per_second / 1e3,
                    _ => received.bits_per_second / 1e9,
                };
                samples.push(self.figures[0], subject, value);
            }
            Kind::PingIdle => {
                let pinged = load::ping(nodes[0], far, time)?;
                samples.push(self.figures[0], subject, pinged.average.as_secs_f64() * 1e3);
            }
            Kind::RequestsIdle => {
                let times = load::request_response(nodes, far, time)?;
                samples.push_ranks(self.figures, subject, &times);
            }
            Kind::Flood => {
                let lost = self.flooded(site, time)?;
                samples.push(self.figures[0], subject, lost);
            }
            Kind::UnderLoad => self.under_load(subject, nodes, time, samples)?,
            Kind::Rest => self.rest(subject, site, time, samples)?,
        }
        Ok(())
    }

    /// One stream, and what it cost: figures in the order of the table above.
    fn with_cost(
        self,
        subject: Subject,
        site: &Site,
        congestion: &'static str,
        time: Duration,
        samples: &mut Samples,
    ) -> Result<()> {
        let nodes = [&site.nodes[0], &site.nodes[1]];
        let bad_before =
            if subject == Subject::Meshd { Some(site.decrypt_errors()?) } else { None };
        let before = (processor_time(site)?, repairs(nodes)?);
        let stream = Stream::Tcp { streams: 1, way: Way::Forward, congestion };
        let received = load::iperf3(nodes, nodes[1].v4, stream, time)?;
        let cost = processor_time(site)?.saturating_sub(before.0);
        let repaired = repairs(nodes)?.since(before.1);
        let gbits = received.bits_per_second / 1e9;
        let mut push = |place: usize, value: f64| samples.push(self.figures[place], subject, value);
        push(0, gbits);
        push(2, repaired.out_of_order as f64);
        push(3, repaired.retransmits as f64);
        if let Some(before) = bad_before {
            push(4, site.decrypt_errors()?.saturating_sub(before) as f64);
        }
        if !site.daemons.is_empty() {
            // A tick is 10 ms.
            push(1, cost.as_secs_f64() * 100.0 / (gbits * time.as_secs_f64()));
            push(5, resident(site)?);
        }
        Ok(())
    }

    /// Ping and requests beside one stream.
    fn under_load(
        self,
        subject: Subject,
        nodes: [&Place; 2],
        time: Duration,
        samples: &mut Samples,
    ) -> Result<()> {
        let far = nodes[1].v4;
        let stream = Stream::Tcp { streams: 1, way: Way::Forward, congestion: "cubic" };
        let (ping, times) = std::thread::scope(|scope| {
            let load = scope.spawn(|| load::iperf3(nodes, far, stream, time + 2 * LEAD));
            std::thread::sleep(LEAD);
            let requests = scope.spawn(|| load::request_response(nodes, far, time));
            let ping = load::ping(nodes[0], far, time)?;
            let panicked = |_| anyhow::anyhow!("a thread panicked");
            let times = requests.join().map_err(panicked)??;
            load.join().map_err(panicked)??;
            anyhow::Ok((ping, times))
        })?;
        samples.push(self.figures[0], subject, ping.average.as_secs_f64() * 1e3);
        samples.push(self.figures[1], subject, ping.lost_percent);
        samples.push_ranks(&self.figures[2..], subject, &times);
        Ok(())
    }

    /// Packets of 200 bytes that node a loses, 5,000 a second, while it is flooded; in percent.
    fn flooded(self, site: &Site, time: Duration) -> Result<f64> {
        let [a, b] = &site.nodes;
        let key = site.key.context("this subject has no key")?;
        let to = SocketAddrV4::new(WIRE[0].parse()?, PORT);
        let (received, rate) = site.flooded(|| {
            std::thread::scope(|scope| {
                let flood = scope.spawn(|| flood::initiations(&b.netns, key, to, time + 2 * LEAD));
                std::thread::sleep(LEAD);
                let stream = Stream::Udp { bytes: 200, bitrate: "8M" };
                let received = load::iperf3([b, a], a.v4, stream, time)?;
                let rate = flood.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
                Ok((received, rate))
            })
        })?;
        let enough = rate > 0.9 * f64::from(flood::PER_SECOND);
        ensure!(enough, "only {rate:.0} initiations a second could be sent");
        Ok(received.lost_percent)
    }

    /// What node a's daemon does and holds while nobody speaks.
    fn rest(
        self,
        subject: Subject,
        site: &Site,
        time: Duration,
        samples: &mut Samples,
    ) -> Result<()> {
        std::thread::sleep(SETTLE);
        let Some(daemon) = site.daemons.first() else { return Ok(()) };
        let pid = daemon.process().pid;
        let before = cost::processor_time(pid)?;
        std::thread::sleep(time);
        // The time of a thread that ended is gone.
        let spent = cost::processor_time(pid)?.saturating_sub(before);
        samples.push(self.figures[0], subject, spent.as_secs_f64() / time.as_secs_f64() * 100.0);
        if let Some(name) = self.figures.get(1) {
            samples.push(name, subject, cost::resident(pid)?);
        }
        Ok(())
    }
}

fn far_v6(place: &Place) -> Result<IpAddr> {
    place.v6.context("there is no IPv6 address")
}

fn processor_time(site: &Site) -> Result<Duration> {
    site.daemons.iter().map(|daemon| cost::processor_time(daemon.process().pid)).sum()
}

/// Of the larger end.
fn resident(site: &Site) -> Result<f64> {
    let sizes: Result<Vec<f64>> =
        site.daemons.iter().map(|daemon| cost::resident(daemon.process().pid)).collect();
    Ok(sizes?.into_iter().fold(0.0, f64::max))
}

fn repairs(nodes: [&Place; 2]) -> Result<Repairs> {
    Ok(Repairs::read(&nodes[0].netns)?.plus(Repairs::read(&nodes[1].netns)?))
}

#[cfg(test)]
mod tests {
    use super::super::super::plan::assert_measured_once;
    use super::super::goals::GOALS;
    use super::*;

    #[test]
    fn every_figure_is_measured_once_and_has_a_goal() {
        assert_measured_once(MEASURES.iter().map(|measure| measure.figures), &GOALS);
        assert!(MEASURES.iter().all(|measure| SHAPES.contains(&measure.shape())));
    }
}
