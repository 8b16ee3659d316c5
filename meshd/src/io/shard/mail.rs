//! What control and other shards have posted, worked off letter by letter. A letter is taken when its turn comes, so that a
//! panic in one loses none of the others: the next life goes on with them.

use std::mem::take;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::tunnel::config::PeerConfig;
use mesh_core::tunnel::engine::{EngineFactory as _, OwnKeyId};
use mesh_types::key::PrivateKey;
use mesh_types::time::MonoTime;
use netcfg::clock;
use netcfg::tun::Tun;
use netcfg::udp::UdpSocket;
use rustix::event::{PollFd, PollFlags, poll};

use super::{BoringTunnel, ERROR_PAUSE, Merging, Shard, possible};
use crate::io::busy_poll::timespec;

impl Shard {
    /// Rests after a panic; true: stop.
    pub(super) fn pause(&mut self, pause: Duration) -> bool {
        let until = clock::now() + pause;
        loop {
            self.letters.add(self.mailbox.take());
            let now = clock::now();
            if self.letters.stop || now >= until {
                return self.letters.stop;
            }
            let mut mail = [PollFd::new(&*self.mailbox, PollFlags::IN)];
            if poll(&mut mail, Some(&timespec(until.since(now)))).is_err() {
                std::thread::sleep(ERROR_PAUSE.min(until.since(now)));
            }
        }
    }

    /// Takes what a tunnel is made of, before one is made: what panics again and again may be the set of peers, and the next
    /// one mends it. True: stop.
    pub(super) fn read_settings(&mut self) -> bool {
        self.letters.add(self.mailbox.take());
        if let Some((id, key)) = self.letters.own_key.take() {
            (self.config.own, self.own_key) = (id, key);
        }
        self.take_out_made_anew();
        if let Some(peers) = self.letters.peers.take() {
            self.keep_peers(peers);
        }
        self.letters.stop
    }

    /// Does what was asked; true: stop.
    pub(super) fn read_mail(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) -> bool {
        self.letters.add(self.mailbox.take());
        if self.letters.stop {
            return true;
        }
        if let Some((device, tun)) = self.letters.tun.take() {
            self.device = device;
            self.replace_tun(tunnel, tun);
        }
        if self.letters.udp.is_some() {
            // What was written for the old one leaves by it.
            self.transmit(tunnel, now);
        }
        if let Some(udp) = self.letters.udp.take() {
            self.replace_udp(tunnel, udp);
        }
        self.read_routing(tunnel, now);
        self.read_who_is_who(tunnel, now);
        self.read_places(tunnel, now);
        self.read_of_relays(tunnel, now);
        self.read_initiations(tunnel, now);
        self.transmit(tunnel, now);
        while let Some(asker) = self.letters.snapshots.pop() {
            // An asker that gave up is gone: nothing to do about it.
            let _ = asker.try_send(self.snapshot(tunnel, now));
        }
        false
    }

    fn replace_tun(&mut self, tunnel: &mut BoringTunnel, tun: Tun) {
        self.writer.vnet_hdr = tun.features().vnet_hdr;
        self.writer.merging = Merging::new(possible(self.config.coalesce, tun.features()));
        tunnel.set_coalesce(self.writer.merging.options());
        // Somebody renamed it: left alone it would keep the overlay addresses for ever.
        if let Some(before) = self.tun.replace(tun) {
            before.retire();
        }
        self.tun_paused_until = MonoTime::ZERO;
    }

    fn replace_udp(&mut self, tunnel: &mut BoringTunnel, udp: UdpSocket) {
        self.past.udp.add(self.udp.counters());
        self.udp = udp;
        tunnel.set_port(self.udp.local_port());
        self.udp_paused_until = MonoTime::ZERO;
        // A new group has the filter of one without such addresses.
        self.gathering.begin_anew();
        self.steer_anew = true;
        tunnel.forget_locals();
    }

    fn read_routing(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        if take(&mut self.letters.rerouted) {
            tunnel.forget_locals();
        }
        while let Some((key, pin)) = self.letters.astray.pop_first() {
            tunnel.forget_pin(now, &key, pin);
        }
    }

    fn read_who_is_who(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        if self.take_out_made_anew() {
            self.apply_peers(tunnel, now);
        }
        if let Some((id, key)) = self.letters.own_key.take() {
            self.change_own_key(tunnel, id, key, now);
        }
        if let Some(peers) = self.letters.peers.take() {
            self.keep_peers(peers);
            self.apply_peers(tunnel, now);
        }
        if let Some(own) = self.letters.own_addresses.take() {
            self.own_addresses = own;
            tunnel.set_own_addresses(self.own_addresses.clone());
        }
        if let Some(local) = self.letters.local_addresses.take() {
            self.local_addresses = local;
            tunnel.set_local_addresses(self.local_addresses.clone());
        }
    }

    /// Before the tunnel hears of it: after a panic there the next one begins with the new key.
    fn change_own_key(
        &mut self,
        tunnel: &mut BoringTunnel,
        id: OwnKeyId,
        key: PrivateKey,
        now: MonoTime,
    ) {
        (self.config.own, self.own_key) = (id, key);
        tunnel.factory_mut().set_own_key(id, &self.own_key);
        tunnel.replace_own(now, id);
    }

    /// Removes those of the peers that begin anew, with all that is known of them; whether there are any. The set that has
    /// them again is in the same letter.
    fn take_out_made_anew(&mut self) -> bool {
        let removed = take(&mut self.letters.made_anew);
        let Some(peers) = self.peers.as_deref().filter(|_| !removed.is_empty()) else {
            return false;
        };
        let kept = peers.iter().filter(|peer| !removed.contains(&peer.key));
        self.keep_peers(Arc::new(kept.cloned().collect()));
        true
    }

    fn keep_peers(&mut self, peers: Arc<Vec<PeerConfig>>) {
        self.forget_removed(&peers);
        self.peers = Some(peers);
        self.note_relays();
    }

    fn read_places(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        while let Some((key, endpoint)) = self.letters.endpoints.pop_first() {
            tunnel.set_endpoint(now, &key, endpoint);
            self.note_told_place(key, endpoint);
        }
        while let Some((key, at)) = self.letters.places.pop_first() {
            tunnel.note_endpoint(now, key, at);
            self.note_told_place(key, at);
        }
    }

    fn read_of_relays(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        while let Some((relay, sight)) = self.letters.seen.pop_first() {
            tunnel.note_seen(relay, sight);
        }
        while let Some((relay, doubt)) = self.letters.doubted.pop_first() {
            tunnel.doubt_relay(now, &relay, doubt);
        }
        while let Some((peer, relay)) = self.letters.passed_over.pop_first() {
            tunnel.pass_over(now, relay, peer.as_ref());
        }
        if take(&mut self.letters.check_relays) {
            tunnel.check_relays(now);
        }
        while let Some((relay, bridge)) = self.letters.bridges.pop_first() {
            self.set_bridge(tunnel, relay, bridge, now);
        }
    }

    fn read_initiations(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        if take(&mut self.letters.initiate_all) {
            tunnel.initiate_all(now);
        }
        if take(&mut self.letters.initiate_anew) {
            tunnel.initiate_anew(now);
        }
        if take(&mut self.letters.initiate_forgotten) {
            tunnel.initiate_forgotten(now);
        }
    }
}
