//! A member of our relay: a handshake and one question, after which it is registered.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
    open_one, seal_one,
};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::{Frame, PACKET_BYTES_MAX};
use netcfg::clock;
use wg_engine::{BoringEngine, BoringFactory};

const OWN: OwnKeyId = OwnKeyId(0);

/// Handshakes tried: the first may be answered by a cookie, and what is lost is sent again.
const TRIES: u32 = 10;

/// Between them, so that the relay's limit for one source is not met again at once.
const PAUSE: Duration = Duration::from_millis(60);

/// Registers `socket`, which is connected to the relay, as `key`.
pub(super) fn join(
    socket: &UdpSocket,
    relay: PublicKey,
    key: &PrivateKey,
    index: u32,
) -> Result<()> {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OWN, key);
    let config = EngineConfig {
        own: OWN,
        peer: relay,
        preshared: None,
        keepalive: None,
        index,
        seed: rand::random(),
    };
    let mut engine = factory.create(clock::now(), config);
    for _ in 0..TRIES {
        if shake_hands(socket, &mut engine)? && ask(socket, &mut engine)? {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    bail!("the relay does not register it");
}

/// What came, or nothing in time.
fn receive<'a>(socket: &UdpSocket, buffer: &'a mut [u8]) -> Result<Option<&'a mut [u8]>> {
    match socket.recv(buffer) {
        Ok(length) => Ok(buffer.get_mut(..length)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error).context("receive"),
    }
}

fn shake_hands(socket: &UdpSocket, engine: &mut BoringEngine) -> Result<bool> {
    let (mut out, mut answer): (HandshakeBuffer, _) = ([0; INITIATION_BYTES], [0; 256]);
    let length = engine.initiate(clock::now(), true, &mut out).context("no initiation")?;
    socket.send(out.get(..length).unwrap_or_default())?;
    let Some(got) = receive(socket, &mut answer)? else { return Ok(false) };
    let relay = socket.peer_addr()?.ip();
    let met = engine.handle_handshake(clock::now(), relay, got, &mut out);
    Ok(met.is_ok_and(|met| met.session_ready))
}

/// Asks for its address: whoever gets an answer is registered.
fn ask(socket: &UdpSocket, engine: &mut BoringEngine) -> Result<bool> {
    let mut packet = [0; PACKET_BYTES_MAX];
    let question = Frame::WhatIsMyAddress { token: 7 };
    let length = question.encode(&mut packet).context("the question is too long")?;
    let packet = packet.get(..length).unwrap_or_default();
    let datagram = seal_one(engine, clock::now(), packet).context("there is no session")?;
    socket.send(&datagram)?;
    let mut answer = [0; 256];
    let Some(got) = receive(socket, &mut answer)? else { return Ok(false) };
    let packet = open_one(engine, clock::now(), got);
    let is_ours = |frame| matches!(frame, Frame::YourAddressIs { token: 7, .. });
    Ok(packet.and_then(|packet| Frame::decode(&packet).ok()).is_some_and(is_ours))
}
