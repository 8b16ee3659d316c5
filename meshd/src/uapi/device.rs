//! A device as its operator configured it, what a `set` makes of it, and how a `get` shows it.
//!
//! A public key names a peer; of an allowed IP the peer that was given it last is the owner. Peers and allowed IPs are shown
//! in the order they came. Nothing here is in force: [`Device::change_to`] says what a data plane has to do.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::tunnel::config::PeerConfig;
use mesh_types::key::{KEY_LEN, PresharedKey, PrivateKey, PublicKey};
use mesh_types::limits::{ALLOWED_IPS_MAX, NODES_MAX};
use zeroize::Zeroizing;

use super::Refusal;
use super::line::{Line, PeerKey};

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct Device {
    private_key: Option<PrivateKey>,
    public_key: Option<PeerKey>,
    /// As asked for, then the one in use; 0: the kernel is to choose.
    pub listen_port: u16,
    pub fwmark: u32,
    peers: BTreeMap<PeerKey, Peer>,
    /// Who owns a prefix, and which of his it is.
    owners: BTreeMap<IpNet, (PeerKey, u64)>,
    /// Counts what came: order, and whether something is new.
    serial: u64,
}

#[derive(Debug, Clone, Default)]
struct Peer {
    born: u64,
    preshared: Option<PresharedKey>,
    endpoint: Option<SocketAddr>,
    /// When it was set.
    endpoint_at: u64,
    keepalive: u16,
    allowed: BTreeMap<u64, IpNet>,
}

/// What a data plane knows of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    pub endpoint: Option<SocketAddr>,
    /// Since 1970.
    pub last_handshake: Option<Duration>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

/// What a `get` tells besides the configuration.
pub type Live = BTreeMap<PeerKey, Figures>;

/// What has to be done for another configuration.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// A port was named, though it may be the one in use.
    pub port: bool,
    pub fwmark: bool,
    /// Something was said of keys or peers.
    pub identities: bool,
    /// Another private key, or none any more.
    pub own_key: bool,
    /// A private key where there was none.
    pub first_key: bool,
    /// Peers that were removed and made again: to be removed first.
    pub made_anew: Vec<PublicKey>,
    /// Endpoints that were named.
    pub endpoints: BTreeMap<PublicKey, SocketAddr>,
}

/// The peer that lines are about.
#[derive(Debug, Clone, Copy)]
enum Subject {
    Device,
    Peer {
        key: PeerKey,
        /// By this very request.
        made: bool,
    },
    /// One that is not there, or was removed: lines are read and forgotten.
    Nobody,
}

impl Device {
    /// The device after all `lines`.
    pub fn apply(&self, lines: &[Line]) -> Result<Self, Refusal> {
        let mut device = self.clone();
        device.serial += 1;
        let mut subject = Subject::Device;
        for line in lines {
            subject = device.apply_line(subject, line)?;
        }
        Ok(device)
    }

    fn apply_line(&mut self, subject: Subject, line: &Line) -> Result<Subject, Refusal> {
        match (line, subject) {
            (Line::PublicKey(key), _) => return self.select(*key),
            (Line::PrivateKey(key), Subject::Device) => self.set_private_key(key.as_ref()),
            (Line::ListenPort(port), Subject::Device) => self.listen_port = *port,
            (Line::Fwmark(mark), Subject::Device) => self.fwmark = *mark,
            (Line::ReplacePeers, Subject::Device) => {
                self.peers.clear();
                self.owners.clear();
            }
            (Line::Remove, Subject::Peer { key, .. }) => {
                self.remove(&key);
                return Ok(Subject::Nobody);
            }
            (Line::UpdateOnly, Subject::Peer { key, made: true }) => {
                self.remove(&key);
                return Ok(Subject::Nobody);
            }
            (line, Subject::Peer { key, .. }) => self.change_peer(key, line)?,
            (_, Subject::Nobody) => {}
            (_, Subject::Device) => return Err(Refusal::Invalid),
        }
        Ok(subject)
    }

