//! A relay as the protocol's document has it, with the model's engines: registers, tells addresses, carries.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeHalf, INITIATION_BYTES, OpenBurst, OwnKeyId, SealBatch,
    TAG_BYTES, TRANSPORT_HEADER_BYTES, TransportHalf,
};
use mesh_core::tunnel::front::Message;
use mesh_core::tunnel::model::{ModelEngine, ModelFactory, public_key};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::{Frame, PACKET_BYTES};
use mesh_types::time::MonoTime;

const OWN: OwnKeyId = OwnKeyId(0);

pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    pub(crate) key: PublicKey,
    pub(crate) up: bool,
    /// It has said that it ends, and says so to whoever registers yet.
    leaving: bool,
    /// What it tells everybody who asks; a lie, if set.
    pub(crate) lie: Option<SocketAddr>,
    /// Whether each lie names the next host of its /24.
    pub(crate) wanders: bool,
    /// Members to whom it carries nothing, and says nothing of it.
    pub(crate) swallows: BTreeSet<PublicKey>,
    /// Questions answered at the other port, and from a third one.
    pub(crate) looks: usize,
    /// Datagrams carried, and those of them that are long enough to be packets of somebody.
    pub(crate) carried: usize,
    pub(crate) carried_data: usize,
    factory: ModelFactory,
    members: Vec<PublicKey>,
    engines: BTreeMap<PublicKey, (u32, ModelEngine)>,
    /// Engines made so far: none has an index that another had, also before a restart.
    made: u32,
    registered: BTreeMap<PublicKey, SocketAddr>,
}

impl Relay {
    pub(crate) fn new(number: u8, addr: &str, members: Vec<PublicKey>) -> Self {
        let private = PrivateKey::from_bytes([number; 32]);
        Self {
            addr: addr.parse().expect("an endpoint"),
            key: public_key(&private),
            up: true,
            leaving: false,
            lie: None,
            wanders: false,
            swallows: BTreeSet::new(),
            looks: 0,
            carried: 0,
            carried_data: 0,
            factory: ModelFactory::new(&private),
            members,
            engines: BTreeMap::new(),
            made: 0,
            registered: BTreeMap::new(),
        }
    }

    /// It ends and begins anew with the same key: nobody is registered, no session opens.
    pub(crate) fn restart(&mut self) {
        self.leaving = false;
        self.engines.clear();
        self.registered.clear();
    }

    /// Whether it hears at this address: its own, or its other port.
    pub(crate) fn is_at(&self, to: SocketAddr) -> bool {
        to == self.addr || to == self.port(1)
    }

    fn port(&self, further: u16) -> SocketAddr {
        SocketAddr::new(self.addr.ip(), self.addr.port() + further)
    }

    /// What leaves for one datagram that came to `to`: from where, where to.
    pub(crate) fn receive(
        &mut self,
        now: MonoTime,
        from: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        if to == self.addr && carry::is_carried(datagram) {
            let (dst, bytes) = self.carry(from, datagram)?;
            return Some((to, dst, bytes));
        }
        match Message::of(datagram)? {
            Message::Initiation if to == self.addr => {
                let (dst, bytes) = self.greet(now, from, datagram)?;
                Some((to, dst, bytes))
            }
            Message::Transport(index) => self.answer(now, (from, to), index >> 8, datagram),
            Message::Initiation | Message::Response(_) | Message::Cookie(_) => None,
        }
    }

    fn carry(&mut self, from: SocketAddr, datagram: &[u8]) -> Option<(SocketAddr, Vec<u8>)> {
        let sender = *self.registered.iter().find(|(_, addr)| **addr == from)?.0;
        let to = PublicKey::from_bytes(*carry::parse(datagram)?.key).ok()?;
        let dst = *self.registered.get(&to).filter(|_| !self.swallows.contains(&to))?;
        let mut datagram = datagram.to_vec();
        carry::readdress(&mut datagram, sender.as_bytes());
        self.carried += 1;
        let message = carry::parse(&datagram)?.message;
        let probe = TRANSPORT_HEADER_BYTES + PACKET_BYTES + TAG_BYTES;
        self.carried_data += usize::from(message.first() == Some(&4) && message.len() < probe);
        Some((dst, datagram))
    }

