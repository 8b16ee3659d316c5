//! The data plane: one thread with its TUN queue, its UDP socket and its tunnel.
