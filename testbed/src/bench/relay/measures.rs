//! What is measured, and the figures each measurement gives.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_types::key::PublicKey;
use wg_engine::{generate_private_key, public_key};

use super::super::cost;
use super::super::figures::rank;
use super::super::processors::Together;
use super::super::subject::Subject as _;
use super::load::{self, Carried, LEAD, Load, Pace};
use super::pair;
use super::site::{KEYRELAY_PORT, NEAR_NET, PAIRS, RELAY, SECOND_PORT, Site};
use super::subject::Subject;
use super::{ask, derp, flood, member};

/// Values of every figure and subject, one per round.
pub(super) type Samples = super::super::found::Samples<Subject>;

/// WireGuard's data of a full packet: with our relay's header it fits an Ethernet.
const FULL_BYTES: usize = 1_408;
const SMALL_BYTES: usize = 64;

/// Datagrams that one pair's sender hands over at once, as many as fit; several senders' are shorter.
const BURST: usize = 44;
const BURST_OF_MANY: usize = 16;
/// Small ones, which the wire takes one by one. Those of many pairs come mixed, a few of each.
const BURST_SINGLE: usize = 32;
const BURST_MIXED: usize = 4;

/// Bytes under way that are tried: each relay has what serves it best.
const WINDOWS: [u64; 5] = [32 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20];
const TRY: Duration = Duration::from_millis(400);

/// Beside which requests are timed: what every relay carries with time to spare.
const BESIDE_BITS_PER_SECOND: f64 = 300e6;

/// Registered at one time.
const MEMBERS: usize = 10_000;

const GARBAGE: u32 = 1_000_000;
/// Sent in so many parts.
const FLOOD_PARTS: u32 = 5;
/// Before memory is looked at: buffers come to their size.
const WARM_UP: u32 = 50_000;

/// A measurement: what runs, and the names of what it gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measure {
    pub(super) figures: &'static [&'static str],
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Throughput of so many pairs; of one also what it costs.
    Forward {
        pairs: usize,
    },
    /// Small datagrams that are not merged.
    Single {
        pairs: usize,
    },
    Idle,
    Loaded,
    Members,
    Flood,
}

const fn at(figures: &'static [&'static str], kind: Kind) -> Measure {
    Measure { figures, kind }
}

pub(super) const MEASURES: [Measure; 9] = [
    at(&["forward_1", "cpu_per_gbit"], Kind::Forward { pairs: 1 }),
    at(&["forward_10"], Kind::Forward { pairs: 10 }),
    at(&["forward_100"], Kind::Forward { pairs: 100 }),
    at(&["single_64"], Kind::Single { pairs: 1 }),
    at(&["single_64_100"], Kind::Single { pairs: 100 }),
    at(&["rtt_p50", "rtt_p99", "added_p50", "added_p99"], Kind::Idle),
    at(&["load_p50", "load_p99"], Kind::Loaded),
    at(&["resident_10000"], Kind::Members),
    at(&["flood_p99", "flood_resident"], Kind::Flood),
];

/// What is known from one round to the next.
#[derive(Debug, Default)]
pub(super) struct State {
    windows: BTreeMap<(&'static str, Subject), u64>,
    pub(super) samples: Samples,
}

impl Measure {
    /// Whether it says anything about this subject.
    pub(super) fn applies_to(self, subject: Subject) -> bool {
        match self.kind {
            Kind::Forward { pairs: 1 } | Kind::Idle => true,
            Kind::Forward { .. } | Kind::Single { .. } | Kind::Loaded => subject != Subject::Direct,
            Kind::Members | Kind::Flood => subject == Subject::Keyrelay,
        }
    }

    /// What would be the same in every round is done once.
    pub(super) fn applies_in(self, round: usize) -> bool {
        round == 0 || self.kind != Kind::Members
    }

    /// How long a round of it takes, about.
    pub(super) fn takes(self, time: Duration, round: usize) -> Duration {
        let tries = WINDOWS.len() as u32 * (TRY + 2 * LEAD);
        let first = if round == 0 { tries } else { Duration::ZERO };
        match self.kind {
            Kind::Forward { .. } | Kind::Single { .. } => time + LEAD + first,
            Kind::Idle | Kind::Loaded => time + LEAD,
            Kind::Members => Duration::from_secs(30),
            Kind::Flood => time + Duration::from_secs(u64::from(GARBAGE / flood::PER_SECOND) + 1),
        }
    }

