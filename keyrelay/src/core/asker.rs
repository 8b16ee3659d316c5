//! The client: a handshake, one question, one answer.
//!
//! ```text
//!  poll -> initiation ... response -> question ... answer -> Answered
//!    ^        |  5 s                     |  1 s
//!    +--------+--------------------------+   asked again until the caller has waited long enough
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::tunnel::engine::{
    Engine, EngineConfig, EngineFactory, HandshakeBuffer, OwnKeyId, TimerOutcome, open_one,
};
use mesh_core::tunnel::front::Message;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::Frame;
use mesh_types::time::MonoTime;

use super::relay::seal_frame;

const OWN: OwnKeyId = OwnKeyId(0);

/// A question lost on the way is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Send this many bytes of the buffer to the relay.
    Send(usize),
    /// Nothing until the next datagram or [`Asker::next_timeout`].
    Wait,
    /// The relay sees us at this address.
    Answered(SocketAddr),
}

/// The sans-IO client.
pub struct Asker<E> {
    engine: E,
    token: u64,
    ask_at: Option<MonoTime>,
    begun: bool,
}

impl<E: Engine> Asker<E> {
    /// `seed` makes index, jitter and token.
    pub fn new<F: EngineFactory<Engine = E>>(
        now: MonoTime,
        mut factory: F,
        key: &PrivateKey,
        relay: PublicKey,
        seed: u64,
    ) -> Self {
        factory.set_own_key(OWN, key);
        let config = EngineConfig {
            own: OWN,
            peer: relay,
            preshared: None,
            keepalive: None,
            index: (seed >> 40) as u32,
            seed,
        };
        Self { engine: factory.create(now, config), token: seed, ask_at: None, begun: false }
    }

    /// What is due now; called until it answers [`Step::Wait`].
    pub fn poll(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> Step {
        if !self.begun {
            self.begun = true;
            return self.engine.initiate(now, true, out).map_or(Step::Wait, Step::Send);
        }
        if self.ask_at.is_some_and(|at| now >= at) {
            return self.ask(now, out);
        }
        match self.engine.handle_timeout(now, out) {
            TimerOutcome::Initiation(length) | TimerOutcome::Keepalive(length) => {
                Step::Send(length)
            }
            TimerOutcome::GaveUp => {
                self.begun = false;
                Step::Wait
            }
            TimerOutcome::Idle => Step::Wait,
        }
    }

    /// When [`Self::poll`] has something to do.
    pub fn next_timeout(&self, now: MonoTime) -> Option<MonoTime> {
        let begin = (!self.begun).then_some(now);
        [begin, self.ask_at, self.engine.next_timeout(now)].into_iter().flatten().min()
    }

    /// Takes a datagram that came from the relay's address. What is not from the relay is ignored.
    pub fn handle_datagram(
        &mut self,
        now: MonoTime,
        relay: SocketAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Step {
        match Message::of(datagram) {
            Some(Message::Response(_) | Message::Cookie(_)) => {
                let outcome = self.engine.handle_handshake(now, relay.ip(), datagram, out);
                match outcome {
                    // The question confirms the session as well as the keepalive in `out` would.
                    Ok(outcome) if outcome.session_ready => self.ask(now, out),
                    Ok(_) | Err(_) => Step::Wait,
                }
            }
            Some(Message::Transport(_)) => self.answer(now, datagram),
            Some(Message::Initiation) | None => Step::Wait,
        }
    }

    fn ask(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> Step {
        let question = Frame::WhatIsMyAddress { token: self.token };
        match seal_frame(&mut self.engine, now, question, out) {
            Some(length) => {
                self.ask_at = Some(now + ASK_AGAIN);
                Step::Send(length)
            }
            None => {
                self.ask_at = None;
                self.begun = false;
                Step::Wait
            }
        }
    }

    fn answer(&mut self, now: MonoTime, datagram: &[u8]) -> Step {
        let packet = open_one(&mut self.engine, now, datagram);
        match packet.map(|packet| Frame::decode(&packet)) {
            Some(Ok(Frame::YourAddressIs { token, address, .. })) if token == self.token => {
                self.ask_at = None;
                Step::Answered(address)
            }
            _ => Step::Wait,
        }
    }
}
