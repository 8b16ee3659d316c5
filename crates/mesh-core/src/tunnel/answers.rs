//! Answers to handshake messages of ours: responses and cookie replies.
//!
//! ```text
//!  response ─> index of ours ─> an initiation waits under it ─> mac1 ─> [limits] ─> engine: two curve operations
//!  cookie   ─> index of ours ─> our last message has it ──────────────────────────> engine: as cheap as a mac
//! ```
//! Anybody who ever saw a datagram of ours knows an index of ours, and our public key is published: what shows no more than
//! that costs nothing and uses up nobody's share. One that was not asked for, or that came already, ends there, too.

use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::UdpMeta;
use super::counters::DropReason;
use super::engine::{Engine, EngineFactory, HandshakeHalf, HandshakeOutcome, MacCheck, OwnKeyId};
use super::inbound::Heard;
use super::peers::{Member, Peers};

impl<F: EngineFactory> Tunnel<F> {
    pub(super) fn handle_response(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        wire: u32,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let index = self.factory.local_index(wire);
        let (_, member) = named(&mut self.peers, meta, index)?;
        if !member.engine.awaits(index) {
            return Err(DropReason::NotAwaited);
        }
        let own = member.own;
        let proven = self.admit_response(now, own, meta, datagram)?;
        let opened = self.open_response(now, meta, index, datagram);
        if opened.is_err() {
            self.front.spend_response(now, meta.limited_as(), proven);
        }
        let (slot, outcome) = opened?;
        // Not for an initiation: its source may be forged, but a response has read what we sent there.
        if meta.carried.is_none() {
            self.limiter.lock().answered(now, meta.source.ip());
        }
        if outcome.authenticated {
            self.heard(now, slot, meta, Heard::Handshake);
        }
        self.finish_handshake(now, slot, meta, datagram.len(), outcome);
        if outcome.session_ready {
            self.session_ready(now, slot);
        }
        Ok(())
    }

    pub(super) fn handle_cookie_reply(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        wire: u32,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let index = self.factory.local_index(wire);
        let (slot, _) = self.hand_over(now, meta, index, datagram)?;
        self.counters.cookies_received += 1;
        self.peers.reschedule(now, slot);
        Ok(())
    }

    /// Whether its sender has proved his address.
    fn admit_response(
        &mut self,
        now: MonoTime,
        own: OwnKeyId,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Result<bool, DropReason> {
        let check = self.factory.check_mac(now, own, meta.source, datagram);
        if check == MacCheck::Invalid {
            return Err(DropReason::BadMac);
        }
        let proven = check == MacCheck::Proven;
        let verdict = self.front.admit_response(now, meta.limited_as(), proven);
        self.obey(now, verdict, meta, own, datagram)?;
        Ok(proven)
    }

    fn open_response(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        index: u32,
        datagram: &[u8],
    ) -> Result<(u32, HandshakeOutcome), DropReason> {
        let (slot, outcome) = self.hand_over(now, meta, index, datagram)?;
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.rtt = peer.initiated_at.map(|sent| now.since(sent));
            if let Some(member) = peer.member(index >> 8) {
                member.unconfirmed = false;
            }
        }
        Ok((slot, outcome))
    }

    fn hand_over(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        index: u32,
        datagram: &[u8],
    ) -> Result<(u32, HandshakeOutcome), DropReason> {
        let (slot, member) = named(&mut self.peers, meta, index)?;
        let (source, buffer) = (meta.source.ip(), &mut self.buffer);
        Ok((slot, member.engine.handle_handshake(now, source, datagram, buffer)?))
    }
}

/// Whose index it is.
fn named<'p, E: Engine>(
    peers: &'p mut Peers<E>,
    meta: &UdpMeta,
    index: u32,
) -> Result<(u32, &'p mut Member<E>), DropReason> {
    let slot = peers.slot_of_index(index).ok_or(DropReason::UnknownIndex)?;
    let peer = peers.get_mut(slot).ok_or(DropReason::UnknownIndex)?;
    if !meta.names(&peer.config.key) {
        return Err(DropReason::CarriedName);
    }
    Ok((slot, peer.member(index >> 8).ok_or(DropReason::UnknownIndex)?))
}
