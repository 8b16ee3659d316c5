//! Every figure there is: its unit, which way is better, and what it must reach.

use super::super::figures::{Better, Target};
use super::super::plan;
use super::subject::Subject;

/// A figure of `bench tunnel`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Goal {
    name: &'static str,
    unit: &'static str,
    better: Better,
    /// Beside wireguard-go; beside every other peer that encrypts it is to be ahead.
    target: Target,
    /// Whether being ahead of every other peer is asked for.
    ahead: bool,
}

impl plan::Goal<Subject> for Goal {
    fn what(&self) -> (&'static str, &'static str, Better) {
        (self.name, self.unit, self.better)
    }

    fn beside(&self, peer: Subject) -> Target {
        match peer {
            Subject::WireguardGo => self.target,
            _ if peer.is_for_scale() => Target::NONE,
            _ if self.ahead => Target::ratio(1.0, 1.0),
            _ => Target::NONE,
        }
    }

    fn alone(&self) -> Target {
        self.target.without_ratio()
    }
}

const fn more(name: &'static str, unit: &'static str, must: f64, aim: f64) -> Goal {
    Goal { name, unit, better: Better::Higher, target: Target::ratio(must, aim), ahead: true }
}

const fn less(name: &'static str, unit: &'static str, must: f64, aim: f64) -> Goal {
    Goal { name, unit, better: Better::Lower, target: Target::ratio(must, aim), ahead: true }
}

/// Nothing is asked beyond being ahead.
const fn ahead(name: &'static str, unit: &'static str, better: Better) -> Goal {
    Goal { name, unit, better, target: Target::ratio(1.0, 1.0), ahead: true }
}

/// The value itself may be at most this.
const fn at_most(name: &'static str, unit: &'static str, must: f64, aim: f64) -> Goal {
    Goal { name, unit, better: Better::Lower, target: Target::value(must, aim), ahead: false }
}

const GBIT: &str = "Gbit/s";

pub(super) const GOALS: [Goal; 37] = [
    more("tcp_1_bbr", GBIT, 1.7, 2.0),
    more("tcp_4_bbr", GBIT, 1.7, 2.0),
    more("tcp_reverse_bbr", GBIT, 1.7, 2.0),
    more("tcp_1_cubic", GBIT, 1.7, 2.0),
    more("tcp_4_cubic", GBIT, 1.7, 2.0),
    more("tcp_reverse_cubic", GBIT, 1.7, 2.0),
    ahead("tcp_both", GBIT, Better::Higher),
    ahead("tcp_1_v6", GBIT, Better::Higher),
    more("pod_tcp_1_bbr", GBIT, 1.6, 1.9),
    more("pod_tcp_4_bbr", GBIT, 1.6, 1.9),
    more("pod_tcp_reverse_bbr", GBIT, 1.6, 1.9),
    more("pod_tcp_1_cubic", GBIT, 1.6, 1.9),
    more("pod_tcp_4_cubic", GBIT, 1.6, 1.9),
    more("pod_tcp_reverse_cubic", GBIT, 1.6, 1.9),
    more("udp_64", "kpps", 3.5, 4.5),
    ahead("udp_1372", GBIT, Better::Higher),
    less("ping_idle", "ms", 0.5, 0.4),
    less("ping_load", "ms", 0.45, 0.3),
    ahead("rr_idle_p50", "us", Better::Lower),
    ahead("rr_idle_p99", "us", Better::Lower),
    ahead("rr_idle_p99_9", "us", Better::Lower),
    ahead("rr_load_p50", "us", Better::Lower),
    ahead("rr_load_p99", "us", Better::Lower),
    ahead("rr_load_p99_9", "us", Better::Lower),
    less("cpu_per_gbit", "ticks", 0.55, 0.45),
    at_most("out_of_order", "segments", 0.0, 0.0),
    at_most("retransmits", "segments", 0.0, 0.0),
    at_most("decrypt_errors", "datagrams", 0.0, 0.0),
    at_most("flood_loss", "%", 1.0, 0.1),
    at_most("resident_few", "MiB", 16.0, 8.0),
    ahead("tcp_1_mtu_8920", GBIT, Better::Higher),
    ahead("tcp_4_mtu_8920", GBIT, Better::Higher),
    ahead("tcp_1_peers_100", GBIT, Better::Higher),
    ahead("tcp_1_peers_1000", GBIT, Better::Higher),
    at_most("resident_1000", "MiB", 64.0, 32.0),
    at_most("idle_cpu_1000", "%", 0.5, 0.1),
    at_most("idle_cpu_few", "%", 0.5, 0.1),
];