    fn set_private_key(&mut self, key: Option<&PrivateKey>) {
        self.public_key = key.map(|key| wg_engine::public_key(key).into());
        self.private_key = key.cloned();
        // Nobody is a peer of himself.
        if let Some(own) = self.public_key {
            self.remove(&own);
        }
    }

    fn select(&mut self, key: PeerKey) -> Result<Subject, Refusal> {
        if self.public_key == Some(key) {
            return Ok(Subject::Nobody);
        }
        let made = !self.peers.contains_key(&key);
        if made {
            if self.peers.len() >= NODES_MAX {
                return Err(Refusal::Invalid);
            }
            let born = self.next_serial();
            self.peers.insert(key, Peer { born, ..Peer::default() });
        }
        Ok(Subject::Peer { key, made })
    }

    fn change_peer(&mut self, key: PeerKey, line: &Line) -> Result<(), Refusal> {
        match line {
            Line::ReplaceAllowedIps => {
                let held = self.peers.get_mut(&key).map(|peer| std::mem::take(&mut peer.allowed));
                for prefix in held.unwrap_or_default().values() {
                    self.owners.remove(prefix);
                }
            }
            Line::AllowedIp(prefix) => return self.allow(key, *prefix),
            Line::NoAllowedIp(prefix) => {
                if self.owners.get(prefix).is_some_and(|(owner, _)| *owner == key) {
                    self.disown(prefix);
                }
            }
            _ => {
                let at = self.next_serial();
                let Some(peer) = self.peers.get_mut(&key) else { return Ok(()) };
                match line {
                    Line::PresharedKey(preshared) => peer.preshared.clone_from(preshared),
                    Line::Keepalive(seconds) => peer.keepalive = *seconds,
                    Line::Endpoint(endpoint) => {
                        peer.endpoint = Some(*endpoint);
                        peer.endpoint_at = at;
                    }
                    // Said of a peer that was there, which it stays; the version is 1.
                    Line::UpdateOnly | Line::ProtocolVersion => {}
                    _ => return Err(Refusal::Invalid),
                }
            }
        }
        Ok(())
    }

