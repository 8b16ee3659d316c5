//! Bridges to relays, told to the tunnel and kept for one made anew after a panic.

use std::net::SocketAddr;

use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;

use super::{BoringTunnel, Shard};

impl Shard {
    pub(super) fn set_bridge(
        &mut self,
        tunnel: &mut BoringTunnel,
        relay: PublicKey,
        bridge: Option<SocketAddr>,
        now: MonoTime,
    ) {
        tunnel.set_bridge(now, &relay, bridge);
        let before = match bridge {
            Some(at) => self.bridges.insert(relay, at),
            None => self.bridges.remove(&relay),
        };
        if before != bridge {
            self.steer_anew = true;
            self.note_relays();
        }
    }
}
