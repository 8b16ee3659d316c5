//! The kernel edge: everything the project asks of Linux, synchronous and without a runtime.
//!
//! ```text
//! meshd, cni, testbed
//!   |  packets                 |  configuration                       |  looking
//!   v                          v                                      v
//! tun   udp                  state  guard  pod                      watch  capture
//!   \    |                     |      |     |  \                      |      |
//!    \   |            link addr route neigh |   nft -f - (text)       |      |
//!     \  |                      \     |    /                          |      |
//!      sys  (the only unsafe)     netlink                         netlink   sys
//! ```
//!
//! Every function works in the network namespace of the calling thread; [`netns::run_in`] gives a
//! closure a thread inside another one. Objects we make carry our mark (name, route protocol, table,
//! rule priority, nftables table), so that they can be found, repaired and removed, and nobody
//! else's are touched.

pub mod addr;
pub mod capture;
pub mod clock;
mod cmsg;
pub mod conntrack;
pub mod guard;
pub mod kube_proxy;
pub mod link;
pub mod neigh;
mod netlink;
pub mod netns;
mod nfnetlink;
mod nft;
pub mod pod;
pub mod release;
pub mod route;
mod ruleset;
mod seal;
pub mod state;
mod sys;
pub mod sysctl;
pub mod tcp;
pub mod tun;
pub mod udp;
pub mod watch;
pub mod way_out;

/// A descriptor of our own for what whoever started us left open as `number`.
pub fn inherited_descriptor(number: i32) -> std::io::Result<std::os::fd::OwnedFd> {
    sys::inherited(number)
}

/// The file that a socket of the Unix domain was bound to, whatever it is called now; needs `CAP_NET_ADMIN`.
pub fn bound_file(socket: impl std::os::fd::AsFd) -> std::io::Result<std::os::fd::OwnedFd> {
    sys::bound_file(socket.as_fd())
}

pub use nft::{OWN_NFT, OWN_NFT_LOADER, find_program as find_nft, forwarding_closed};
