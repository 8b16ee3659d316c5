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
    /// Beside wireguard-go, or of the value itself.
    target: Target,
    /// Whether being ahead of every peer that encrypts is asked for.
    ahead: bool,
}

impl plan::Goal<Subject> for Goal {
    fn what(&self) -> (&'static str, &'static str, Better) {
        (self.name, self.unit, self.better)
    }

    fn beside(&self, peer: Subject) -> Target {
        match peer {
            _ if peer.is_for_scale() => Target::NONE,
            Subject::WireguardGo if !self.target.is_of_value() => self.target,
            _ if self.ahead => Target::ratio(1.0, 1.0),
            _ => Target::NONE,
        }
    }

    fn own(&self) -> Target {
        if self.target.is_of_value() { self.target } else { Target::NONE }
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

/// The value itself may be at most this: none at all, or memory, of which others may take less.
const fn at_most(name: &'static str, unit: &'static str, must: f64, aim: f64) -> Goal {
    Goal { name, unit, better: Better::Lower, target: Target::value(must, aim), ahead: false }
}

/// As [`at_most`], and others are to be left behind besides.
const fn least(name: &'static str, unit: &'static str, must: f64, aim: f64) -> Goal {
    Goal { ahead: true, ..at_most(name, unit, must, aim) }
}

/// Shown, and nothing asked.
const fn shown(name: &'static str, unit: &'static str) -> Goal {
    Goal { name, unit, better: Better::Lower, target: Target::NONE, ahead: false }
}

const GBIT: &str = "Gbit/s";

pub(super) const GOALS: [Goal; 38] = [
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
    shown("ping_load_lost", "%"),
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
    least("idle_cpu_1000", "%", 0.5, 0.1),
    least("idle_cpu_few", "%", 0.5, 0.1),
];
