//! Every figure there is: its unit, which way is better, and what it must reach beside whom.

use super::super::figures::{Better, Target};
use super::super::plan;
use super::subject::Subject;

/// A figure of `bench relay`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Goal {
    name: &'static str,
    unit: &'static str,
    better: Better,
    /// Beside coturn and derper.
    others: Target,
    /// Beside the plain forwarder.
    forwarder: Target,
    /// Of the value itself.
    own: Target,
}

impl plan::Goal<Subject> for Goal {
    fn what(&self) -> (&'static str, &'static str, Better) {
        (self.name, self.unit, self.better)
    }

    fn beside(&self, peer: Subject) -> Target {
        match peer {
            Subject::Coturn | Subject::Derper => self.others,
            Subject::Forwarder => self.forwarder,
            Subject::Keyrelay | Subject::Direct => Target::NONE,
        }
    }

    fn own(&self) -> Target {
        self.own
    }
}

const fn more(name: &'static str, unit: &'static str, others: Target) -> Goal {
    let forwarder = Target::ratio(0.5, 0.8);
    Goal { name, unit, better: Better::Higher, others, forwarder, own: Target::NONE }
}

const fn less(name: &'static str, unit: &'static str, forwarder: Target) -> Goal {
    let others = Target::ratio(1.0, 0.8);
    Goal { name, unit, better: Better::Lower, others, forwarder, own: Target::NONE }
}

/// Shown, and nothing asked.
const fn shown(name: &'static str, unit: &'static str) -> Goal {
    let none = Target::NONE;
    Goal { name, unit, better: Better::Lower, others: none, forwarder: none, own: none }
}

const fn at_most(name: &'static str, unit: &'static str, must: f64, aim: f64) -> Goal {
    Goal { own: Target::value(must, aim), ..shown(name, unit) }
}

const GBIT: &str = "Gbit/s";
const THREE: Target = Target::ratio(3.0, 5.0);
/// Of datagrams that come one by one each costs system calls, whoever makes them.
const AHEAD: Target = Target::ratio(1.0, 3.0);

pub(super) const GOALS: [Goal; 15] = [
    more("forward_1", GBIT, THREE),
    more("forward_10", GBIT, THREE),
    more("forward_100", GBIT, THREE),
    more("single_64", "kpps", AHEAD),
    more("single_64_100", "kpps", AHEAD),
    less("cpu_per_gbit", "ticks", Target::ratio(2.0, 1.25)),
    shown("rtt_p50", "us"),
    shown("rtt_p99", "us"),
    less("added_p50", "us", Target::ratio(1.2, 1.0)),
    less("added_p99", "us", Target::ratio(1.2, 1.0)),
    less("load_p50", "us", Target::NONE),
    less("load_p99", "us", Target::NONE),
    at_most("resident_10000", "MiB", 256.0, 160.0),
    at_most("flood_resident", "MiB", 1.0, 0.1),
    at_most("flood_p99", "x", 2.0, 1.2),
];