    fn greet(
        &mut self,
        now: MonoTime,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Option<(SocketAddr, Vec<u8>)> {
        let peer = self.factory.identify(OWN, datagram).filter(|it| self.members.contains(it))?;
        let (_, engine) = self.engines.entry(peer).or_insert_with(|| {
            self.made += 1;
            let index = self.made;
            let (preshared, keepalive, seed) = (None, None, u64::from(index));
            let config = EngineConfig { own: OWN, peer, preshared, keepalive, index, seed };
            (index, self.factory.create(now, config))
        });
        let mut reply = [0; INITIATION_BYTES];
        let outcome = engine.handle_handshake(now, from.ip(), datagram, &mut reply).ok()?;
        Some((from, reply[..outcome.reply_len].to_vec()))
    }

    fn answer(
        &mut self,
        now: MonoTime,
        (from, to): (SocketAddr, SocketAddr),
        index: u32,
        datagram: &[u8],
    ) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        let other_port = self.port(1).port();
        let third = self.port(2);
        let main = self.addr;
        let (peer, (_, engine)) = self.engines.iter_mut().find(|(_, (at, _))| *at == index)?;
        let (mut input, mut output) = (datagram.to_vec(), vec![0; datagram.len()]);
        let (mut used, mut results) = (0, Vec::with_capacity(1));
        let whole = 0..datagram.len();
        engine.open(
            now,
            OpenBurst {
                input: &mut input,
                datagrams: std::slice::from_ref(&whole),
                output: &mut output,
                output_used: &mut used,
                results: &mut results,
            },
        );
        let opened = results.pop()?.ok()?;
        if to == main && self.registered.insert(*peer, from) != Some(from) && self.leaving {
            return Some((main, from, seal(now, engine, Frame::Leaving)?));
        }
        let (token, src) = match Frame::decode(&output[opened]).ok()? {
            Frame::WhatIsMyAddress { token } => (token, to),
            Frame::AnswerElsewhere { token } => (token, third),
            _ => return None,
        };
        self.looks += usize::from(src != main);
        if let Some(SocketAddr::V4(lie)) = self.lie.as_mut().filter(|_| self.wanders) {
            let [a, b, c, d] = lie.ip().octets();
            lie.set_ip([a, b, c, d.wrapping_add(1)].into());
        }
        let frame = Frame::YourAddressIs { token, address: self.lie.unwrap_or(from), other_port };
        Some((src, from, seal(now, engine, frame)?))
    }

    /// It is about to end, and tells all members: what leaves for that.
    pub(crate) fn leave(&mut self, now: MonoTime) -> Vec<(SocketAddr, SocketAddr, Vec<u8>)> {
        self.leaving = true;
        let members = self.members.clone();
        members.iter().filter_map(|member| self.say(now, member, Frame::Leaving)).collect()
    }

    /// A message of its own accord to a member: from where, where to.
    pub(crate) fn say(
        &mut self,
        now: MonoTime,
        to: &PublicKey,
        frame: Frame,
    ) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        let dst = *self.registered.get(to)?;
        let (_, engine) = self.engines.get_mut(to)?;
        Some((self.addr, dst, seal(now, engine, frame)?))
    }
}

/// A frame in a session.
pub(crate) fn seal(now: MonoTime, engine: &mut ModelEngine, frame: Frame) -> Option<Vec<u8>> {
    let mut sealed = vec![0; TRANSPORT_HEADER_BYTES + frame.packet_len() + TAG_BYTES];
    frame.encode(&mut sealed[TRANSPORT_HEADER_BYTES..]).expect("room");
    let slot = 0..sealed.len();
    let slots = std::slice::from_ref(&slot);
    engine.seal(now, SealBatch { buffer: &mut sealed, slots }).ok()?;
    Some(sealed)
}