    /// Gives `prefix` to `key`, whoever had it.
    fn allow(&mut self, key: PeerKey, prefix: IpNet) -> Result<(), Refusal> {
        let prefix = prefix.trunc();
        match self.owners.get(&prefix) {
            Some((owner, _)) if *owner == key => return Ok(()),
            Some(_) => self.disown(&prefix),
            None if self.owners.len() >= ALLOWED_IPS_MAX => return Err(Refusal::Invalid),
            None => {}
        }
        let at = self.next_serial();
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.allowed.insert(at, prefix);
            self.owners.insert(prefix, (key, at));
        }
        Ok(())
    }

    fn disown(&mut self, prefix: &IpNet) {
        if let Some((owner, at)) = self.owners.remove(prefix)
            && let Some(peer) = self.peers.get_mut(&owner)
        {
            peer.allowed.remove(&at);
        }
    }

    fn remove(&mut self, key: &PeerKey) {
        if let Some(peer) = self.peers.remove(key) {
            for prefix in peer.allowed.values() {
                self.owners.remove(prefix);
            }
        }
    }

    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub fn private_key(&self) -> Option<&PrivateKey> {
        self.private_key.as_ref()
    }

    /// What leads from this device to `new`, which [`Self::apply`] made of it.
    pub fn change_to(&self, new: &Self, lines: &[Line]) -> Change {
        let mut change = Change {
            port: lines.iter().any(|line| matches!(line, Line::ListenPort(_))),
            fwmark: self.fwmark != new.fwmark,
            identities: lines
                .iter()
                .any(|line| !matches!(line, Line::ListenPort(_) | Line::Fwmark(_))),
            own_key: self.private_key.as_ref().map(PrivateKey::expose)
                != new.private_key.as_ref().map(PrivateKey::expose),
            first_key: self.private_key.is_none() && new.private_key.is_some(),
            ..Change::default()
        };
        for (key, peer) in &new.peers {
            let Some(sound) = key.sound() else { continue };
            if self.peers.get(key).is_some_and(|before| before.born != peer.born) {
                change.made_anew.push(sound);
            }
            if let Some(endpoint) = peer.endpoint.filter(|_| peer.endpoint_at > self.serial) {
                change.endpoints.insert(sound, endpoint);
            }
        }
        change
    }

    /// The peers as a tunnel takes them. Nobody is spoken to without a private key, nor by a key of low order.
    pub fn peer_configs(&self, mtu: u32) -> Vec<PeerConfig> {
        if self.private_key.is_none() {
            return Vec::new();
        }
        let config = |(key, peer): (&PeerKey, &Peer)| {
            Some(PeerConfig {
                key: key.sound()?,
                preshared: peer.preshared.clone(),
                allowed_ips: peer.allowed.values().copied().collect(),
                candidates: Vec::new(),
                keepalive: (peer.keepalive > 0)
                    .then(|| Duration::from_secs(u64::from(peer.keepalive))),
                mtu,
                role: Default::default(),
                relays: Vec::new(),
            })
        };
        self.peers.iter().filter_map(config).collect()
    }

    /// Where peers are, as far as known.
    pub fn endpoints(&self) -> BTreeMap<PublicKey, SocketAddr> {
        let of = |(key, peer): (&PeerKey, &Peer)| Some((key.sound()?, peer.endpoint?));
        self.peers.iter().filter_map(of).collect()
    }

    /// A peer was heard elsewhere than it was said to be.
    pub fn move_endpoint(&mut self, key: &PeerKey, endpoint: SocketAddr) {
        if let Some(peer) = self.peers.get_mut(key) {
            peer.endpoint = Some(endpoint);
        }
    }

    pub fn contains(&self, key: &PeerKey) -> bool {
        self.peers.contains_key(key)
    }

    /// The answer to a `get`, without `errno`.
    pub fn print(&self, live: &Live) -> Zeroizing<String> {
        let mut out = Zeroizing::new(String::new());
        // Keys leave no copies behind when the text grows: it does not.
        out.reserve(self.printed_bytes_max());
        if let Some(key) = &self.private_key {
            print_key(&mut out, "private_key", key.expose());
        }
        let port = u32::from(self.listen_port);
        for (name, value) in [("listen_port", port), ("fwmark", self.fwmark)] {
            if value != 0 {
                print_value(&mut out, name, value);
            }
        }
        let mut peers: Vec<_> = self.peers.iter().collect();
        peers.sort_unstable_by_key(|(_, peer)| peer.born);
        for (key, peer) in peers {
            print_peer(&mut out, key, peer, live.get(key).copied().unwrap_or_default());
        }
        out
    }

    fn printed_bytes_max(&self) -> usize {
        256 + self.peers.len() * 512 + self.owners.len() * 64
    }
}

fn print_peer(out: &mut String, key: &PeerKey, peer: &Peer, figures: Figures) {
    print_key(out, "public_key", &key.0);
    let none = PresharedKey::from_bytes([0; KEY_LEN]);
    print_key(out, "preshared_key", peer.preshared.as_ref().unwrap_or(&none).expose());
    print_value(out, "protocol_version", 1);
    if let Some(endpoint) = figures.endpoint.or(peer.endpoint) {
        print_value(out, "endpoint", endpoint);
    }
    let handshake = figures.last_handshake.unwrap_or_default();
    print_value(out, "last_handshake_time_sec", handshake.as_secs());
    print_value(out, "last_handshake_time_nsec", handshake.subsec_nanos());
    print_value(out, "tx_bytes", figures.tx_bytes);
    print_value(out, "rx_bytes", figures.rx_bytes);
    print_value(out, "persistent_keepalive_interval", peer.keepalive);
    for prefix in peer.allowed.values() {
        print_value(out, "allowed_ip", prefix);
    }
}

fn print_value(out: &mut String, name: &str, value: impl std::fmt::Display) {
    // Writing to a String does not fail.
    let _ = writeln!(out, "{name}={value}");
}

fn print_key(out: &mut String, name: &str, key: &[u8; KEY_LEN]) {
    out.push_str(name);
    out.push('=');
    for byte in key {
        for digit in [byte >> 4, byte & 15] {
            out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    out.push('\n');
}