    /// One round of `time` with this subject.
    pub(super) fn run(
        self,
        subject: Subject,
        site: &Site,
        time: Duration,
        state: &mut State,
    ) -> Result<()> {
        self.measure(subject, site, time, state).with_context(|| {
            format!("{} of {}: it says: {}", self.figures[0], subject.name(), site.says(subject))
        })
    }

    fn measure(
        self,
        subject: Subject,
        site: &Site,
        time: Duration,
        state: &mut State,
    ) -> Result<()> {
        let figures = self.figures;
        match self.kind {
            Kind::Forward { pairs } => {
                let burst = if pairs == 1 { BURST } else { BURST_OF_MANY };
                let load = Load { bytes: FULL_BYTES, burst, pace: Pace::Window(0), time };
                let (carried, cost) = self.loaded(subject, site, pairs, load, state)?;
                state.samples.push(figures[0], subject, carried.bits_per_second / 1e9);
                if let (Some(name), Some(cost)) = (figures.get(1), cost) {
                    // A tick is 10 ms.
                    let gbits = carried.bytes as f64 * 8.0 / 1e9;
                    state.samples.push(name, subject, cost.as_secs_f64() * 100.0 / gbits);
                }
            }
            Kind::Single { pairs } => {
                let burst = if pairs == 1 { BURST_SINGLE } else { BURST_MIXED };
                let load = Load { bytes: SMALL_BYTES, burst, pace: Pace::Window(0), time };
                site.merge(false)?;
                let carried = self.loaded(subject, site, pairs, load, state);
                site.merge(true)?;
                state.samples.push(figures[0], subject, carried?.0.datagrams_per_second / 1e3);
            }
            Kind::Idle => {
                let _together = Together::begin(site.pid(subject))?;
                let times = idle(site, subject, time)?;
                state.samples.push_ranks(&figures[..2], subject, &times);
            }
            Kind::Loaded => {
                let _together = Together::begin(site.pid(subject))?;
                let times = beside_load(site, subject, time)?;
                state.samples.push_ranks(figures, subject, &times);
            }
            Kind::Members => state.samples.push(figures[0], subject, members(site)?),
            Kind::Flood => {
                let (slower, grown) = flooded(site, time)?;
                state.samples.push(figures[0], subject, slower);
                state.samples.push(figures[1], subject, grown);
            }
        }
        Ok(())
    }

