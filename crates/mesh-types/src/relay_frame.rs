//! What a node and `keyrelay` say to each other *inside* their WireGuard session.
//!
//! The session proves who speaks, so a frame carries no key and no signature. It travels as the payload of a
//! minimal IPv6 packet (next header 253, RFC 3692), because engines hand up IP packets only; such
//! a packet never reaches a TUN on either side.
