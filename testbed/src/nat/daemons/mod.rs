//! Pairs connected by what users run: a daemon at either site, and two relays on the internet that are theirs alone.
//!
//! ```text
//! cold      both daemons start at once, and somebody speaks already                      start
//! word      both start anew, and are registered at both relays; somebody speaks          first_packet, direct
//!           a TCP stream begins with it and lives through all that follows
//!
//!   direct                                           relayed
//!   the path is blocked: by a relay     blocked      nobody says direct for a while
//!   and open again                      direct_again the relay in use is killed         relay_move
//!   one side's NAT or address changes   address_change                                   the same
//!   nobody speaks for 30 s, where mappings are short: the first packet after it          after_silence
//!   UDP of the first side is blocked    udp_blocked      the same, after the relay was killed
//!   both relays are killed: nothing is noticed           relays_gone
//! ```
//!
//! All times are of datagrams over the overlay, one every 20 ms: a stream's own would be those of TCP, which waits longer after
//! each loss.

mod changes;
mod node;
mod relay;
mod stream;
mod talk;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_types::status::PathKind;

use self::changes::{Block, Moved, is_public, mover};
use self::node::{Node, roster};
use self::relay::{Place, Relay};
use self::stream::Stream;
use self::talk::Talk;
use super::expected::{Expected, expected};
use super::kind::Kind;
use super::pair::{Changes, Got, Outcome};
use super::pairs::Connect;
use super::site::{NatLab, Site};
use crate::lab::Programs;

/// Daemons take a second to start and register; a node behind something unforeseen is not waited for longer.
const REGISTER_LIMIT: Duration = Duration::from_secs(15);
const FIRST_LIMIT: Duration = Duration::from_secs(15);
const DIRECT_LIMIT: Duration = Duration::from_secs(20);
/// How long a relayed pair is watched: nodes that do not know better seek a direct way for five seconds.
const WATCH_RELAYED: Duration = Duration::from_secs(6);
/// What a change does shows itself within this time.
const SETTLE: Duration = Duration::from_millis(2_500);
const BACK_LIMIT: Duration = Duration::from_secs(30);
/// Longer than short mappings live.
const SILENCE: Duration = Duration::from_secs(30);
/// Between two questions for the path.
const LOOK: Duration = Duration::from_millis(25);

/// Last parts of the relays' addresses begin here; sites have smaller ones.
const FIRST_RELAY: u8 = 100;

/// Connects pairs with daemons.
#[derive(Debug)]
pub struct Daemons<'a> {
    lab: &'a NatLab,
    programs: Programs,
    /// Where two relays run; whoever connects a pair takes one such place.
    places: Mutex<Vec<[Place; 2]>>,
}

impl<'a> Daemons<'a> {
    /// Places for the relays of `parallel` pairs at once, known to every node by name.
    pub fn prepare(lab: &'a NatLab, parallel: usize) -> Result<Self> {
        let programs = lab.lab.programs().clone();
        let there = programs.meshd.is_file() && programs.keyrelay.is_file();
        ensure!(there, "build them first: cargo build -p meshd -p keyrelay");
        let (mut places, mut hosts) = (Vec::new(), String::from("127.0.0.1 localhost\n"));
        let mut number = FIRST_RELAY;
        for _ in 0..parallel {
            let mut place = || -> Result<Place> {
                let name = format!("relay-{number}");
                let namespace = lab.add_machine(&name, number)?;
                hosts += &format!("192.0.2.{number} {name}\n2001:db8:f::{number} {name}\n");
                number += 1;
                Ok(Place { namespace, name })
            };
            places.push([place()?, place()?]);
        }
        for site in lab.sites() {
            site.node.write("/etc/hosts", &hosts)?;
        }
        Ok(Self { lab, programs, places: Mutex::new(places) })
    }
}

impl Connect for Daemons<'_> {
    fn by(&self) -> &'static str {
        "daemons"
    }

    /// A site has one node; and a NAT that others are behind is changed for one pair at a time, of which nobody else behind it may
    /// notice anything: both could lose their way at once, or when their relays are dead.
    fn needs(&self, a: &Site, b: &Site) -> Vec<String> {
        let shared = |site: &Site| site.kind.neighbours().map(|_| site.kind.name().to_owned());
        let alone = |site: &Site| site.node.name().to_owned();
        let mut all: Vec<String> = [a, b].into_iter().filter_map(shared).collect();
        all.dedup();
        all.into_iter().chain([alone(a), alone(b)]).collect()
    }

    fn connect(&self, a: &Site, b: &Site) -> Result<Outcome> {
        let lock = || self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let places = lock().pop().context("more pairs at once than there are relays for")?;
        let outcome = Run::new(self, a, b, &places).and_then(Run::drive);
        lock().push(places);
        outcome
    }
}

