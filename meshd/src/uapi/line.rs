//! One line of a `set`: `key=value`, read strictly.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use ipnet::IpNet;
use mesh_types::key::{KEY_LEN, PresharedKey, PrivateKey, PublicKey};

use super::Refusal;

/// A peer's key as an operator wrote it: one of low order is kept and shown, but no packet is made with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerKey(pub [u8; KEY_LEN]);

impl PeerKey {
    /// The key, if secrets agreed with it are secret.
    pub fn sound(&self) -> Option<PublicKey> {
        PublicKey::from_bytes(self.0).ok()
    }
}

impl From<PublicKey> for PeerKey {
    fn from(key: PublicKey) -> Self {
        Self(*key.as_bytes())
    }
}

/// What a line asks for.
#[derive(Debug, Clone)]
pub enum Line {
    // Of the device.
    /// `None` (zeroes) takes the key away.
    PrivateKey(Option<PrivateKey>),
    /// 0 lets the kernel choose.
    ListenPort(u16),
    /// 0 takes the mark away.
    Fwmark(u32),
    ReplacePeers,
    // Of the peer named last.
    PublicKey(PeerKey),
    Remove,
    UpdateOnly,
    PresharedKey(Option<PresharedKey>),
    Endpoint(SocketAddr),
    /// Seconds; 0 for none.
    Keepalive(u16),
    ReplaceAllowedIps,
    AllowedIp(IpNet),
    /// `allowed_ip=-`: if it is this peer's.
    NoAllowedIp(IpNet),
    ProtocolVersion,
}

/// Reads a line without its end. `in_peer`: a peer was named before. `zone` answers the index of an interface.
pub fn parse(
    text: &[u8],
    in_peer: bool,
    zone: &dyn Fn(&str) -> Option<u32>,
) -> Result<Line, Refusal> {
    if !text.contains(&b'=') {
        return Err(Refusal::Protocol);
    }
    let text = std::str::from_utf8(text).map_err(|_| Refusal::Invalid)?;
    let (key, value) = text.split_once('=').ok_or(Refusal::Protocol)?;
    let line = match key {
        "public_key" => Some(Line::PublicKey(PeerKey(*hex_key(value)?))),
        _ if in_peer => peer_line(key, value, zone)?,
        _ => device_line(key, value)?,
    };
    line.ok_or(Refusal::Invalid)
}

/// All there are.
const KEYS: [&str; 13] = [
    "private_key",
    "listen_port",
    "fwmark",
    "replace_peers",
    "public_key",
    "remove",
    "update_only",
    "preshared_key",
    "endpoint",
    "persistent_keepalive_interval",
    "replace_allowed_ips",
    "allowed_ip",
    "protocol_version",
];

/// What stands before the `=`, if it is one of ours: anything else may be a secret in the wrong place, as Base64 ends with a `=`, too.
pub fn known_key(text: &[u8]) -> Option<&'static str> {
    let key = text.split(|byte| *byte == b'=').next()?;
    KEYS.into_iter().find(|known| known.as_bytes() == key && key.len() < text.len())
}

fn device_line(key: &str, value: &str) -> Result<Option<Line>, Refusal> {
    Ok(Some(match key {
        "private_key" => {
            let bytes = hex_key(value)?;
            Line::PrivateKey(is_set(&bytes).then(|| PrivateKey::from_bytes(*bytes)))
        }
        "listen_port" => Line::ListenPort(number(value)?),
        "fwmark" => Line::Fwmark(number(value)?),
        "replace_peers" => only_true(value, Line::ReplacePeers)?,
        _ => return Ok(None),
    }))
}

fn peer_line(
    key: &str,
    value: &str,
    zone: &dyn Fn(&str) -> Option<u32>,
) -> Result<Option<Line>, Refusal> {
    Ok(Some(match key {
        "remove" => only_true(value, Line::Remove)?,
        "update_only" => only_true(value, Line::UpdateOnly)?,
        "preshared_key" => {
            let bytes = hex_key(value)?;
            Line::PresharedKey(is_set(&bytes).then(|| PresharedKey::from_bytes(*bytes)))
        }
        "endpoint" => Line::Endpoint(endpoint(value, zone).ok_or(Refusal::Invalid)?),
        "persistent_keepalive_interval" => Line::Keepalive(number(value)?),
        "replace_allowed_ips" => only_true(value, Line::ReplaceAllowedIps)?,
        "allowed_ip" => match value.strip_prefix('-') {
            Some(value) => Line::NoAllowedIp(prefix(value)?),
            None => Line::AllowedIp(prefix(value)?),
        },
        "protocol_version" if value == "1" => Line::ProtocolVersion,
        _ => return Ok(None),
    }))
}

fn only_true(value: &str, line: Line) -> Result<Line, Refusal> {
    if value == "true" { Ok(line) } else { Err(Refusal::Invalid) }
}

/// Decimal digits alone; Rust would also read `+1`.
fn number<N: FromStr>(value: &str) -> Result<N, Refusal> {
    if !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Refusal::Invalid);
    }
    value.parse().map_err(|_| Refusal::Invalid)
}

fn is_set(key: &[u8; KEY_LEN]) -> bool {
    key.iter().any(|byte| *byte != 0)
}

fn hex_key(value: &str) -> Result<zeroize::Zeroizing<[u8; KEY_LEN]>, Refusal> {
    let (digits, rest) = value.as_bytes().as_chunks::<2>();
    let mut key = zeroize::Zeroizing::new([0; KEY_LEN]);
    if digits.len() != KEY_LEN || !rest.is_empty() {
        return Err(Refusal::Invalid);
    }
    for (byte, [high, low]) in key.iter_mut().zip(digits) {
        *byte = hex_digit(*high)? << 4 | hex_digit(*low)?;
    }
    Ok(key)
}

fn hex_digit(digit: u8) -> Result<u8, Refusal> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(Refusal::Invalid),
    }
}

/// `ADDRESS:PORT` or `[ADDRESS%ZONE]:PORT`, the zone by number or interface name.
fn endpoint(value: &str, zone: &dyn Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    if let Ok(plain) = value.parse::<SocketAddr>() {
        return Some(SocketAddr::new(plain.ip().to_canonical(), plain.port())).map(|canonical| {
            // The canonical form of a true IPv6 address would lose its zone.
            if canonical.is_ipv6() { plain } else { canonical }
        });
    }
    let (address, port) = value.strip_prefix('[')?.split_once("]:")?;
    let (address, name) = address.split_once('%')?;
    let address: Ipv6Addr = address.parse().ok()?;
    let port = number(port).ok()?;
    Some(SocketAddr::V6(SocketAddrV6::new(address, port, 0, zone(name)?)))
}

/// A prefix with its length said, without a zero in front; bits behind it are ignored.
fn prefix(value: &str) -> Result<IpNet, Refusal> {
    let (address, len) = value.split_once('/').ok_or(Refusal::Invalid)?;
    if len.len() > 1 && len.starts_with('0') {
        return Err(Refusal::Invalid);
    }
    let address: IpAddr = address.parse().map_err(|_| Refusal::Invalid)?;
    IpNet::new(address, number(len)?).map(|net| net.trunc()).map_err(|_| Refusal::Invalid)
}
