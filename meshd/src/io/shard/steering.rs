//! Where peers are, told among shards, and what the kernel's filter makes of it.

use std::mem::take;
use std::net::SocketAddr;

use mesh_core::tunnel::config::{Event, PeerConfig, Role};
use mesh_core::tunnel::steer::FRONT;
use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;

use super::Shard;
use crate::io::filter_of;

impl Shard {
    /// For a tunnel made anew after a panic, and for the filter.
    pub(super) fn note_place(&mut self, key: PublicKey, at: SocketAddr) {
        self.steer_anew |= self.places.note(key, at);
    }

    /// Likewise, as others tell.
    pub(super) fn note_told_place(&mut self, key: PublicKey, at: SocketAddr) {
        self.steer_anew |= self.places.note_told(key, at);
    }

    /// What other shards have to know of what happened to peers of ours.
    pub(super) fn tell_shards(&mut self, event: &Event) {
        match *event {
            Event::EndpointChanged { key, endpoint } => {
                self.note_place(key, endpoint);
                if let Some(exchange) = &self.exchange {
                    exchange.tell_place(key, endpoint);
                }
            }
            Event::Seen { relay, sight } => {
                if let Some(exchange) = &self.exchange {
                    exchange.tell_seen(relay, sight);
                }
            }
            Event::RelayInDoubt { relay, doubt } => {
                if let Some(exchange) = &self.exchange {
                    exchange.tell_doubt(relay, doubt);
                }
            }
            Event::PassOver { relay, peer } => {
                if let Some(exchange) = &self.exchange {
                    exchange.tell_passed_over(relay, peer);
                }
            }
            Event::SessionEstablished { .. }
            | Event::RelayAnswered { .. }
            | Event::Unanswered { .. }
            | Event::HandshakeGaveUp { .. } => {}
        }
    }

    /// Whoever is no peer any more is nowhere; of those who are yet to be one it is known where they were.
    pub(super) fn forget_removed(&mut self, peers: &[PeerConfig]) {
        let known = self.known_peers();
        let relays = |peers: &[PeerConfig]| {
            peers.iter().filter(|peer| peer.role == Role::Relay).cloned().collect::<Vec<_>>()
        };
        self.steer_anew |= relays(known) != relays(peers);
        self.steer_anew |= self.places.set_peers(peers.iter().map(|peer| peer.key).collect());
        self.past.retain(|key| self.places.is_peer(key));
    }

    /// For the shard's exchange, after peers or bridges have changed.
    pub(super) fn note_relays(&mut self) {
        let relays: Vec<_> = self.relay_addresses().collect();
        if let Some(exchange) = &mut self.exchange {
            exchange.set_relays(relays.into_iter());
        }
    }

    /// Where relays are reached, and so send from.
    fn relay_addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let relays = self.known_peers().iter().filter(|peer| peer.role == Role::Relay);
        let candidates = relays.flat_map(|relay| relay.candidates.iter());
        candidates.chain(self.bridges.values()).copied()
    }

    fn known_peers(&self) -> &[PeerConfig] {
        self.peers.as_deref().map_or(&[], Vec::as_slice)
    }

    /// Has the kernel bring what comes from addresses that peers of several shards share to one of them. One shard sees to it
    /// for all, and all hear of the same places.
    pub(super) fn steer(&mut self, now: MonoTime) {
        let sees_to_it = self.exchange.is_some() && self.config.share.index() == FRONT;
        if take(&mut self.steer_anew) && sees_to_it {
            let addresses = self.places.gathered(self.relay_addresses());
            self.gathering.want(now, addresses);
        }
        let Some(gathered) = self.gathering.look(now) else { return };
        if let Err(error) = self.udp.set_filter(&filter_of(self.config.share.of(), &gathered)) {
            tracing::debug!(%error, "the kernel takes no filter");
        }
    }
}