/// One pair.
struct Run<'a> {
    with: &'a Daemons<'a>,
    nodes: [Node<'a>; 2],
    relays: [Relay<'a>; 2],
    expected: Expected,
    changes: Changes,
    /// Until the pair is through.
    moved: Option<Moved<'a>>,
    /// What the stream or a path did that it should not.
    broken: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(
        with: &'a Daemons<'a>,
        a: &'a Site,
        b: &'a Site,
        places: &'a [Place; 2],
    ) -> Result<Self> {
        let nodes = [Node::new(a)?, Node::new(b)?];
        let [first, second] = places;
        let keys = [nodes[0].public_key(), nodes[1].public_key()];
        let mut relays = [Relay::new(first, keys)?, Relay::new(second, keys)?];
        for relay in &mut relays {
            relay.start(&with.programs.keyrelay)?;
        }
        let (expected, changes) = (expected(a.kind, b.kind), Changes::default());
        Ok(Self { with, nodes, relays, expected, changes, moved: None, broken: Vec::new() })
    }

    fn drive(mut self) -> Result<Outcome> {
        self.cold()?;
        self.start()?;
        self.wait_registered()?;
        let talk = self.talk()?;
        let [from, to] = &self.nodes;
        let (from, to, address) = (&from.site.node, &to.site.node, to.overlay());
        // With the first packets, while they are still relayed.
        let (first, stream) = std::thread::scope(|scope| {
            let stream = scope.spawn(|| Stream::connect(from, to, address));
            let first = talk.first_answer(FIRST_LIMIT);
            (first, stream.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
        });
        if first.is_none() {
            return Ok(self.outcome(Got::Nothing, None, None, None));
        }
        let stream = stream.context("no stream")?;
        let direct = self.watch(&talk)?;
        self.note(stream.check("its way was found"));
        match (direct, self.expected) {
            (Some(_), Expected::Direct) => self.change_direct(&talk, &stream)?,
            (None, Expected::Relayed) => self.change_relayed(&talk, &stream)?,
            _ => {}
        }
        self.broken.extend(self.nodes.iter().filter_map(Node::errors));
        let got = if direct.is_some() { Got::Direct } else { Got::Relayed };
        let survived = self.broken.is_empty();
        Ok(self.outcome(got, first, direct, Some(survived)))
    }

    fn outcome(
        self,
        got: Got,
        first_packet: Option<Duration>,
        direct: Option<Duration>,
        stream_survived: Option<bool>,
    ) -> Outcome {
        let Self { changes, broken, .. } = self;
        Outcome { got, first_packet, direct, stream_survived, changes, broken }
    }

    fn start(&mut self) -> Result<()> {
        let keys = [self.relays[0].key(), self.relays[1].key()];
        let told = [self.relays[0].told(), self.relays[1].told()];
        let [a, b] = &self.nodes;
        let roster = roster([a, b], &keys)?;
        let meshd = &self.with.programs.meshd;
        self.nodes.iter_mut().try_for_each(|node| node.start(meshd, &roster, &told))
    }

    fn talk(&self) -> Result<Talk> {
        let [a, b] = &self.nodes;
        Talk::start(&a.site.node, &b.site.node, b.overlay())
    }

    /// Both daemons start at once, and somebody speaks already.
    fn cold(&mut self) -> Result<()> {
        let talk = self.talk()?;
        self.start()?;
        self.changes.start = talk.first_answer(FIRST_LIMIT);
        if self.changes.start.is_none() {
            self.broken.push(format!("no packet within {FIRST_LIMIT:?} of a start of both"));
        }
        drop(talk);
        self.nodes.iter_mut().try_for_each(Node::stop)
    }

    fn wait_registered(&self) -> Result<()> {
        let end = Instant::now() + REGISTER_LIMIT;
        for node in &self.nodes {
            while !node.is_registered() {
                ensure!(Instant::now() < end, "{}", self.not_registered(node));
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// What both ends say of it.
    fn not_registered(&self, node: &Node<'_>) -> String {
        let mut text = format!("{} is not registered", node.site.node.name());
        if let Ok(status) = node.status() {
            text += &format!(": {}", serde_json::to_string(&status.keyrelays).unwrap_or_default());
        }
        text += &node.last_words();
        self.relays.iter().for_each(|relay| text += &relay.last_words());
        text
    }

    fn are(&self, what: impl Fn(PathKind) -> bool) -> bool {
        self.nodes.iter().all(|node| what(node.path()))
    }

    /// Until both say direct, or long enough if neither should.
    fn watch(&self, talk: &Talk) -> Result<Option<Duration>> {
        let limit = match self.expected {
            Expected::Direct => DIRECT_LIMIT,
            Expected::Relayed => WATCH_RELAYED,
        };
        while talk.age() < limit {
            if self.claims_direct() {
                return Ok(Some(talk.age()));
            }
            std::thread::sleep(LOOK);
        }
        Ok(None)
    }

    /// Both, where that is right; either, where it is wrong.
    fn claims_direct(&self) -> bool {
        match self.expected {
            Expected::Direct => self.are(is_direct),
            Expected::Relayed => self.nodes.iter().any(|node| is_direct(node.path())),
        }
    }

    fn change_direct(&mut self, talk: &Talk, stream: &Stream) -> Result<()> {
        let [a, b] = [self.nodes[0].site, self.nodes[1].site];
        let event = Instant::now();
        let block = Block::between(self.with.lab, a, b)?;
        self.changes.blocked =
            Some(talk.silence_after(event, SETTLE, BACK_LIMIT).context("blocked")?);
        if !self.are(|path| path == PathKind::Relayed) {
            self.broken.push("blocked, and not relayed".to_owned());
        }
        self.note(stream.check("the direct path was blocked"));
        drop(block);
        self.changes.direct_again = self.wait_direct(BACK_LIMIT);
        if self.changes.direct_again.is_none() {
            self.broken.push("not direct again after the path was open again".to_owned());
        }
        self.note(stream.check("the direct path was open again"));
        self.move_one(talk, stream)?;
        if self.wait_direct(BACK_LIMIT).is_none() {
            self.broken.push("not direct again after a side had moved".to_owned());
        }
        self.be_silent(talk, stream);
        self.wait_direct(BACK_LIMIT);
        self.block_udp(talk, stream)?;
        if self.wait_direct(BACK_LIMIT).is_none() {
            self.broken.push("not direct again after UDP was let through".to_owned());
        }
        let event = Instant::now();
        self.relays.iter_mut().try_for_each(Relay::kill)?;
        self.changes.relays_gone =
            Some(talk.silence_after(event, SETTLE, BACK_LIMIT).context("relays killed")?);
        if !self.are(is_direct) {
            self.broken.push("not direct without relays".to_owned());
        }
        self.note(stream.check("the relays were killed"));
        Ok(())
    }

    fn change_relayed(&mut self, talk: &Talk, stream: &Stream) -> Result<()> {
        self.move_one(talk, stream)?;
        self.be_silent(talk, stream);
        let used = self.relay_in_use()?;
        let event = Instant::now();
        self.relays.get_mut(used).context("no such relay")?.kill()?;
        self.changes.relay_move =
            Some(talk.silence_after(event, SETTLE, BACK_LIMIT).context("relay killed")?);
        self.note(stream.check("its relay was killed"));
        if !self.are(|path| path == PathKind::Relayed) {
            self.broken.push("not said to be relayed".to_owned());
        }
        self.block_udp(talk, stream)
    }

    /// All UDP of the first side is blocked: TLS carries what does, where the relay is needed.
    fn block_udp(&mut self, talk: &Talk, stream: &Stream) -> Result<()> {
        let site = self.nodes[0].site;
        if site.kind == Kind::UdpBlocked {
            return Ok(());
        }
        let event = Instant::now();
        let block = Block::all_udp(self.with.lab, site)?;
        self.changes.udp_blocked =
            Some(talk.silence_after(event, SETTLE, BACK_LIMIT).context("UDP blocked")?);
        self.note(stream.check("UDP was blocked"));
        drop(block);
        Ok(())
    }

    /// One side's NAT gives it another port, or it has another address.
    fn move_one(&mut self, talk: &Talk, stream: &Stream) -> Result<()> {
        let mover = mover(self.nodes[0].site, self.nodes[1].site);
        let event = Instant::now();
        let moved = Moved::begin(mover)?;
        let silence = talk.silence_after(event, SETTLE, BACK_LIMIT).context("moved")?;
        self.changes.address_change = Some(silence);
        self.changes.public_side_moved = is_public(mover);
        self.note(stream.check("a side had moved"));
        self.moved = Some(moved);
        Ok(())
    }

    /// Where mappings are short.
    fn be_silent(&mut self, talk: &Talk, stream: &Stream) {
        if self.nodes.iter().all(|node| node.site.kind != Kind::ShortMappings) {
            return;
        }
        stream.set_silent(true);
        self.changes.after_silence = talk.be_silent(SILENCE, BACK_LIMIT);
        if self.changes.after_silence.is_none() {
            self.broken.push(format!("no packet within {BACK_LIMIT:?} of a silence"));
        }
        stream.set_silent(false);
        self.note(stream.check("a silence"));
    }

    fn wait_direct(&self, limit: Duration) -> Option<Duration> {
        let begin = Instant::now();
        while begin.elapsed() < limit {
            if self.are(is_direct) {
                return Some(begin.elapsed());
            }
            std::thread::sleep(LOOK);
        }
        None
    }

    /// The relay that the first node sends to, or one of both.
    fn relay_in_use(&self) -> Result<usize> {
        let status = self.nodes[0].status()?;
        let endpoint = status.peers.first().and_then(|peer| peer.endpoint);
        let used = status.keyrelays.iter().find(|relay| relay.endpoint == endpoint);
        let key = used.context("it goes by no relay it knows")?.public_key;
        self.relays.iter().position(|relay| relay.key() == key).context("no relay of ours")
    }

    fn note(&mut self, result: Result<()>) {
        self.broken.extend(result.err().map(|error| format!("{error:#}")));
    }
}

fn is_direct(path: PathKind) -> bool {
    matches!(path, PathKind::Direct | PathKind::Roamed)
}