    /// Throughput with the window that serves this relay best, and the relay's processor time.
    fn loaded(
        self,
        subject: Subject,
        site: &Site,
        pairs: usize,
        load: Load,
        state: &mut State,
    ) -> Result<(Carried, Option<Duration>)> {
        let known = state.windows.get(&(self.figures[0], subject)).copied();
        let window = match known {
            Some(window) => window,
            None => best_window(subject, site, pairs, load)?,
        };
        state.windows.insert((self.figures[0], subject), window);
        let spent = || site.pid(subject).map(cost::processor_time).transpose();
        let before = spent()?;
        let load = Load { pace: Pace::Window(window), ..load };
        let carried = carry(subject, site, pairs, load)?;
        ensure!(carried.bytes > 0, "nothing came through");
        Ok((carried, spent()?.zip(before).map(|(after, before)| after - before)))
    }
}

fn best_window(subject: Subject, site: &Site, pairs: usize, load: Load) -> Result<u64> {
    let mut best = (0.0, WINDOWS[0]);
    for window in WINDOWS {
        let load = Load { pace: Pace::Window(window), time: TRY, ..load };
        let carried = carry(subject, site, pairs, load)?.bits_per_second;
        if carried > best.0 {
            best = (carried, window);
        }
    }
    Ok(best.1)
}

fn carry(subject: Subject, site: &Site, pairs: usize, load: Load) -> Result<Carried> {
    if subject == Subject::Derper {
        return derp::load(site, pairs, load);
    }
    let pairs = pair::open(site, subject, 0..pairs)?;
    load::run((&site.near.netns(), &site.far.netns()), pairs, load)
}

fn idle(site: &Site, subject: Subject, time: Duration) -> Result<Vec<Duration>> {
    if subject == Subject::Derper {
        return derp::ask(site, 0.0, time);
    }
    let pairs = pair::open(site, subject, 0..1)?;
    ask::run(pairs.first().context("there is no pair")?, time)
}

/// Requests of one pair beside the datagrams of another.
fn beside_load(site: &Site, subject: Subject, time: Duration) -> Result<Vec<Duration>> {
    if subject == Subject::Derper {
        return derp::ask(site, BESIDE_BITS_PER_SECOND, time);
    }
    let mut pairs = pair::open(site, subject, 0..2)?;
    let asking = pairs.pop().context("there is no pair")?;
    let pace = Pace::BitsPerSecond(BESIDE_BITS_PER_SECOND);
    let load = Load { bytes: FULL_BYTES, burst: BURST_OF_MANY, pace, time: time + LEAD };
    std::thread::scope(|scope| {
        let (near, far) = (site.near.netns(), site.far.netns());
        let loading = scope.spawn(move || load::run((&near, &far), pairs, load));
        std::thread::sleep(LEAD);
        let times = ask::run(&asking, time);
        let carried = loading.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        ensure!(
            carried.bits_per_second > BESIDE_BITS_PER_SECOND / 2.0,
            "the load does not come through"
        );
        times
    })
}

/// Memory of a relay of ours where so many are registered, in MiB.
fn members(site: &Site) -> Result<f64> {
    let keys: Vec<_> = (0..MEMBERS).map(|_| generate_private_key()).collect();
    let named: Vec<PublicKey> = keys.iter().map(public_key).collect();
    let (relay, key) = site.second_keyrelay(&named)?;
    let to = SocketAddr::from((RELAY[0], SECOND_PORT));
    for (number, own) in keys.iter().enumerate() {
        let address = std::net::SocketAddrV4::new(pair::host(NEAR_NET, number), 8_000);
        let sockets = pair::bind(&site.near.netns(), &[address])?;
        let socket = sockets.first().context("no socket")?;
        socket.connect(to)?;
        member::join(socket, key, own, number as u32)
            .with_context(|| format!("member {number}"))?;
    }
    let resident = cost::resident(relay.process().pid)?;
    relay.kill()?;
    Ok(resident)
}

/// How much slower requests are while strangers' datagrams come, and by how many MiB memory grows. Calm and flood take turns,
/// so that what else the machine does meets both.
fn flooded(site: &Site, time: Duration) -> Result<(f64, f64)> {
    let pid = site.pid(Subject::Keyrelay).context("there is no relay")?;
    let to = SocketAddr::from((RELAY[0], KEYRELAY_PORT));
    let garbage = |many| flood::garbage(&site.near.netns(), site.relay_key, to, many);
    garbage(WARM_UP)?;
    let before = cost::resident(pid)?;
    let pair = pair::open(site, Subject::Keyrelay, PAIRS - 1..PAIRS)?;
    let pair = pair.first().context("there is no pair")?;
    let part = GARBAGE / FLOOD_PARTS;
    let (mut calm, mut flooded) = (Vec::new(), Vec::new());
    for _ in 0..FLOOD_PARTS {
        calm.extend(ask::run(pair, time / FLOOD_PARTS)?);
        flooded.extend(std::thread::scope(|scope| {
            let flood = scope.spawn(|| garbage(part));
            let times = ask::run(pair, Duration::from_secs(1) * part / flood::PER_SECOND);
            flood.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            times
        })?);
    }
    let slower = p99_seconds(&flooded) / p99_seconds(&calm);
    Ok((slower, (cost::resident(pid)? - before).max(0.0)))
}

fn p99_seconds(times: &[Duration]) -> f64 {
    let mut sorted: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    sorted.sort_by(f64::total_cmp);
    rank(&sorted, 990)
}

const _: () = assert!(PAIRS > 100, "every pair has keys");
const _: () = assert!(
    FULL_BYTES + mesh_types::carry::CARRY_HEADER_BYTES + 28 <= 1_500,
    "an Ethernet takes it"
);

#[cfg(test)]
mod tests {
    use super::super::super::plan::assert_measured_once;
    use super::super::goals::GOALS;
    use super::*;

    #[test]
    fn every_figure_is_measured_once_and_has_a_goal() {
        assert_measured_once(MEASURES.iter().map(|measure| measure.figures), &GOALS);
    }
}
